"""Figures of influences. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from explaind_track.core.checks import require_package
from explaind_track.core.colored_text import FELL, INK, ROSE
from explaind_track.core.influence import Influence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

EARLY_STEPS = 10
"""An optimizer's first steps move a model by far more than all others do: they do not set the scale."""


WITHIN = 0.9
"""The share of the groups that lie within the colours of a map."""


def empty_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    require_package("matplotlib", "plots", "a figure")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def training(influence: Influence, accuracy: Mapping[str, Sequence[float]], unit: str) -> "Figure":
    """Draws Fig. 3(a), over the training step: accuracy; importance of the kernel in every group; importance of kernel
    and regularization in total; relative regularization influence D of every group. The first `EARLY_STEPS` may lie off
    the scale.

    influence: kept over step and group. accuracy: "step", and any curves by their name. unit: of the query's outputs.
    """
    figure = empty_figure(11, 6.5)
    axes = figure.subplots(2, 2, sharex=True)

    for name, values in accuracy.items():
        if name != "step":
            axes[0, 0].plot(accuracy["step"], values, label=name)
    _label(axes[0, 0], "accuracy", "fraction correct")

    total = influence.total_importance()
    both = r"$\bar{\Psi}_s(\Theta)$, $\bar{\Psi}^{reg}_s(\Theta)$"
    curves(axes[1, 0], total, "part", "importance of kernel and regularization", f"{both}, {unit}")

    kernel, name = influence.importance().sel(part="kernel"), r"$\bar{\Psi}_s(\Theta_{layer})$"
    curves(axes[0, 1], kernel, "group", "importance of the kernel, by layer", f"{name}, {unit}")

    difference, name = influence.relative_regularization(), r"$D_s(\Theta_{layer})$"
    curves(axes[1, 1], difference, "group", "kernel minus regularization, by layer", f"{name}, {unit}")
    axes[1, 1].axhline(0, color="gray", linewidth=0.5)

    for axis in axes[1]:
        axis.set_xlabel("training step")
    return figure


def sample_map(changes: "np.ndarray[Any, Any]", samples: Sequence[int | str]) -> "Figure":
    """Draws how much training samples changed the loss of single queries, as a heat map of changes (queries,
    samples)."""
    from matplotlib.ticker import MaxNLocator

    names = [str(sample) for sample in samples]
    letters = max(map(len, names), default=0)
    figure = empty_figure(2 + 0.35 * len(samples), 1.5 + 0.3 * len(changes) + 0.07 * letters)
    axis = figure.subplots()
    limit = float(abs(changes).max()) or 1.0
    image = axis.imshow(changes, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_xticks(range(len(samples)), names, rotation=90, fontsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training sample")
    axis.set_ylabel("query")
    figure.colorbar(image, label="change of the query's loss")
    return figure


def cosine_map(cosines: "np.ndarray[Any, Any]") -> "Figure":
    """Draws how alike the training samples' influences on two queries are, as a heat map of cosines (queries,
    queries)."""
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure(2.5 + 0.3 * len(cosines), 1.5 + 0.3 * len(cosines))
    axis = figure.subplots()
    image = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("query")
    axis.set_ylabel("query")
    figure.colorbar(image, label="cosine over the step's samples")
    return figure


def change_maps(tables: "Mapping[str, np.ndarray[Any, Any]]", rows: Sequence[str], columns: Sequence[str]) -> "Figure":
    """Draws changes of losses as heat maps one below the other, by the losses' names: blue where a loss fell, orange
    where it rose, with the numbers. NaN: there is no such group."""
    height = 1.3 + 0.3 * len(rows)
    figure = empty_figure(2.2 + 0.62 * len(columns), height * len(tables))
    for axis, (name, table) in zip(figure.subplots(len(tables), 1, squeeze=False)[:, 0], tables.items(), strict=True):
        # a few groups, such as the head, may do more than all others: they do not set the scale
        sizes = abs(table[np.isfinite(table) & (table != 0)])
        limit = float(np.quantile(sizes, WITHIN, method="lower")) if sizes.size else 1.0
        image = axis.imshow(table, cmap=falling_and_rising(), vmin=-limit, vmax=limit, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_title(f"{name}: change of the loss", fontsize=10)
        for (down, right), value in {place: table[place] for place in np.ndindex(*table.shape)}.items():
            if np.isfinite(value):
                axis.text(right, down, f"{value:.1e}", ha="center", va="center", fontsize=7, color=INK)
        figure.colorbar(image, label="nats", extend="both")
    return figure


def falling_and_rising() -> "LinearSegmentedColormap":
    """The colours of coloured text, from the strongest blue over white to the strongest orange."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("falling and rising", [*FELL[::-1], "#ffffff", *ROSE])


def curves(axis: "Axes", values: xr.DataArray, along: str, title: str, unit: str) -> None:
    """Draws one curve over the steps for each label of the axis `along`."""
    for label in values[along].values:
        one = values.sel({along: label})
        axis.plot(one["step"], one, label=label, linewidth=0.8)
    if values.sizes["step"] > EARLY_STEPS:
        shown = values.isel(step=slice(EARLY_STEPS, None))
        low, high = min(0.0, float(shown.min())), float(shown.max())
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    _label(axis, title, unit)


def _label(axis: "Axes", title: str, unit: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)
