"""§5: the learning phases of a grokking Transformer, and the cyclic geometry of what its training samples do.

    python -m recipes.grokking_analysis runs=[DIR,…] [key=value …]

`out` receives summary.json, config.yaml, maps.safetensors and figures/: phases.png (Fig. 3(a)), balance.png,
maps.png (Fig. 4, 9, ordered by a + b), maps_by_residue.png (by a + b mod p), cosines.png (Fig. 5, 13), lasso.png
(Fig. 12, Table 2).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import save_file
from torch import Tensor

from explaind_track import Quadrature, Query, explain
from explaind_track.analysis import sample_cosine
from explaind_track.core.tables import table
from recipes.common import Run, configure, output_directory, save_figures, write_json
from recipes.grokking_figures import draw_balance, draw_cosines, draw_lasso, draw_maps, draw_phases, span
from recipes.grokking_phases import CLAIMS, Phases
from recipes.modulo_addition import GROUPS, finished, sample_loss

PERIODS = range(2, 114)
"""In a + b; the paper's."""

PAPER_LASSO = {113: 0.112333, 76: 0.008232, 51: 0.004451, 75: 0.003616, 52: 0.001763}
"""The largest coefficients of Table 2, by period ("frequency" in the paper)."""

Maps = dict[int, xr.DataArray]
"""For each window of steps, by its end: values (group, …), whose other axes are labelled by sums a + b."""


