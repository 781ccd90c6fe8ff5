"""The figures of a report, by section: which keys of the rows each draws, and how."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    LOSS,
    MOMENTUM,
    OUTSIDE,
    PAST,
    REGULARIZATION,
    RESIDUAL,
    SECONDS,
    SHARE,
    TOTAL,
    importance_key,
    is_measure,
    is_residual,
    keys_by_group,
    section_of,
    whole_change_key,
)
from explaind_track.record.layer_types import LAYER, TYPE

Rows = Sequence[Mapping[str, Any]]

POINTS = 1000
"""A figure of a longer run has about so many of its rows."""

NAMED = 12
"""Curves that are told of in words."""

EARLY_STEPS = 10
"""An optimizer's first steps move a model by far more than all others do: they do not set the scale."""


CHANGES = {
    KERNEL: "through the training samples",
    REGULARIZATION: "through weight decay",
    PAST: "through the first moment from before",
    OUTSIDE: "through changes by something other than the optimizer",
}
"""What changed a loss, in words."""


SHARES = {
    KERNEL: "gradients of the step",
    MOMENTUM: "gradients of earlier steps",
    REGULARIZATION: "weight decay",
    PAST: "the first moment from before",
    OUTSIDE: "something other than the optimizer",
}
"""Parts that have a share in what changed a loss, in words."""


@dataclass(frozen=True)
class Figure:
    """Curves over the training step."""

    title: str
    curves: Mapping[str, str]
    """The key of each, by its name in the legend."""
    stacked: bool = False
    log: bool = False
    banded: bool = False
    """Whether three curves in a row are one: its mean, its lowest and its highest."""


@dataclass(frozen=True)
class Section:
    """Figures under a heading."""

    heading: str
    description: str
    figures: Sequence[Figure]


def sections_of(rows: Rows) -> list[Section]:
    """The sections of a report, with the figures that the rows have something for; none is empty."""
    sections = _all_sections(list(dict.fromkeys(key for row in rows for key in row)))
    filled = [
        Section(section.heading, section.description, [figure for figure in section.figures if figure.curves])
        for section in sections
    ]
    return [section for section in filled if section.figures]


def _all_sections(keys: Sequence[str]) -> list[Section]:
    def groups(section: str) -> dict[str, str]:
        """The section's keys by group; the sum over all groups is no group."""
        return {group: key for group, key in keys_by_group(keys, section).items() if group != TOTAL}

    def by_group(title: str, section: str, stacked: bool = False) -> list[Figure]:
        """A figure; of groups by layer and type, one for each of the two."""
        found = groups(section)
        rest = {name: key for name, key in found.items() if not name.startswith((f"{TYPE}/", f"{LAYER}/"))}
        figures = [Figure(title, rest, stacked)]
        for kind in (TYPE, LAYER):
            prefix = f"{section}/{kind}/"
            figures.append(
                Figure(
                    f"{title.removesuffix(', by group')}, by {kind}",
                    _by_end((k for k in keys if k.startswith(prefix)), prefix),
                )
            )
        return figures

    def measures(name: str) -> dict[str, str]:
        return {key: key for key in keys if is_measure(key) and key.endswith(name)}

    # other losses, and other groupings of the first one, under their names
    losses = {
        name: "" if name == LOSS else f" ({name})"
        for name in map(section_of, keys)
        if name and whole_change_key(name) in keys
    }
    totals = {"kernel": importance_key(KERNEL, TOTAL), "weight decay": importance_key(REGULARIZATION, TOTAL)}
    return [
        Section(
            "Predictions",
            "Loss and accuracy.",
            [Figure("loss", measures("loss")), Figure("accuracy", measures("accuracy"))],
        ),
        Section(
            "Importance",
            "Ψ̄ of each step: the size of what the training samples did to the queries' predictions through each group "
            "of parameters (kernel), and of what weight decay did (regularization).",
            [
                Figure("kernel, by group", groups(KERNEL), stacked=True),
                Figure("weight decay, by group", groups(REGULARIZATION), stacked=True),
                Figure("the first moment from before, by group", groups(PAST), stacked=True),
                Figure("changed by something other than the optimizer, by group", groups(OUTSIDE), stacked=True),
                Figure("all groups together", {name: key for name, key in totals.items() if key in keys}),
            ],
        ),
        Section(
            "Relative regularization influence",
            "D of each step: signed kernel minus signed regularization influence.",
            by_group("D, by group", DIFFERENCE),
        ),
        Section(
            "Change of the loss",
            "How much each group changed the queries' loss in each step; below zero: it fell.",
            [
                figure
                for loss, of in losses.items()
                for part, title in CHANGES.items()
                for figure in by_group(f"{title}{of}", f"{loss}/{part}")
            ],
        ),
        Section(
            "Shares",
            "How large each part of a step is among what changed a loss: the gradients of the step itself, those of "
            "earlier steps, which the momentum carries, and weight decay.",
            [
                Figure(f"shares{of}", {SHARES.get(name, name): key for name, key in found.items()}, stacked=True)
                for loss, of in losses.items()
                if (found := groups(f"{loss}/{SHARE}"))
            ],
        ),
        Section(
            "How far to trust this",
            "The residual is what the split leaves over, relative to the change of the prediction.",
            [
                Figure("residual", _by_end(filter(is_residual, keys), f"{RESIDUAL}/"), log=True),
                Figure("seconds for each step", _by_end((key for key in keys if key.startswith(SECONDS)), SECONDS)),
            ],
        ),
    ]


