"""Figures of a run's checkpoints: which part of the model learned when (Fig. 6, 14, 15). Needs matplotlib.

All take *changes of the loss*, −Ψ, so that below zero is learning, over (part, step, group). With an axis `seed` beside
them, lines are means over the seeds, and bands reach from the least to the largest.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
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

DEPTH_MAP, MAPS = "viridis", ("Blues", "Oranges", "Purples")
"""Colours of layers, and of families of types in the order in which they come."""

ALONE = ("tab:green", "tab:gray", "tab:red", "tab:pink", "tab:olive")
"""Colours of what is alone: embedding, norm, head."""

WIDE = 30
"""Steps that span more than this factor are drawn on a logarithmic axis: checkpoints are dense early."""


def draw_part(changes: Mapping[str, xr.DataArray], part: str, depth: str | None = "layer", note: str = "") -> "Figure":
    """Draws what a part of the steps did to the loss: signed above, absolute below; lines, and a heat map by depth.

    Args:
        changes: (part, step, group[, seed]) of each grouping, by its name.
        part: "kernel" (Fig. 6), "regularization" (Fig. 14) or "past" (Fig. 15).
        depth: The grouping whose groups have an order, and get a heat map; None, or one that is not there: none does.
        note: Added to the title.
    """
    shown = {name: values.sel(part=part) for name, values in changes.items()}
    has_map = depth in shown
    figure = empty_figure(5.2 * (len(shown) + has_map), 8)
    axes = figure.subplots(2, len(shown) + has_map, squeeze=False)
    figure.suptitle(
        f"Change of the unseen loss through {TITLES.get(part, part)}, in one step from each checkpoint{note}"
    )

    for column, (name, values) in enumerate(shown.items()):
        _lines(axes[0, column], values, f"by {name}, signed (below 0: the loss falls)")
        _lines(axes[1, column], abs(values), f"by {name}, absolute", signed=False)
    if depth is not None and has_map:
        _heat_map(axes[0, -1], shown[depth], f"by {depth}, signed")
        _heat_map(axes[1, -1], abs(shown[depth]), f"by {depth}, absolute", signed=False)
    return figure


def draw_sources(changes: xr.DataArray) -> "Figure":
    """Draws what the batch's sequences of each source did to the loss: all groups together, then by group.

    changes: (source, step, group).
    """
    sources = changes["source"].values
    figure = empty_figure(5.2 * (1 + len(sources)), 4)
    axes = figure.subplots(1, 1 + len(sources), squeeze=False)[0]
    _lines(axes[0], changes.sum("group").rename(source="group"), "change of the unseen loss, by source of the batch")
    for axis, source in zip(axes[1:], sources, strict=True):
        _lines(axis, changes.sel(source=source), f"through sequences of {source}")
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


def _lines(axis: "Axes", values: xr.DataArray, title: str, signed: bool = True) -> None:
    """A line over the steps for each group, and a legend beside them; absolute values over a logarithmic axis."""
    steps = values["step"].values
    for group, (color, style) in _looks([str(group) for group in values["group"].values]).items():
        one = values.sel(group=group)
        mean = one.mean("seed") if "seed" in one.dims else one
        axis.plot(steps, mean.values, style, label=group, color=color, linewidth=1.3, marker=".", markersize=3)
        if "seed" in one.dims:
            low, high = one.min("seed").values, one.max("seed").values
            axis.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)

    if signed:
        axis.axhline(0, color="black", linewidth=0.6)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axis.set_yscale("log")
    _finish(axis, title, steps)


def _looks(groups: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """A colour and a style for each group: shades of one colour for a family such as `attention.q`, `attention.k`; from
    dark to light by depth for layers; dashed for what is alone."""
    from matplotlib import colormaps

    families: dict[str, list[str]] = {}
    for group in groups:
        families.setdefault(group.partition(".")[0] if "." in group else "", []).append(group)

    alone = families.pop("", [])
    looks: dict[str, tuple[Any, str]] = {
        group: (color, "--") for group, color in zip(alone, cycle(ALONE), strict=False)
    }
    maps = iter(MAPS)
    for members in families.values():
        palette = colormaps[DEPTH_MAP if members[0].rpartition(".")[2].isdecimal() else next(maps, MAPS[-1])]
        shades = (
            np.linspace(0.0, 0.9, len(members)) if palette.name == DEPTH_MAP else np.linspace(0.95, 0.45, len(members))
        )
        looks |= {group: (palette(shade), "-") for group, shade in zip(members, shades, strict=True)}
    return {group: looks[group] for group in groups}


def _heat_map(axis: "Axes", values: xr.DataArray, title: str, signed: bool = True) -> None:
    """Groups from bottom to top, a column for each checkpoint. Colours end where all but the largest tenth do; those of
    absolute values are logarithmic."""
    from matplotlib.colors import LogNorm, Normalize

    mean = values.mean("seed") if "seed" in values.dims else values
    cells = mean.transpose("group", "step").values
    limit = float(np.quantile(abs(cells), 0.9)) or 1.0
    if signed:
        colors, scale = "RdBu_r", Normalize(-limit, limit)
    else:
        colors, scale = "magma", LogNorm(max(float(np.quantile(cells, 0.05)), limit / 1e4), float(cells.max()) or 1.0)

    image = axis.imshow(cells, aspect="auto", origin="lower", interpolation="nearest", cmap=colors, norm=scale)
    axis.set_yticks(range(len(cells)), [str(group) for group in mean["group"].values], fontsize=7)
    every = -(-len(mean["step"]) // 12)
    axis.set_xticks(range(0, len(mean["step"]), every), mean["step"].values[::every], fontsize=8)
    axis.set_xlabel("training step")
    axis.set_title(title, fontsize=10)
    axis.figure.colorbar(image, ax=axis, label="change of the loss", extend="both" if signed else "min")


def _finish(axis: "Axes", title: str, steps: Any) -> None:
    positive = [step for step in steps if step > 0]
    if positive and max(positive) > WIDE * min(positive):
        axis.set_xscale("symlog" if min(steps) <= 0 else "log")
    axis.set_xlabel("training step")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.2)
