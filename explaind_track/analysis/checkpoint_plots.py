"""Figures of a run's checkpoints: which part of the model learned when (Fig. 6, 14, 15). Needs matplotlib.

All take *changes of the loss*, −Ψ, so that below zero is learning, over (part, step, group). With an axis `seed` beside
them, lines are means over the seeds, and bands reach from the least to the largest.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from explaind_track.analysis.plots import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "kernel": "the batch",
    "past": "the first moment",
    "regularization": "weight decay",
}
"""The parts of a step in words."""

WIDE = 30
"""Steps that span more than this factor are drawn on a logarithmic axis: checkpoints are dense early."""


def draw_part(changes: Mapping[str, xr.DataArray], part: str, depth: str | None = "layer") -> "Figure":
    """Draws what a part of the steps did to the loss: signed above, absolute below; lines, and a heat map by depth.

    Args:
        changes: (part, step, group[, seed]) of each grouping, by its name.
        part: "kernel" (Fig. 6), "regularization" (Fig. 14) or "past" (Fig. 15).
        depth: The grouping whose groups have an order, and get a heat map; None, or one that is not there: none does.
    """
    shown = {name: values.sel(part=part) for name, values in changes.items()}
    has_map = depth in shown
    figure = empty_figure(5.2 * (len(shown) + has_map), 8)
    axes = figure.subplots(2, len(shown) + has_map, squeeze=False)
    figure.suptitle(f"Change of the unseen loss through {TITLES.get(part, part)}, in one step from each checkpoint")

    for column, (name, values) in enumerate(shown.items()):
        _lines(axes[0, column], values, f"by {name}, signed (below 0: the loss falls)", ordered=name == depth)
        _lines(axes[1, column], abs(values), f"by {name}, absolute", ordered=name == depth)
        axes[1, column].set_yscale("log")
    if depth is not None and has_map:
        _heat_map(axes[0, -1], shown[depth], f"by {depth}, signed")
        _heat_map(axes[1, -1], abs(shown[depth]), f"by {depth}, absolute")
    return figure


def draw_losses(rows: Sequence[Mapping[str, Any]], changes: xr.DataArray) -> "Figure":
    """Draws the unseen loss at each checkpoint, what each part of a step does to it, and how exact the split is.

    Args:
        rows: A checkpoint each, with `step`, `loss_before`, `change` and `residual` (signed, as `change`).
        changes: (part, step, group[, seed]) of any grouping.
    """
    figure = empty_figure(15, 4)
    loss, parts, exact = figure.subplots(1, 3)
    steps = [row["step"] for row in rows]

    loss.plot(steps, [row["loss_before"] for row in rows], marker=".", color="black")
    _finish(loss, "unseen loss at the checkpoint", steps)

    totals = changes.sum("group").rename(part="group")
    names = [TITLES.get(str(name), str(name)) for name in totals["group"].values]
    _lines(parts, totals.assign_coords(group=names), "its change in one step, by part")

    for key, label in (("change", "change of the loss"), ("residual", "what the sum misses of it")):
        exact.plot(steps, [abs(row[key]) for row in rows], marker=".", label=label)
    exact.set_yscale("log")
    exact.legend(fontsize=8)
    _finish(exact, "how exact the split is", steps)
    return figure


def _lines(axis: "Axes", values: xr.DataArray, title: str, ordered: bool = False) -> None:
    """A line over the steps for each group; groups with an order are coloured by it."""
    from matplotlib import colormaps

    groups, steps = values["group"].values, values["step"].values
    palette = colormaps["viridis" if ordered else "tab10"]
    for number, group in enumerate(groups):
        one = values.sel(group=group)
        color = palette(number / max(1, len(groups) - 1)) if ordered else palette(number % 10)
        style = "-" if ordered or number < 10 else "--"
        mean = one.mean("seed") if "seed" in one.dims else one
        axis.plot(steps, mean.values, style, label=str(group), color=color, linewidth=1.3, marker=".", markersize=3)
        if "seed" in one.dims:
            axis.fill_between(
                steps, one.min("seed").values, one.max("seed").values, color=color, alpha=0.12, linewidth=0
            )
    axis.axhline(0, color="gray", linewidth=0.6)
    axis.legend(fontsize=7, ncols=2 if len(groups) > 6 else 1)
    _finish(axis, title, steps)


def _heat_map(axis: "Axes", values: xr.DataArray, title: str) -> None:
    """Groups from bottom to top, a column for each checkpoint. The colours end where all but the largest 2% do."""
    mean = values.mean("seed") if "seed" in values.dims else values
    cells = mean.transpose("group", "step").values
    signed = bool((cells < 0).any())
    limit = float(np.quantile(abs(cells), 0.98)) or 1.0

    colors: dict[str, Any] = (
        {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "magma", "vmin": 0, "vmax": limit}
    )
    image = axis.imshow(cells, aspect="auto", origin="lower", interpolation="nearest", **colors)
    axis.set_yticks(range(len(cells)), [str(group) for group in mean["group"].values], fontsize=7)
    every = -(-len(mean["step"]) // 12)
    axis.set_xticks(range(0, len(mean["step"]), every), mean["step"].values[::every], fontsize=8)
    axis.set_xlabel("training step")
    axis.set_title(title, fontsize=10)
    axis.figure.colorbar(image, ax=axis, label="change of the loss", extend="both" if signed else "max")


def _finish(axis: "Axes", title: str, steps: Any) -> None:
    positive = [step for step in steps if step > 0]
    if positive and max(positive) > WIDE * min(positive):
        axis.set_xscale("symlog" if min(steps) <= 0 else "log")
    axis.set_xlabel("training step")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.2)