def by_sum(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` samples in the order of a + b: their indices and their sums."""
    sums = x[:count, 0] + x[:count, 2]
    order = sums.argsort(stable=True)
    return order, sums[order]


def by_residue(values: xr.DataArray, modulus: int) -> xr.DataArray:
    """A map in the order of a + b mod p, and of a + b where these are equal."""
    return values.isel({axis: np.argsort(values[axis].values % modulus, kind="stable") for axis in ("query", "sample")})


def influence_map(config: DictConfig, run: Run, end: int) -> xr.DataArray:
    """Ψ_S(Θ_layer, x_k, x), summed over the outputs, of the window S of steps that ends before `end`:
    (group, query, sample), the latter two ordered and labelled by a + b."""
    queries, query_sums = by_sum(run.data.x_test, config.queries)
    samples, sample_sums = by_sum(run.data.x_train, config.samples)

    influence = explain(
        run.trajectory,
        run.model,
        Query.outputs(run.data.x_test[queries]),
        groups=GROUPS,
        keep=("group", "query", "sample"),
        window=(max(0, end - config.window), end),
        quadrature=Quadrature.fixed(1),
        sample_loss=sample_loss,
        data=run.data.training_batch,
        samples=samples.tolist(),
    )
    ordered = influence.data["influence"].sel(sample=samples.numpy()).transpose("group", "query", "sample")
    return ordered.assign_coords(query=query_sums.numpy(), sample=sample_sums.numpy())


def lasso(similarity: xr.DataArray, modulus: int, alpha: float) -> dict[str, Any]:
    """Similarities (X, X), labelled by the sums a + b, as a sparse sum of cosines and sines of the sums' differences.

    `coefficients` by period from 2 to 113 as in the paper; `harmonics` k of the period p, cos(2πkd/p), which make every
    even function of d mod p; `r2` is the share of the sum of squares that a fit explains.
    """
    from sklearn.linear_model import Lasso

    sums = torch.tensor(similarity[similarity.dims[0]].values)
    difference = (sums[:, None] - sums[None]).flatten().double()
    target = similarity.fillna(0).values.flatten().astype(np.float64)

    def fit(angles: Tensor) -> tuple[Any, Any, float]:
        """The cosines' coefficients, the fit's values, and the share that it explains."""
        features = torch.cat([angles.cos(), angles.sin()], dim=1).numpy()
        model = Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000).fit(features, target)
        predicted = model.predict(features)
        left = np.square(target - predicted).sum() / np.square(target).sum()  # there is no intercept
        return model.coef_[: angles.shape[1]], predicted, float(1 - left)

    # cos(2πd / T) for the periods T, as in the paper
    periods = torch.tensor(list(PERIODS))
    coefficients, predicted, score = fit(2 * torch.pi * difference[:, None] / periods)

    # cos(2πkd / p) for the harmonics k of the modulus
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
    """The coefficients that are not 0, the largest first."""
    found = [(label, float(value)) for label, value in pairs if value != 0]
    return dict(sorted(found, key=lambda pair: -abs(pair[1])))


def cyclic_share(rows: xr.DataArray, modulus: int) -> float:
    """The share of the variance of a map (queries, samples), labelled by the sums a + b, that depends on
    (a+b) − (a'+b') mod p alone, once each sample's mean (its global influence) is taken out."""
    centred = rows - rows.mean("query")
    queries, samples = (torch.tensor(rows[axis].values) for axis in ("query", "sample"))
    residue = ((queries[:, None] - samples[None]) % modulus).flatten()
    values = torch.from_numpy(centred.values).flatten().double()

    # each cell's best forecast from its residue: the mean of the cells that share it
    count = torch.bincount(residue, minlength=modulus).clamp(min=1)
    mean = torch.bincount(residue, values, modulus) / count
    return float(mean[residue].square().sum() / values.square().sum().clamp(min=1e-300))


def main(arguments: list[str]) -> None:
    config = configure("grokking_analysis", arguments)
    if OmegaConf.is_missing(config, "runs"):
        sys.exit("say which runs to analyse: python -m recipes.grokking_analysis runs=[DIR,…]")
    directories = [Path(directory) for directory in config.runs]
    recorded, run = finished(str(directories[0]))
    out = output_directory(config, "grokking_analysis")
    modulus = recorded.modulus

    phases = {str(directory): Phases.of_run(directory) for directory in directories}
    claims = [
        {"claim": claim.text, "number": claim.number, "runs": [claim.test(found) for found in phases.values()]}
        for claim in CLAIMS
    ]

    ends = [max(1, round(fraction * len(run.trajectory))) for fraction in config.windows]
    maps = {end: influence_map(config, run, end) for end in ends}
    cosines = {end: sample_cosine(values) for end, values in maps.items()}
    similarity = cosines[ends[-1]].sel(group=config.lasso_layer)
    fit = lasso(similarity, modulus, config.alpha)
    cyclic = [
        {"steps": span(end, config.window)}
        | {group: cyclic_share(values.sel(group=group), modulus) for group in GROUPS}
        for end, values in maps.items()
    ]

    summary = {
        "spans": {directory: found.spans() for directory, found in phases.items()},
        "claims": claims,
        "cyclic_share": cyclic,
        "lasso": {name: value for name, value in fit.items() if name != "predicted"},
        "lasso_paper": PAPER_LASSO,
    }
    write_json(out / "summary.json", summary)
    save_maps(maps, out / "maps.safetensors")
    first = phases[str(directories[0])]
    by_residues = {end: by_residue(values, modulus) for end, values in maps.items()}
    title = f"{config.lasso_layer}, steps {span(ends[-1], config.window)}"
    figures = {
        "phases": draw_phases(first),
        "balance": draw_balance(first),
        "maps": draw_maps(maps, config.window, modulus),
        "maps_by_residue": draw_maps(by_residues, config.window, modulus),
        "cosines": draw_cosines(cosines, config.window, modulus),
        "lasso": draw_lasso(similarity, fit, PAPER_LASSO, modulus, title),
    }
    save_figures(out / "figures", figures)
    report(out, claims, cyclic, fit)


def save_maps(maps: Maps, path: Path) -> None:
    """Writes each map under the end of its window, and the sums that label their axes, the same for all."""
    arrays = {str(end): np.ascontiguousarray(values.values) for end, values in maps.items()}
    any_map = next(iter(maps.values()))
    sums = {f"{axis}_sum": any_map[axis].values for axis in ("query", "sample")}
    save_file(arrays | sums, path)


def report(out: Path, claims: list[dict[str, Any]], cyclic: list[dict[str, Any]], fit: Mapping[str, Any]) -> None:
    """Prints what was found."""
    print()
    for claim in claims:
        values = ", ".join(f"{found['value']:.2f} ({'yes' if found['holds'] else 'no'})" for found in claim["runs"])
        print(f"{claim['claim']}: {values}\n    {claim['number']}")
    print(f"\nshare of the maps' variance that depends on the difference of a+b mod p alone\n{table(cyclic)}")

    largest = [
        {"period": period, "coefficient": value, "paper's period": theirs, "paper's coefficient": PAPER_LASSO[theirs]}
        for (period, value), theirs in zip(fit["coefficients"].items(), PAPER_LASSO, strict=False)
    ]
    print(f"\nLasso on cosines and sines of all periods, R² = {fit['r2']:.2f}")
    print(table(largest) if largest else "no coefficient is left")
    harmonics = dict(list(fit["harmonics"].items())[:5])
    print(f"on the harmonics k of p alone, R² = {fit['harmonics_r2']:.2f}: {harmonics}")
    print(f"{out / 'summary.json'}\n{out / 'figures'}")


if __name__ == "__main__":
    main(sys.argv[1:])
