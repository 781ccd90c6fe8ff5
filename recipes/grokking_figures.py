"""The figures of §5: phases, differences of kernel and regularization, frequencies, maps, cosines, and the Lasso."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from scipy.ndimage import uniform_filter1d

from recipes.grokking_claims import ACCUMULATED, DIFFERENCES, Curve, importance
from recipes.grokking_geometry import embedding_shares, key_frequencies, row_cosines, shares_of_cosines
from recipes.grokking_seed import GROUP_NAMES, Seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.5
"""Of a figure, in inches: a README's column."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

SMOOTHING = 25
"""Steps over which lines are averaged; the raw ones are faint behind them."""

EARLY = 10
"""An optimizer's first steps move a model by far more than all others do: they are not drawn."""

GRID = np.linspace(0, 1, 201)
"""Fractions of a run at which seeds are put together."""

SHOWN = ("att_decoder", "linear2", "decoder")
"""The layers of maps and cosines."""


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple["Figure", np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, np.atleast_2d(figure.subplots(rows, columns, squeeze=False, **options))


def _label(axis: "Axes", title: str, x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.2)


def _legend(figure: "Figure", axis: "Axes", columns: int = 6) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)


def _line(axis: "Axes", values: np.ndarray, place: int, label: str) -> None:
    """A smoothed line over its faint raw one."""
    steps = np.arange(len(values))[EARLY:]
    axis.plot(steps, values[EARLY:], alpha=0.2, linewidth=0.5, color=COLORS[place])
    smooth = uniform_filter1d(values, SMOOTHING, mode="nearest")[EARLY:]
    axis.plot(steps, smooth, label=label, linewidth=1.4, linestyle=LINES[place], color=COLORS[place])


def _band(axis: "Axes", curves: Sequence[np.ndarray], place: int, label: str) -> None:
    """The mean over the seeds and their quartiles, over the fraction of the run; curves: (time,) of each seed."""
    along = []
    for values in curves:
        width = max(1, round(len(values) / 80))
        smooth = uniform_filter1d(values.astype(np.float64), width, mode="nearest")
        along.append(np.interp(GRID, np.linspace(0, 1, len(values)), smooth))
    low, high = np.quantile(along, [0.25, 0.75], axis=0)
    axis.fill_between(GRID, low, high, color=COLORS[place], alpha=0.2, linewidth=0)
    axis.plot(GRID, np.mean(along, 0), color=COLORS[place], linestyle=LINES[place], linewidth=1.4, label=label)


def draw_phases(seeds: Sequence[Seed]) -> "Figure":
    """Fig. 3(a): the first seed by step, its memorisation and circuit formation shaded, and below, all seeds over the
    fraction of their runs."""
    figure, axes = _figure(3, 2, 8.5)
    first = seeds[0]
    total, layers = first.series["total/outputs"], first.series["importance/outputs"][..., 0]

    for place, which in enumerate(("train", "test")):
        axes[0, 0].plot(
            first.series["evaluated"],
            first.series[f"accuracy/{which}"],
            color=COLORS[place],
            linestyle=LINES[place],
            label=which,
        )
    axes[0, 0].legend(fontsize=7, loc="center right")
    _label(axes[0, 0], f"seed {first.number}: accuracy", "step", "fraction correct")

    for place, name in enumerate(("kernel", "regularization")):
        _line(axes[0, 1], total[:, place], place, name)
    axes[0, 1].set_yscale("log")
    axes[0, 1].legend(fontsize=7, loc="lower right")
    _label(axes[0, 1], f"seed {first.number}: importance, all layers", "step", r"$\bar\Psi_s(\Theta)$, nats")

    for place, name in enumerate(GROUP_NAMES):
        _line(axes[1, 0], layers[:, place], place, name)
    axes[1, 0].set_yscale("log")
    _label(axes[1, 0], f"seed {first.number}: importance of the kernel, by layer", "step", "nats")
    _line(axes[1, 1], (total[:, 1] - total[:, 0]) / total.sum(1), 5, "")
    axes[1, 1].axhline(0, color="gray", linewidth=0.6)
    _label(axes[1, 1], f"seed {first.number}: (R − K) / (R + K)", "step", "above 0: regularization dominates")

    for axis in axes[:2].flat:
        for span, shade in ((first.memorisation, "#56B4E9"), (first.formation, "#F0E442")):
            axis.axvspan(*span, color=shade, alpha=0.18, linewidth=0)

    for place, name in enumerate(GROUP_NAMES):
        shares = [_shares_of(seed, importance("outputs"))[:, place] for seed in seeds]
        _band(axes[2, 0], shares, place, name)
    _label(axes[2, 0], f"{_count(seeds)}: share of the kernel's importance", "fraction of the run", "share")
    for place, target in enumerate(("outputs", "loss", "margin")):
        balance = []
        for seed in seeds:
            kernel, decay = seed.series[f"total/{target}"].T
            balance.append(((decay - kernel) / (decay + kernel))[EARLY:])
        _band(axes[2, 1], balance, place, target)
    axes[2, 1].axhline(0, color="gray", linewidth=0.6)
    axes[2, 1].legend(fontsize=7)
    _label(axes[2, 1], f"{_count(seeds)}: (R − K) / (R + K)", "fraction of the run")
    _legend(figure, axes[1, 0])
    return figure


