"""Figures. Needs matplotlib (the `recipes` extra)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import xarray as xr

from explaind_track.influence import Influence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def training(influence: Influence, accuracy: Mapping[str, Sequence[float]]) -> "Figure":
    """Fig. 3(a): accuracy; importance of the kernel in every group; importance of kernel and regularization in total;
    relative regularization influence D of every group. All over the training step.

    influence: kept over step and group. accuracy: "step", and any curves by their name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for name, values in accuracy.items():
        if name != "step":
            axes[0, 0].plot(accuracy["step"], values, label=name)
    _label(axes[0, 0], "accuracy", "fraction correct")
    _by_group(axes[0, 1], influence.importance().sel(part="kernel"))
    _label(axes[0, 1], "importance of the kernel, by layer", r"$\bar{\Psi}_s(\Theta_{layer})$")
    for part in ("kernel", "regularization"):
        total = influence.total_importance().sel(part=part)
        axes[1, 0].plot(total["step"], total, label=part, linewidth=0.8)
    _label(
        axes[1, 0], "importance of kernel and regularization", r"$\bar{\Psi}_s(\Theta)$, $\bar{\Psi}^{reg}_s(\Theta)$"
    )
    _by_group(axes[1, 1], influence.relative_regularization())
    axes[1, 1].axhline(0, color="gray", linewidth=0.5)
    _label(axes[1, 1], "kernel minus regularization, by layer", r"$D_s(\Theta_{layer})$")
    for axis in axes[1]:
        axis.set_xlabel("training step")
    return figure


def _by_group(axis: "Axes", values: xr.DataArray) -> None:
    for group in values["group"].values:
        one = values.sel(group=group)
        axis.plot(one["step"], one, label=group, linewidth=0.8)


def _label(axis: "Axes", title: str, unit: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)
