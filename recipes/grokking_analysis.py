"""§5: the learning phases of a grokking Transformer, and the cyclic geometry of what its training samples do.

    python -m recipes.grokking_analysis runs=[DIR,…] [key=value …]

`out` receives summary.json, config.yaml, maps.safetensors and figures/: phases.png (Fig. 3(a)), balance.png,
maps.png (Fig. 4, 9), cosines.png (Fig. 5, 13), lasso.png (Fig. 12, Table 2).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from matplotlib.colors import Normalize, SymLogNorm
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import save_file
from torch import Tensor

from explaind_track import Quadrature, Query, Trajectory, explain, plots, sample_cosine
from recipes.common import configure, output_directory, save_figures, table, write_json
from recipes.data import Split
from recipes.grokking_phases import CLAIMS, Phases
from recipes.modulo_addition import GROUPS, finished, sample_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERIODS = range(2, 114)
PAPER_LASSO = {113: 0.112333, 76: 0.008232, 51: 0.004451, 75: 0.003616, 52: 0.001763}
"""The largest coefficients of Table 2, by period ("frequency" in the paper)."""


def by_sum(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` samples in the order of a + b: their indices and their sums."""
    sums = x[:count, 0] + x[:count, 2]
    order = sums.argsort(stable=True)
    return order, sums[order]


def maps(config: DictConfig, trajectory: Trajectory, model: torch.nn.Module, data: Split, end: int) -> xr.DataArray:
    """Ψ_S(Θ_layer, x_k, x), summed over the outputs, of the window S of steps that ends before `end`:
    (group, query, sample), the latter two ordered by a + b."""
    queries, _ = by_sum(data.x_test, config.queries)
    samples, _ = by_sum(data.x_train, config.samples)
    influence = explain(
        trajectory,
        model,
        Query.outputs(data.x_test[queries]),
        groups=GROUPS,
        keep=("group", "query", "sample"),
        window=(max(0, end - config.window), end),
        quadrature=Quadrature.fixed(1),
        sample_loss=sample_loss,
        data=lambda index: (data.x_train[index], data.y_train[index]),
        samples=samples.tolist(),
    )
    return influence.data["influence"].sel(sample=samples.numpy()).transpose("group", "query", "sample")


