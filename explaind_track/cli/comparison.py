"""Several runs beside each other: bands over seeds, differences of two, and their numbers in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, median, stdev
from typing import Any

from explaind_track.cli.report import page_of, spelled_table
from explaind_track.cli.report_figures import Figure, Rows, Section, sections_of
from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    LOSS,
    OUTSIDE,
    REGULARIZATION,
    importance_key,
    is_measure,
    is_residual,
    keys_by_group,
    numbers_in,
)

LOWEST, HIGHEST = "\x00lowest", "\x00highest"
"""Behind a key, in merged rows: no key of a run ends so."""

Runs = Mapping[str, Rows]
"""The rows of each run, by its name."""


def numbers_of(rows: Rows) -> dict[str, float]:
    """A run in numbers: its last losses and accuracies, medians of its residuals, and sums of influences by group."""
    found: dict[str, float] = {}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in filter(is_measure, keys):
        found[f"last {key}"] = float([row[key] for row in rows if key in row][-1])
    for key in filter(is_residual, keys):
        found[f"median {key}"] = median(row[key] for row in rows if key in row)

    for section in (KERNEL, REGULARIZATION, OUTSIDE, DIFFERENCE):
        for group in keys_by_group(keys, section):
            key = importance_key(section, group)
            found[f"Σ {key}"] = sum(row.get(key, 0.0) for row in rows)
    for section in (KERNEL, REGULARIZATION):
        for key in keys_by_group(keys, f"{LOSS}/{section}").values():
            found[f"Σ {key}"] = sum(row.get(key, 0.0) for row in rows)
    found["steps"] = float(len(rows))
    return found


def comparison_of(runs: Runs) -> list[dict[str, Any]]:
    """A row for each number: its value in each run, and their mean and deviation; of two runs, their difference.

    Raises ValueError for runs that have no rows.
    """
    _require_rows(runs)
    found = {name: numbers_of([*map(numbers_in, rows)]) for name, rows in runs.items()}
    keys = dict.fromkeys(key for numbers in found.values() for key in numbers)

    table = []
    for key in keys:
        values = {name: numbers.get(key) for name, numbers in found.items()}
        known = [value for value in values.values() if value is not None]
        row: dict[str, Any] = {"number": key, "values": values, "mean": mean(known)}
        row["deviation"] = stdev(known) if len(known) > 1 else None
        if len(runs) == 2:
            row["difference"] = known[1] - known[0] if len(known) == 2 else None
        table.append(row)
    return table


def as_table(comparison: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The comparison as rows, the first with titles."""
    names = list(comparison[0]["values"])
    last = "difference" if "difference" in comparison[0] else "deviation"
    rows = [[row["number"], *row["values"].values(), row["mean"], row[last]] for row in comparison]
    return [["", *names, "mean", last], *rows]


def make_comparison(runs: Runs) -> str:
    """The HTML of several runs: each curve's mean over the runs, with its band; of two runs, their differences too.

    Raises ValueError for runs that have no rows.
    """
    comparison = comparison_of(runs)
    merged = merged_rows(runs)
    sections = sections_of([{key: value for key, value in row.items() if "\x00" not in key} for row in merged])
    banded = [replace(section, figures=[*map(_with_band, section.figures)]) for section in sections]
    if len(runs) == 2:
        banded.append(_differences(runs, sections))

    first, last = merged[0][AXIS], merged[-1][AXIS]
    span = f"{len(runs)} runs, training steps {first} to {last}: {', '.join(runs)}. Lines are means, bands reach from "
    span += "the lowest to the highest run."
    title = " · ".join(runs) if len(runs) < 4 else f"{len(runs)} runs"
    if len(runs) == 2:
        merged = _with_differences(runs, merged)
    return page_of(title, span, merged, banded, totals=spelled_table(as_table(comparison)))


def merged_rows(runs: Runs) -> list[dict[str, Any]]:
    """A row for each step that a run has: of every number the mean over the runs that have it, lowest and highest."""
    values: dict[int, dict[str, list[float]]] = {}
    for rows in runs.values():
        for row in map(numbers_in, rows):
            at_step = values.setdefault(int(row[AXIS]), {})
            for key, value in row.items():
                at_step.setdefault(key, []).append(value)

    merged = []
    for step, at_step in sorted(values.items()):
        whole: dict[str, Any] = {AXIS: step}
        for key, found in at_step.items():
            if key != AXIS:
                whole |= {key: mean(found), key + LOWEST: min(found), key + HIGHEST: max(found)}
        merged.append(whole)
    return merged


def _with_band(figure: Figure) -> Figure:
    curves: dict[str, str] = {}
    for name, key in figure.curves.items():
        curves |= {name: key, f"{name}, lowest": key + LOWEST, f"{name}, highest": key + HIGHEST}
    return replace(figure, curves=curves, stacked=False, banded=True)


def _differences(runs: Runs, sections: Sequence[Section]) -> Section:
    """The second run less the first, at the steps that both have."""
    first, second = runs
    figures = []
    for figure in (figure for section in sections for figure in section.figures):
        curves = {name: f"{key}\x00difference" for name, key in figure.curves.items()}
        figures.append(Figure(f"{figure.title}: {second} − {first}", curves))
    return Section("Differences", f"{second} minus {first}, at the steps that both have.", figures)


def _with_differences(runs: Runs, merged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    one, other = ({int(row[AXIS]): numbers_in(row) for row in rows} for rows in runs.values())
    for row in merged:
        first, second = one.get(row[AXIS], {}), other.get(row[AXIS], {})
        row |= {f"{key}\x00difference": second[key] - first[key] for key in first if key in second and key != AXIS}
    return merged


def _require_rows(runs: Runs) -> None:
    if empty := [name for name, rows in runs.items() if not rows]:
        raise ValueError(f"{', '.join(empty)} has no rows yet: there is nothing to compare")
