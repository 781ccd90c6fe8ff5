"""The figures of §5: phases, balance, sample × query maps, cosines, and the Lasso's fit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize, SymLogNorm

from explaind_track.analysis import plots
from recipes.grokking_phases import Phases
from recipes.modulo_addition import GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = {"memorisation": "tab:blue", "circuit formation": "tab:red", "cleanup": "tab:gray"}
INPUTS = "a+b (a+b mod p)"


def span(end: int, window: int) -> str:
    """The steps of the window that ends before `end`, as a label."""
    return f"{max(0, end - window)}–{end}"


def draw_phases(phases: Phases) -> "Figure":
    """Fig. 3(a) with the phases marked."""
    figure = plots.training(phases.influence, phases.curve, "nats")
    for axis in figure.axes:
        _mark_phases(axis, phases)
    figure.axes[0].legend(fontsize=8)
    return figure


def draw_balance(phases: Phases) -> "Figure":
    """The importance of the kernel minus that of the regularization, by layer, with the phases marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axis = figure.subplots()
    unit = r"$\bar{\Psi}_s(\Theta_{layer}) - \bar{\Psi}^{reg}_s(\Theta_{layer})$, nats"
    plots.curves(axis, phases.balance(), "group", "importance of the kernel minus that of the regularization", unit)
    _mark_phases(axis, phases)
    axis.axhline(0, color="gray", linewidth=0.5)
    axis.set_xlabel("training step")
    axis.legend().remove()  # it would lie over the curves
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _mark_phases(axis: "Axes", phases: Phases) -> None:
    for name, (start, stop) in phases.spans().items():
        axis.axvspan(start, stop, color=PHASES[name], alpha=0.1, label=name)


def draw_maps(values: Mapping[int, xr.DataArray], window: int, modulus: int) -> "Figure":
    """Fig. 4 and 9: influences (group, query, sample), labelled by their sums a+b, by the end of the window."""
    scale = max(float(abs(matrix).quantile(0.5)) for matrix in values.values())
    limit = max(float(abs(matrix).max()) for matrix in values.values())
    norm = SymLogNorm(linthresh=scale, vmin=-limit, vmax=limit)
    return _matrices(values, window, modulus, norm, r"$\Psi_S(\Theta_{layer}, x_k, x)$, nats")


def draw_cosines(values: Mapping[int, xr.DataArray], window: int, modulus: int) -> "Figure":
    """Fig. 5 and 13: cosines (group, query, query_2), labelled by their sums a+b, by the end of the window."""
    return _matrices(values, window, modulus, Normalize(-1, 1), "cosine over the training samples")


def _matrices(values: Mapping[int, xr.DataArray], window: int, modulus: int, norm: Normalize, unit: str) -> "Figure":
    """A row for each layer and a column for each window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(values) + 1, 2.6 * len(GROUPS)), layout="constrained")
    axes = figure.subplots(len(GROUPS), len(values), squeeze=False)
    for column, (end, matrices) in enumerate(values.items()):
        for row, layer in enumerate(GROUPS):
            axis = axes[row, column]
            image = _matrix(axis, matrices.sel(group=layer), modulus, norm)
            axis.set_title(f"{layer}, steps {span(end, window)}", fontsize=8)

    figure.colorbar(image, ax=axes, label=unit, shrink=0.4)
    figure.supylabel(f"test sample: {INPUTS}", fontsize=9)
    columns = "training" if matrices.dims[-1] == "sample" else "test"
    figure.supxlabel(f"{columns} sample: {INPUTS}", fontsize=9)
    return figure


def _matrix(axis: "Axes", values: xr.DataArray, modulus: int, norm: Normalize) -> Any:
    """Draws values whose rows and columns are labelled by the sums of their inputs."""
    image = axis.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    for ticks, sums, turned in (
        (axis.set_yticks, values[values.dims[0]].values, 0),
        (axis.set_xticks, values[values.dims[1]].values, 45),
    ):
        places = np.linspace(0, len(sums) - 1, 6).round().astype(int)
        ticks(places, [f"{sums[place]} ({sums[place] % modulus})" for place in places], rotation=turned, fontsize=6)
    return image


def draw_lasso(
    similarity: xr.DataArray, fit: Mapping[str, Any], paper: Mapping[int, float], modulus: int, title: str
) -> "Figure":
    """Fig. 12: the similarity, what the fit makes of it, and the fit's coefficients beside the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    predicted = similarity.copy(data=fit["predicted"])
    for axis, values, name in ((left, similarity, title), (middle, predicted, f"Lasso, R² = {fit['r2']:.2f}")):
        image = _matrix(axis, values, modulus, Normalize(-1, 1))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(f"test sample: {INPUTS}")
        axis.set_ylabel(f"test sample: {INPUTS}")
    figure.colorbar(image, ax=[left, middle], label="cosine", shrink=0.7)

    right.bar(list(fit["coefficients"]), list(fit["coefficients"].values()), width=1.0, label="ours")
    right.scatter(list(paper), list(paper.values()), color="black", s=15, label="the paper's", zorder=3)
    right.set_xlabel("period of the cosine, in a+b")
    right.set_ylabel("Lasso coefficient")
    right.legend(fontsize=8)
    right.grid(alpha=0.2)
    return figure
