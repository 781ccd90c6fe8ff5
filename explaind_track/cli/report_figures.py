"""The figures of a report, by section: which keys of the rows each draws, and how. Needs plotly (`cli`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    LOSS,
    OUTSIDE,
    REGULARIZATION,
    RESIDUAL,
    SECONDS,
    TOTAL,
    importance_key,
    is_measure,
    is_residual,
    keys_by_group,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

Rows = Sequence[Mapping[str, Any]]

EARLY_STEPS = 10
"""An optimizer's first steps move a model by far more than all others do: they do not set the scale."""


@dataclass(frozen=True)
class Figure:
    """Curves over the training step."""

    title: str
    curves: Mapping[str, str]
    """The key of each, by its name in the legend."""
    stacked: bool = False
    log: bool = False


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

    def measures(name: str) -> dict[str, str]:
        return {key: key for key in keys if is_measure(key) and key.endswith(name)}

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
                Figure("changed by something other than the optimizer, by group", groups(OUTSIDE), stacked=True),
                Figure("all groups together", {name: key for name, key in totals.items() if key in keys}),
            ],
        ),
        Section(
            "Relative regularization influence",
            "D of each step: signed kernel minus signed regularization influence.",
            [Figure("D, by group", groups(DIFFERENCE))],
        ),
        Section(
            "Change of the loss",
            "How much each group changed the queries' loss in each step; below zero: it fell.",
            [
                Figure("through the training samples", groups(f"{LOSS}/{KERNEL}")),
                Figure("through weight decay", groups(f"{LOSS}/{REGULARIZATION}")),
                Figure("through changes by something other than the optimizer", groups(f"{LOSS}/{OUTSIDE}")),
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


def draw(figure: Figure, rows: Rows) -> "go.Figure":
    """The figure, drawn from the rows that have its keys."""
    import plotly.graph_objects as go

    drawn = go.Figure()
    width, stack = (0.8, "all") if figure.stacked else (1.4, None)
    for name, key in figure.curves.items():
        steps, values = [row[AXIS] for row in rows if key in row], [row[key] for row in rows if key in row]
        drawn.add_scatter(x=steps, y=values, name=name, mode="lines", line={"width": width}, stackgroup=stack)

    drawn.update_layout(
        title={"text": figure.title, "font": {"size": 14}},
        xaxis_title="training step",
        template="plotly_white",
        hovermode="x unified",
        margin={"l": 50, "r": 10, "t": 40, "b": 40},
        legend={"orientation": "h", "y": -0.2},
    )
    if figure.log:
        drawn.update_yaxes(type="log", dtick=1, exponentformat="power")
    elif heights := _late_heights(figure, rows):
        low, high = min(0.0, *heights), max(heights)
        margin = 0.05 * (high - low)
        drawn.update_yaxes(range=[low - margin, high + margin])
    return drawn


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