def _by_end(keys: Iterable[str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): key for key in keys}


def drawing(figure: Figure, rows: Rows) -> dict[str, Any]:
    """The figure as the page's script takes it, from the rows that have its keys; with words for who cannot see it."""
    keys = list(figure.curves.values())
    drawn = _thinned([row for row in rows if any(key in row for key in keys)], keys)
    curves = [
        {"name": name, "values": [_value(row.get(key), figure.log) for row in drawn]}
        for name, key in figure.curves.items()
    ]

    # the range is that of the later steps: the first ones dwarf all others
    heights = _late_heights(figure, rows)
    low, high = min([0.0, *heights]), max([0.0, *heights])
    margin = 0.05 * (high - low)
    return {
        "title": figure.title,
        "alt": _in_words(figure, rows),
        "log": figure.log,
        "stacked": figure.stacked,
        "banded": figure.banded,
        "range": [low - margin, high + margin] if math.isfinite(margin) and margin > 0 else None,
        "steps": [row[AXIS] for row in drawn],
        "curves": curves,
    }


def _thinned(rows: Rows, keys: Sequence[str]) -> Rows:
    """About `POINTS` of the rows: of each stretch of the run, those in which one of these keys is lowest or highest."""
    if len(rows) <= POINTS:
        return rows
    stretches = max(1, POINTS // (2 * len(keys)))
    kept = {0, len(rows) - 1}
    for number in range(stretches):
        places = range(number * len(rows) // stretches, (number + 1) * len(rows) // stretches)
        for key in keys:
            values = [(rows[place][key], place) for place in places if key in rows[place]]
            if values:
                kept |= {min(values)[1], max(values)[1]}
    return [rows[place] for place in sorted(kept)]


def _value(value: float | None, log: bool) -> float | None:
    """A number as the page has it, to six digits; None where there is nothing to draw, as of 0 on an axis of powers."""
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return float(f"{value:.6g}")


def _in_words(figure: Figure, rows: Rows) -> str:
    """What a figure shows, for who cannot see it: the curves at both ends."""
    words = []
    for name, key in list(figure.curves.items())[:NAMED]:
        values = [row[key] for row in rows if key in row]
        words.append(
            f"{name} from {values[0]:.3g} to {values[-1]:.3g}, between {min(values):.3g} and {max(values):.3g}"
        )
    more = f"; and {len(figure.curves) - NAMED} more" if len(figure.curves) > NAMED else ""
    kind = "Stacked areas" if figure.stacked else "Curves"
    return f"{kind} over the training step, {figure.title}: {'; '.join(words)}{more}."


def _late_heights(figure: Figure, rows: Rows) -> list[float]:
    """The values of the curves after their first steps; of stacked curves, their sum at each step."""
    late = {key: [(row[AXIS], row[key]) for row in rows if key in row][EARLY_STEPS:] for key in figure.curves.values()}
    if not figure.stacked:
        return [value for points in late.values() for _, value in points]

    sums: dict[int, float] = {}
    for points in late.values():
        for step, value in points:
            sums[step] = sums.get(step, 0.0) + value
    return list(sums.values())