def _count(seeds: Sequence[Seed]) -> str:
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def _shares_of(seed: Seed, curve: Curve) -> np.ndarray:
    """A curve of each layer over the sum of their sizes, (time, group), without the first steps."""
    values = curve.values(seed)
    if curve.unit == "step":
        values = uniform_filter1d(values[EARLY:], SMOOTHING, axis=0, mode="nearest")
    shares: np.ndarray = values / np.maximum(np.abs(values).sum(1, keepdims=True), 1e-300)
    return shares


def draw_differences(seeds: Sequence[Seed]) -> "Figure":
    """What is drawn under the names Ψ̄_s(Θ_layer) and D in the paper, by each definition: shares of the layers."""
    figure, axes = _figure(3, 2, 8.0, sharex=True)
    for axis, curve in zip(axes.flat, (importance("outputs"), ACCUMULATED, *DIFFERENCES), strict=True):
        for place, name in enumerate(GROUP_NAMES):
            _band(axis, [_shares_of(seed, curve)[:, place] for seed in seeds], place, name)
        axis.axhline(0, color="gray", linewidth=0.6)
        _label(axis, _in_mathtext(curve.name), "", "share of the layers' sizes")
    for axis in axes[-1]:
        axis.set_xlabel("fraction of the run", fontsize=8)
    _legend(figure, axes[0, 0])
    return figure


def _in_mathtext(name: str) -> str:
    for plain, set_ in (("Ψ̄^reg", r"$\bar\Psi^{reg}$"), ("Ψ̄", r"$\bar\Psi$"), ("Ψ^reg", r"$\Psi^{reg}$")):
        name = name.replace(plain, set_)
    return name


def draw_frequencies(seed: Seed) -> "Figure":
    """The harmonics that each layer's similarity has, over the training, and the embedding's key frequencies."""
    figure, axes = _figure(2, 4, 5.2)
    shares, ends = shares_of_cosines(seed), seed.window_ends
    largest = max(float(shares.max()), 1e-3)
    for axis, group in zip(axes.flat, range(len(GROUP_NAMES)), strict=False):
        image = axis.pcolormesh(
            ends,
            np.arange(1, shares.shape[2] + 1),
            np.clip(shares[:, group].T, 1e-3, None),
            norm=LogNorm(1e-3, largest),
            cmap="viridis",
        )
        _label(axis, GROUP_NAMES[group], "step", "harmonic k" if axis in axes[:, 0] else "")
        _mark(axis, seed)
    figure.colorbar(image, ax=axes[:, :3], label="share of the similarity's variance", shrink=0.6, location="bottom")

    embedding, keys = embedding_shares(seed), sorted(key_frequencies(seed))
    for place, key in enumerate(keys):
        axes[1, 2].plot(ends, embedding[:, key - 1], color=COLORS[place], linestyle=LINES[place], label=f"k={key}")
    axes[1, 2].legend(fontsize=6)
    _label(axes[1, 2], "embedding: Fourier norm", "step", "share")
    axes[1, 3].bar(np.arange(1, embedding.shape[1] + 1), embedding[-1], color=COLORS[0])
    _label(axes[1, 3], "… at the end", "frequency k", "share")
    return figure


def _mark(axis: "Axes", seed: Seed) -> None:
    """Lines where the training set is memorised, and where the test set is right."""
    for step, style in ((seed.memorisation[1], ":"), (seed.generalised, "--")):
        axis.axvline(step, color="white", linestyle=style, linewidth=1)


def _by_residue(sums: np.ndarray, modulus: int) -> np.ndarray:
    order: np.ndarray = np.lexsort((sums, sums % modulus))
    return order


