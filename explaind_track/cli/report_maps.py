"""Heat maps of a report, as tables: what a run did to losses by layer and type, and to each of several by group."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from explaind_track.cli.report_figures import CHANGES, Rows
from explaind_track.core.architectures import cells_of
from explaind_track.core.colored_text import shades
from explaind_track.record.history import (
    AXIS,
    LOSS,
    TOKENS,
    TOTAL,
    change_key,
    keys_by_group,
    residual_key,
    section_of,
    whole_change_key,
)

STRETCHES = 4
"""Of the run, with a map for each."""

WITHIN = 0.8
"""The share of a map's numbers that lie within its colours: a head may do more than all else."""

Changes = Mapping[str, float]
"""Of a loss, by group."""


def maps_of(rows: Rows) -> dict[str, Any] | None:
    """The maps that the rows have something for, as the page's template takes them; None where there are none."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    losses = losses_in(keys)
    groups = {section: _groups_of(keys, section) for section in losses.values()}
    by_layer = [
        {"name": name, "maps": _in_stretches(rows, section, groups[section])}
        for name, section in losses.items()
        if cells_of(groups[section])
    ]

    domains = None
    if len(losses) > 1:
        sums = {name: _by_type(_sums(rows, section, groups[section])) for name, section in losses.items()}
        across = list(dict.fromkeys(group for own in sums.values() for group in own))
        values = {(group, name): own[group] for name, own in sums.items() for group in own}
        domains = _grid("over all steps", across, list(sums), values)
        for line in domains["lines"]:
            line["sum"] = None  # of several losses it says nothing
    return {"by_layer": by_layer, "domains": domains} if by_layer or domains else None


def losses_in(keys: Sequence[str]) -> dict[str, str]:
    """The section of each loss in the rows, by the query's name; without those that have tables of tokens, unless there
    are no others."""
    sections = [name for name in map(section_of, keys) if name and whole_change_key(name) in keys]
    named = {(_first_loss(keys) if section == LOSS else section): section for section in dict.fromkeys(sections)}
    others = {name: section for name, section in named.items() if f"{TOKENS}/{name}" not in keys}
    return others or named


def _first_loss(keys: Sequence[str]) -> str:
    """The name of the first loss query, whose section is `loss` whatever it is called; `loss` where it is not clear."""
    names = [key.removesuffix("/loss") for key in keys if key.endswith("/loss") and key.count("/") == 1]
    found = [
        name
        for name in names
        if residual_key(name) in keys and whole_change_key(name) not in keys and f"{name}/accuracy" not in keys
    ]
    return found[0] if len(found) == 1 else LOSS


def _groups_of(keys: Sequence[str], section: str) -> list[str]:
    parts = (keys_by_group(keys, f"{section}/{part}") for part in CHANGES)
    return list(dict.fromkeys(group for part in parts for group in part if group != TOTAL))


def _sums(rows: Rows, section: str, groups: Iterable[str]) -> dict[str, float]:
    """What all parts did to a loss through each group, in the rows together."""
    keys = {group: [change_key(part, group, section) for part in CHANGES] for group in groups}
    return {group: math.fsum(row.get(key, 0.0) for row in rows for key in own) for group, own in keys.items()}


def _by_type(changes: Changes) -> dict[str, float]:
    """Of groups by layer and type, the sums over the layers; others as they are."""
    cells, found = cells_of(changes), dict[str, float]()
    for group, value in changes.items():
        name = cells[group].type if group in cells else group
        found[name] = found.get(name, 0.0) + value
    return found


def _in_stretches(rows: Rows, section: str, groups: Sequence[str]) -> list[dict[str, Any]]:
    """A map of the whole run, and one of each of its stretches."""
    cells = cells_of(groups)
    layers, types = (list(dict.fromkeys(names)) for names in zip(*cells.values(), strict=True))
    count = STRETCHES if len(rows) >= 2 * STRETCHES else 0
    stretches = [rows[number * len(rows) // count : (number + 1) * len(rows) // count] for number in range(count)]

    def grid(title: str, some: Rows) -> dict[str, Any]:
        sums = _sums(some, section, groups)
        return _grid(title, layers, types, {(cell.layer, cell.type): sums[group] for group, cell in cells.items()})

    parts = [grid(f"training steps {some[0][AXIS]} to {some[-1][AXIS]}", some) for some in stretches]
    return [grid("over all steps", rows), *parts]


def _grid(
    title: str, down: Sequence[str], right: Sequence[str], values: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    """A table with a coloured cell for each number, and the sums of rows and columns."""
    levels, limit = shades(list(values.values()), WITHIN)
    shade = dict(zip(values, levels, strict=True))
    unit = 10.0 ** math.floor(math.log10(limit)) if limit > 0 and math.isfinite(limit) else 1.0

    def cell(place: tuple[str, str]) -> dict[str, Any]:
        if place not in values:
            return {"text": "", "level": 0, "title": ""}
        value = values[place]
        title = f"{' · '.join(place)}: {value:+.3g} nats"
        return {"text": spelled(value), "level": shade[place], "title": title}

    def spelled(value: float) -> str:
        return f"{value / unit:.2f}" if abs(value / unit) >= 0.005 else "0"

    def all_of(some: Iterable[tuple[str, str]]) -> str:
        return spelled(math.fsum(values.get(place, 0.0) for place in some))

    lines = [
        {"label": row, "cells": [cell((row, column)) for column in right], "sum": all_of((row, c) for c in right)}
        for row in down
    ]
    sums = [all_of((row, column) for row in down) for column in right]
    return {"title": title, "unit": f"{unit:.0e}", "columns": right, "lines": lines, "sums": [*sums, all_of(values)]}
