"""§5: unselected seeds of the main job, trained and explained, and each claim of the paper about them tested.

    python -m recipes.grokking_analysis [seeds=10] [key=value …]

`out` receives seeds/ (a small file for each seed that is done; records only until then), claims.md, summary.json,
config.yaml and figures/. A call that was interrupted goes on when it is made again with the same `out`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from explaind_track.core.tables import table
from recipes.block_statistics import Evidence, Series, holm, of_numbers, of_series
from recipes.common import configure, output_directory, save_figures, write_json
from recipes.grokking_claims import all_claims
from recipes.grokking_figures import (
    draw_cosines,
    draw_differences,
    draw_frequencies,
    draw_lasso,
    draw_maps,
    draw_phases,
)
from recipes.grokking_geometry import (
    PERIODS,
    embedding_shares,
    harmonic_angles,
    key_frequencies,
    lasso,
    lasso_intervals,
    period_angles,
)
from recipes.grokking_seed import GROUP_NAMES, Claim, Seed
from recipes.grokking_summary import maps_of, series_of

OF_THE_ANALYSIS = ("seeds", "lasso_layer", "alpha", "draws")
"""Settings that no seed's file depends on: these may change from call to call."""

PAPER_LASSO = {113: 0.112333, 76: 0.008232, 51: 0.004451, 75: 0.003616, 52: 0.001763}
"""The largest coefficients of Table 2, by period ("frequency" in the paper)."""


def obtain(config: DictConfig, directory: Path) -> list[Seed]:
    """Every seed: from its file, or trained and explained now. All series come first, then the maps, so that a call
    that is ended early leaves as many seeds as can be."""
    numbers = range(1, config.seeds + 1)
    found = {number: series_of(config, number, directory) for number in numbers}
    if config.map_samples:
        for number in numbers:
            found[number] |= maps_of(config, number, directory)
    return [Seed(number, series, config.window, config.modulus) for number, series in found.items()]


def evidence_for(claim: Claim, seeds: list[Seed], draws: int) -> tuple[Evidence, list[int]] | None:
    """What the seeds say of a claim, and which do; None if none does."""
    found = [(seed.number, value) for seed in seeds if (value := claim.measure(seed)) is not None]
    numbers = [number for number, _ in found]
    if claim.estimate is None:
        values = [float(value) for _, value in found if not isinstance(value, Series)]
        return (of_numbers(values), numbers) if values else None
    series = [value for _, value in found if isinstance(value, Series)]
    return (of_series(series, claim.estimate, draws), numbers) if series else None


def judge(seeds: list[Seed], draws: int) -> list[dict[str, Any]]:
    """A row for each claim; Holm's correction is over all that any seed says something of."""
    tested = [(claim, evidence_for(claim, seeds, draws)) for claim in all_claims()]
    spoken = [(claim, *found) for claim, found in tested if found is not None]
    corrected = holm([evidence.p for _, evidence, _ in spoken]) if spoken else []
    return [
        {
            "claim": claim.text,
            "quantity": claim.quantity,
            "statistic": claim.definition,
            "estimate": evidence.estimate,
            "low": evidence.low,
            "high": evidence.high,
            "p": evidence.p,
            "p after Holm": p,
            "verdict": evidence.verdict(p),
            "seeds": numbers,
            "by seed": list(evidence.by_seed),
        }
        for (claim, evidence, numbers), p in zip(spoken, corrected, strict=True)
    ]


def courses(seeds: list[Seed]) -> list[dict[str, Any]]:
    """When each seed memorised and generalised, and which frequencies it uses."""
    return [
        {
            "seed": seed.number,
            "99% of train": seed.memorisation[1],
            "test then": seed.test_when_memorised,
            "steps": seed.steps,
            "test at the end": float(seed.series["accuracy/test"][-1]),
            "key frequencies": " ".join(str(k) for k in sorted(key_frequencies(seed))),
            "their share": float(sum(key_frequencies(seed).values())),
            "half of it by step": _half(seed),
        }
        for seed in seeds
    ]


def _half(seed: Seed) -> int:
    """The step by which the final key frequencies have half of the share that they have in the end."""
    shares = embedding_shares(seed)[:, [k - 1 for k in key_frequencies(seed)]].sum(1)
    return int(seed.window_ends[np.argmax(shares >= (shares[0] + shares[-1]) / 2)])