def lasso(similarity: xr.DataArray, sums: Tensor, modulus: int, alpha: float) -> dict[str, Any]:
    """Similarities (X, X) as a sparse sum of cosines and sines of the differences of the sums a + b.

    `coefficients` by period from 2 to 113 as in the paper; `harmonics` k of the period p, cos(2πkd/p), which make every
    even function of d mod p; `r2` is the share of the sum of squares that a fit explains.
    """
    from sklearn.linear_model import Lasso

    difference = (sums[:, None] - sums[None]).flatten().double()
    target = similarity.fillna(0).values.flatten().astype(np.float64)

    def fit(angles: Tensor) -> tuple[Any, Any, float]:
        features = torch.cat([angles.cos(), angles.sin()], dim=1).numpy()
        model = Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000).fit(features, target)
        predicted = model.predict(features)
        left = np.square(target - predicted).sum() / np.square(target).sum()  # there is no intercept
        return model.coef_[: angles.shape[1]], predicted, float(1 - left)

    periods = torch.tensor(list(PERIODS))
    coefficients, predicted, score = fit(2 * torch.pi * difference[:, None] / periods)
    multiples = torch.arange(modulus // 2 + 1)
    harmonics, _, harmonic_score = fit(2 * torch.pi * difference[:, None] * multiples / modulus)
    return {
        "coefficients": _largest(zip(periods.tolist(), coefficients, strict=True)),
        "r2": score,
        "harmonics": _largest(zip(multiples.tolist(), harmonics, strict=True)),
        "harmonics_r2": harmonic_score,
        "predicted": predicted.reshape(similarity.shape),
    }


def _largest(pairs: Any) -> dict[int, float]:
    found = [(label, float(value)) for label, value in pairs if value != 0]
    return dict(sorted(found, key=lambda pair: -abs(pair[1])))


def cyclic_share(rows: xr.DataArray, query_sums: Tensor, sample_sums: Tensor, modulus: int) -> float:
    """How much of a map (queries, samples) depends on (a+b) − (a'+b') mod p alone: the share of its variance, once
    each sample's mean (its global influence) is taken out."""
    centred = rows - rows.mean("query")
    residue = ((query_sums[:, None] - sample_sums[None]) % modulus).flatten()
    values = torch.from_numpy(centred.values).flatten().double()
    count = torch.bincount(residue, minlength=modulus).clamp(min=1)
    mean = torch.bincount(residue, values, modulus) / count
    return float((mean[residue].square().sum()) / values.square().sum().clamp(min=1e-300))


def draw_phases(phases: Phases) -> "Figure":
    """Fig. 3(a) with the phases marked."""
    figure = plots.training(phases.influence, phases.curve)
    for axis in figure.axes:
        _mark_phases(axis, phases, labelled=axis is figure.axes[0])
    return figure


def draw_balance(phases: Phases) -> "Figure":
    """Which of kernel and regularization is the larger in each layer, with the phases marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    unit = r"$\bar{\Psi}_s(\Theta_{layer}) - \bar{\Psi}^{reg}_s(\Theta_{layer})$"
    plots.curves(axis, phases.balance(), "group", "importance of the kernel minus that of the regularization", unit)
    _mark_phases(axis, phases, labelled=True)
    axis.axhline(0, color="gray", linewidth=0.5)
    axis.set_xlabel("training step")
    return figure


def _mark_phases(axis: "Axes", phases: Phases, labelled: bool) -> None:
    colors = {"memorisation": "tab:blue", "circuit formation": "tab:red", "cleanup": "tab:gray"}
    for name, (start, stop) in phases.spans().items():
        axis.axvspan(start, stop, color=colors[name], alpha=0.1, label=name if labelled else None)
    axis.legend(fontsize=8)


def _ticks(axis: "Axes", sums: Tensor, modulus: int, along: str) -> None:
    places = np.linspace(0, len(sums) - 1, 6).round().astype(int)
    labels = [f"{int(sums[place])} ({int(sums[place]) % modulus})" for place in places]
    if along == "x":
        axis.set_xticks(places, labels, rotation=45, fontsize=6)
    else:
        axis.set_yticks(places, labels, fontsize=6)


def draw_matrices(
    values: Mapping[int, xr.DataArray],
    window: int,
    axes_sums: tuple[Tensor, Tensor],
    modulus: int,
    norm: Any,
    what: str,
) -> "Figure":
    """A row for each layer and a column for each window: (group, rows, columns) by the window's end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(values) + 1, 2.6 * len(GROUPS)), layout="constrained")
    axes = figure.subplots(len(GROUPS), len(values), squeeze=False)
    for column, (end, matrices) in enumerate(values.items()):
        for row, layer in enumerate(GROUPS):
            axis = axes[row, column]
            image = axis.imshow(
                matrices.sel(group=layer), cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest"
            )
            axis.set_title(f"{layer}, steps {max(0, end - window)}–{end}", fontsize=8)
            _ticks(axis, axes_sums[1], modulus, "x")
            _ticks(axis, axes_sums[0], modulus, "y")
    figure.colorbar(image, ax=axes, label=what, shrink=0.4)
    figure.supylabel("test sample: a+b (a+b mod p)", fontsize=9)
    columns = "training" if matrices.dims[-1] == "sample" else "test"
    figure.supxlabel(f"{columns} sample: a+b (a+b mod p)", fontsize=9)
    return figure


def draw_lasso(similarity: xr.DataArray, fit: Mapping[str, Any], sums: Tensor, modulus: int, title: str) -> "Figure":
    """Fig. 12: the similarity, what the fit makes of it, and the fit's coefficients beside the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, values, name in ((left, similarity, title), (middle, fit["predicted"], f"Lasso, R² = {fit['r2']:.2f}")):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        _ticks(axis, sums, modulus, "x")
        _ticks(axis, sums, modulus, "y")
        axis.set_xlabel("test sample: a+b (a+b mod p)")
    figure.colorbar(image, ax=[left, middle], label="cosine", shrink=0.7)
    right.bar(list(fit["coefficients"]), list(fit["coefficients"].values()), width=1.0, label="ours")
    right.scatter(list(PAPER_LASSO), list(PAPER_LASSO.values()), color="black", s=15, label="the paper's", zorder=3)
    right.set_xlabel("period of the cosine, in a+b")
    right.set_ylabel("Lasso coefficient")
    right.legend(fontsize=8)
    right.grid(alpha=0.2)
    return figure


def main(arguments: list[str]) -> None:
    config = configure("grokking_analysis", arguments)
    if OmegaConf.is_missing(config, "runs"):
        sys.exit("say which runs to analyse: python -m recipes.grokking_analysis runs=[DIR,…]")
    runs = [Path(run) for run in config.runs]
    recorded, model, data, trajectory = finished(str(runs[0]))
    out = output_directory(config.out, "grokking_analysis")
    OmegaConf.save(config, out / "config.yaml")

    phases = {str(run): Phases.of_run(run) for run in runs}
    claims = [
        {"claim": claim.text, "number": claim.number, "runs": [claim.test(one) for one in phases.values()]}
        for claim in CLAIMS
    ]
    modulus = recorded.modulus
    query_sums, sample_sums = by_sum(data.x_test, config.queries)[1], by_sum(data.x_train, config.samples)[1]
    ends = [max(1, round(fraction * len(trajectory))) for fraction in config.windows]
    shown = {end: maps(config, trajectory, model, data, end) for end in ends}
    alike = {end: sample_cosine(values) for end, values in shown.items()}
    similarity = alike[ends[-1]].sel(group=config.lasso_layer)
    fit = lasso(similarity, query_sums, modulus, config.alpha)

    cyclic = [
        {"steps": f"{max(0, end - config.window)}–{end}"}
        | {name: cyclic_share(values.sel(group=name), query_sums, sample_sums, modulus) for name in GROUPS}
        for end, values in shown.items()
    ]
    summary = {
        "spans": {run: one.spans() for run, one in phases.items()},
        "claims": claims,
        "cyclic_share": cyclic,
        "lasso": {name: value for name, value in fit.items() if name != "predicted"},
        "lasso_paper": PAPER_LASSO,
    }
    write_json(out / "summary.json", summary)
    save_file(
        {f"{end}": np.ascontiguousarray(values.values) for end, values in shown.items()}, out / "maps.safetensors"
    )
    scale = max(float(abs(values).quantile(0.5)) for values in shown.values())
    limit = max(float(abs(values).max()) for values in shown.values())
    log = SymLogNorm(linthresh=scale, vmin=-limit, vmax=limit)
    title = f"{config.lasso_layer}, steps {max(0, ends[-1] - config.window)}–{ends[-1]}"
    save_figures(
        out / "figures",
        {
            "phases": draw_phases(phases[str(runs[0])]),
            "balance": draw_balance(phases[str(runs[0])]),
            "maps": draw_matrices(
                shown, config.window, (query_sums, sample_sums), modulus, log, r"$\Psi_S(\Theta_{layer}, x_k, x)$"
            ),
            "cosines": draw_matrices(
                alike,
                config.window,
                (query_sums, query_sums),
                modulus,
                Normalize(-1, 1),
                "cosine over the training samples",
            ),
            "lasso": draw_lasso(similarity, fit, query_sums, modulus, title),
        },
    )
    report(out, claims, cyclic, fit)


def report(out: Path, claims: list[dict[str, Any]], cyclic: list[dict[str, Any]], fit: Mapping[str, Any]) -> None:
    print()
    for claim in claims:
        values = ", ".join(f"{one['value']:.2f} ({'yes' if one['holds'] else 'no'})" for one in claim["runs"])
        print(f"{claim['claim']}: {values}\n    {claim['number']}")
    print(f"\nshare of the maps' variance that depends on the difference of a+b mod p alone\n{table(cyclic)}")
    top = [
        {"period": period, "coefficient": value, "paper's period": theirs, "paper's coefficient": PAPER_LASSO[theirs]}
        for (period, value), theirs in zip(fit["coefficients"].items(), PAPER_LASSO, strict=False)
    ]
    print(f"\nLasso on cosines and sines of all periods, R² = {fit['r2']:.2f}")
    print(table(top) if top else "no coefficient is left")
    harmonics = dict(list(fit["harmonics"].items())[:5])
    print(f"on the harmonics k of p alone, R² = {fit['harmonics_r2']:.2f}: {harmonics}")
    print(f"{out / 'summary.json'}\n{out / 'figures'}")


if __name__ == "__main__":
    main(sys.argv[1:])