def _matrices(
    panels: Sequence[tuple[str, np.ndarray]], columns: int, norm: Normalize, unit: str, x: str, y: str
) -> "Figure":
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, 1.9 * rows + 0.8)
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        image = axis.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, label=unit, shrink=0.5)
    figure.supxlabel(x, fontsize=8)
    figure.supylabel(y, fontsize=8)
    return figure


def draw_maps(seed: Seed, window: int) -> "Figure":
    """Fig. 4 and 9: influences of training samples on test samples, by a + b mod p, layer and window."""
    values = seed.series["maps"]
    rows, columns = (_by_residue(seed.series[f"map_{axis}_sums"], seed.modulus) for axis in ("query", "sample"))
    panels = [
        (f"{layer}, {max(0, end - window)}–{end}", values[place, GROUP_NAMES.index(layer)][np.ix_(rows, columns)])
        for layer in SHOWN
        for place, end in enumerate(seed.series["map_ends"])
    ]
    limit = float(max(np.abs(matrix).max() for _, matrix in panels))
    norm = SymLogNorm(linthresh=max(float(np.median(np.abs(values))), 1e-12), vmin=-limit, vmax=limit)
    order = "in the order of a + b mod p"
    return _matrices(
        panels,
        len(values),
        norm,
        r"$\Psi_S(\Theta_{layer}, x_k, x)$, nats",
        f"training samples, {order}",
        f"test samples, {order}",
    )


def draw_cosines(seed: Seed, window: int) -> "Figure":
    """Fig. 5 and 13: how alike test samples are, by the authors' definition and over the training samples, in the order
    of a + b mod p, in the third window and the last."""
    places = (-2, -1)
    ends = seed.series["map_ends"]
    rows, order = (
        _by_residue(seed.series["map_query_sums"], seed.modulus),
        _by_residue(seed.series["cosine_sums"], seed.modulus),
    )
    panels = []
    for layer in SHOWN:
        group = GROUP_NAMES.index(layer)
        for place in places:
            near = int(np.argmin(np.abs(seed.window_ends - ends[place])))
            over_parameters = seed.series["cosines/parameters"][near, group]
            over_samples = row_cosines(seed.series["maps"][place, group])
            span = f"{max(0, ends[place] - window)}–{ends[place]}"
            panels.append((f"{layer}, {span}\nover parameters", over_parameters[np.ix_(order, order)]))
            panels.append((f"{layer}, {span}\nover samples", over_samples[np.ix_(rows, rows)]))
    label = "test samples, in the order of a + b mod p"
    return _matrices(panels, 4, Normalize(-1, 1), "cosine", label, label)


def draw_lasso(seed: Seed, fit: dict[str, Any], paper: dict[int, float], layer: str) -> "Figure":
    """Fig. 12: the similarity, the fit, and its largest coefficients with intervals over samples; dots: the paper's."""
    figure, axes = _figure(1, 4, 2.6, width_ratios=[1, 1, 1.2, 1.2])
    order = np.argsort(seed.series["cosine_sums"], kind="stable")
    similarity = seed.series["cosines/parameters"][-1, GROUP_NAMES.index(layer)]
    for axis, values, title in (
        (axes[0, 0], similarity, f"{layer}, last window"),
        (axes[0, 1], fit["predicted"], f"Lasso, R² = {fit['periods']['r2']:.2f}"),
    ):
        axis.imshow(values[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("test samples, by a + b", fontsize=7)

    for axis, name, label in ((axes[0, 2], "periods", "period"), (axes[0, 3], "harmonics", "harmonic k of p")):
        _bars(axis, fit[name]["rows"])
        _label(axis, f"{label}, R² = {fit[name]['r2']:.2f}", label, "coefficient")
    places = {row["label"]: place for place, row in enumerate(fit["periods"]["rows"])}
    for period, value in paper.items():
        if period in places:
            axes[0, 2].scatter(places[period], value, color="black", s=14, zorder=3)
    return figure


def _bars(axis: "Axes", rows: list[dict[str, Any]]) -> None:
    values = np.array([row["coefficient"] for row in rows])
    ends = np.array([[row["low"], row["high"]] for row in rows]).reshape(-1, 2)
    errors = np.abs(ends - values[:, None]).T
    axis.bar(range(len(rows)), values, color=COLORS[0], yerr=errors, capsize=2, error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(rows)), [str(row["label"]) for row in rows], rotation=60)