def fit_lasso(config: DictConfig, seed: Seed) -> dict[str, Any]:
    """The Lasso of Table 2 and Fig. 12, on the authors' cosines in the last window: by the paper's periods, and by the
    harmonics of p; with intervals over samples."""
    similarity = seed.series["cosines/parameters"][-1, GROUP_NAMES.index(config.lasso_layer)].astype(np.float64)
    sums = seed.series["cosine_sums"]
    fits: dict[str, Any] = {}
    for name, angles, labels in (
        ("periods", period_angles(), list(PERIODS)),
        ("harmonics", harmonic_angles(seed.modulus), list(range(seed.modulus // 2 + 1))),
    ):
        coefficients, share, predicted = lasso(similarity, sums, angles, config.alpha)
        low, high, largest = lasso_intervals(similarity, sums, angles, config.alpha, config.draws // 10)
        order = [int(place) for place in np.argsort(-np.abs(coefficients))[:KEPT] if coefficients[place]]
        fits[name] = {"r2": share, "rows": [_row(labels, place, coefficients, low, high, largest) for place in order]}
        if name == "periods":
            fits["predicted"] = predicted
    return fits


KEPT = 8
"""Coefficients that are shown."""


def _row(labels: list[int], place: int, coefficients: Any, low: Any, high: Any, largest: Any) -> dict[str, Any]:
    names = ("label", "coefficient", "low", "high", "largest in")
    return dict(
        zip(names, (labels[place], *(float(v[place]) for v in (coefficients, low, high, largest))), strict=True)
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The claims as tables of a README: what became of each by every definition, then the numbers."""
    verdicts: dict[str, list[str]] = {}
    for row in rows:
        verdicts.setdefault(row["claim"], []).append(f"{row['quantity']}: **{row['verdict']}**")
    short = [(claim, "<br>".join(found)) for claim, found in verdicts.items()]

    full = []
    for row in rows:
        estimate = f"{row['estimate']:.2g} [{row['low']:.2g}, {row['high']:.2g}]"
        p, seeds = f"{row['p after Holm']:.2g}", f"{sum(value > 0 for value in row['by seed'])} of {len(row['seeds'])}"
        full.append((row["claim"], row["quantity"], row["statistic"], estimate, p, seeds, row["verdict"]))
    header = (
        "claim",
        "of what",
        "statistic, above 0 if it holds",
        "mean over seeds [95%]",
        "p (Holm)",
        "seeds above 0",
        "",
    )
    return f"{_table(('claim', 'verdict, by what is measured'), short)}\n{_table(header, full)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> None:
    config = configure("grokking_analysis", arguments)
    out = output_directory(config, "grokking_analysis", resumable=True, may_change=OF_THE_ANALYSIS)
    directory = out / "seeds"
    directory.mkdir(exist_ok=True)

    seeds = obtain(config, directory)
    rows, by_seed = judge(seeds, config.draws), courses(seeds)
    first = seeds[0]
    fit = fit_lasso(config, first)
    found = {
        "courses": by_seed,
        "claims": rows,
        "lasso": {name: value for name, value in fit.items() if name != "predicted"},
        "lasso_paper": PAPER_LASSO,
    }
    write_json(out / "summary.json", found)
    (out / "claims.md").write_text(markdown(rows))

    figures = {
        "phases": draw_phases(seeds),
        "differences": draw_differences(seeds),
        "frequencies": draw_frequencies(first),
        "lasso": draw_lasso(first, fit, PAPER_LASSO, config.lasso_layer),
    }
    if config.map_samples:
        figures |= {"maps": draw_maps(first, config.window), "cosines": draw_cosines(first, config.window)}
    save_figures(out / "figures", figures)

    print(f"\n{table(by_seed)}\n")
    shown = ("claim", "quantity", "estimate", "low", "high", "p after Holm", "verdict")
    print(table([{key: row[key] for key in shown} for row in rows]))
    print(f"{out / 'claims.md'}\n{out / 'summary.json'}\n{out / 'figures'}")


if __name__ == "__main__":
    main(sys.argv[1:])
