"""G.1, Fig. 7: what samples do to predictions, as forecasts of models trained without some of them.

    python -m recipes.data_attribution [preset=paper|cifar2] [key=value …]

The linear datamodeling score of the path kernel and of the metagradient, beside TracIn's, TRAK's and, where bergson is
installed, MAGIC's: for the paper's setting, where models are trained again from fresh starts, for the same start and
order, and for either with a model and rates for which training is smooth. And how many of the samples with wrong labels
each of them finds. `out` receives summary.json, config.yaml, figures/lds.png and the trajectories.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from explaind_track.core.tables import table
from recipes import images
from recipes.attribution_methods import log_odds, methods
from recipes.common import configure, measured, output_directory, save_figures, write_json
from recipes.data import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = {
    "paper": (False, False),
    "paper, same start": (False, True),
    "smooth": (True, False),
    "smooth, same start": (True, True),
}
"""Whether training is smooth; whether models are trained again from the run's start and in its order."""

KINDS = {False: "paper", True: "smooth"}
"""Names of the runs that are not smooth, and that are."""

RESAMPLES = 30
"""The number of times that subsets and queries are drawn again for the error of a score."""

PAPER_CIFAR2 = {"path kernel": 0.06, "TracIn": 0.05, "TRAK": 0.05}
"""The paper's scores on CIFAR-2 for the fraction 0.5; those on MNIST it only draws."""

APART = 1000
"""Between the seeds of the runs whose scores are averaged, so that no model trained again is one of them."""


def of_kind(config: DictConfig, smooth: bool) -> DictConfig:
    """The settings of a run that is smooth, or of the paper's."""
    merged = OmegaConf.merge(config, config.smooth) if smooth else config
    assert isinstance(merged, DictConfig)
    return merged


def attribute(
    config: DictConfig, data: Split, x: Tensor, y: Tensor, out: Path, mean: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains a run for each seed; returns each method's scores of the first, and averaged over all where there are
    several; and what the first run and the scores took."""
    by_seed: list[dict[str, Tensor]] = []
    cost: dict[str, Any] = {}
    for place in range(config.seeds):
        seeded = OmegaConf.merge(config, {"seed": config.seed + APART * place})
        assert isinstance(seeded, DictConfig)
        run = images.obtain(seeded, data, seeded.seed, out / f"trajectory-{seeded.seed}")
        found: dict[str, Tensor] = {}
        for name, method in methods(seeded, run, x, y, mean).items():
            result, seconds, megabytes = measured(method)
            found[name] = result.detach().cpu()
            if not place:
                cost[name] = {"seconds": round(seconds, 1), "MB": round(megabytes)}
        if not place:
            cost["accuracy"] = images.accuracy(run.model, data.x_test, data.y_test)
        by_seed.append(found)

    scores = dict(by_seed[0])
    if len(by_seed) > 1:
        for name in by_seed[0]:
            scores[f"{name}, {len(by_seed)} runs"] = torch.stack([one[name] for one in by_seed]).mean(0)
    return scores, cost


def retrain(config: DictConfig, data: Split, x: Tensor, y: Tensor, subsets: Sequence[Tensor], same: bool) -> Tensor:
    """The predictions of a model trained on each subset, (subsets, queries).

    same: from the run's start and in its order, the others' weights 0; else each has another start and order.

    One after the other: stacked by `torch.func.stack_module_state`, 16 CNNs took 1.6 times as long on a CPU.
    """
    values = []
    for number, subset in enumerate(tqdm(subsets, "train again", unit="model")):
        seed = config.seed if same else config.seed + 1 + number
        model = images.build(config, data, seed)
        if same:
            weight = torch.zeros(len(data.y_train), device=config.device).index_fill(0, subset, 1.0)
            images.fit(config, model, data.x_train, data.y_train, seed, weight)
        else:
            images.fit(config, model, *data.training_batch(subset), seed)
        values.append(log_odds(images.log_probabilities(model, x), y)[:, 0])
    return torch.stack(values)


def datamodeling_score(
    scores: Tensor, truth: Tensor, subsets: Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """The linear datamodeling score, a mean over the queries, and its standard error.

    The error is that of `RESAMPLES` resamplings of the subsets and of the queries: all queries share the subsets'
    models.

    Args:
        scores: (samples, queries).
        truth: the predictions of the subsets' models, (subsets, queries).
        subsets: the samples in each, (subsets, size).
        generator: draws the resamplings.
    """
    foretold = torch.stack([scores[subset].sum(0) for subset in subsets]).double()  # as the correlations then are
    count, queries = truth.shape
    score = rank_correlations(foretold, truth, torch.arange(count)).mean()

    means = []
    for _ in range(RESAMPLES):
        rows, columns = (torch.randint(size, (size,), generator=generator) for size in (count, queries))
        means.append(rank_correlations(foretold, truth, rows)[columns].mean())
    return float(score), float(torch.stack(means).std())


def rank_correlations(foretold: Tensor, truth: Tensor, rows: Tensor) -> Tensor:
    """Spearman's of forecast and truth over these subsets, (queries,); 0 where nothing differs between them."""
    from dattri.metric import lds
    from scipy.stats import ConstantInputWarning

    # the sums over the samples are taken once, and not again for each resampling: a subset is its own only member
    members = rows[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        correlations: Tensor = lds(foretold, (truth[rows], members))[0]
    return correlations.nan_to_num()


def datamodeling_rows(
    config: DictConfig, data: Split, x: Tensor, y: Tensor, scores: Mapping[str, Tensor], same: bool
) -> Iterator[dict[str, Any]]:
    """Each method's linear datamodeling score by fraction, with its error; the subsets are the same in all settings."""
    generator = torch.Generator().manual_seed(config.seed)
    size = len(data.y_train)
    for fraction in config.fractions:
        draws = [torch.randperm(size, generator=generator)[: round(fraction * size)] for _ in range(config.subsets)]
        truth = retrain(config, data, x, y, draws, same).cpu()
        row: dict[str, Any] = {"fraction": fraction}
        for name, score in scores.items():
            again = torch.Generator().manual_seed(config.seed)
            row[name], row[f"± {name}"] = datamodeling_score(score, truth, torch.stack(draws), again)
        yield row


def mislabelled(config: DictConfig, data: Split, out: Path) -> dict[str, Any]:
    """Of the samples that each method has lowest, the share whose labels are wrong; as many are looked at as are wrong.

    Scores are of the mean prediction on test samples: a wrong label makes it worse.
    """
    generator = torch.Generator().manual_seed(config.seed)
    size, classes = len(data.y_train), int(data.y_train.max()) + 1
    wrong = torch.randperm(size, generator=generator)[: round(config.flipped * size)]
    labels = data.y_train.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=generator)) % classes

    x, y = data.x_test[: config.judges], data.y_test[: config.judges]
    once = OmegaConf.merge(config, {"seeds": 1})
    assert isinstance(once, DictConfig)
    scores, cost = attribute(once, replace(data, y_train=labels), x, y, out, mean=True)
    found: dict[str, Any] = {"wrong": len(wrong), "accuracy": cost.pop("accuracy")}
    for name, score in scores.items():
        lowest = score[:, 0].argsort()[: len(wrong)]
        found[name] = float(torch.isin(lowest, wrong).float().mean())
    return {**found, "cost": cost}


def draw(rows: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> "Figure":
    """Fig. 7 for each setting: scores by the fraction that the models are trained on, with their standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * len(settings), 4), layout="constrained")
    for axis, setting in zip(figure.subplots(1, len(settings), sharey=True, squeeze=False)[0], settings, strict=True):
        shown = [row for row in rows if row["setting"] == setting]
        places = range(len(shown))
        for name in [key[2:] for key in shown[0] if key.startswith("± ")]:
            values, errors = ([row[key] for row in shown] for key in (name, f"± {name}"))
            style = "--" if name.endswith("runs") else "-"
            axis.errorbar(places, values, errors, marker="o", linestyle=style, capsize=3, label=name)
        axis.axhline(0, color="gray", linewidth=0.5)
        axis.set_xticks(places, [f"{row['fraction']:g}" for row in shown])
        axis.set_title(setting, fontsize=10)
        axis.grid(alpha=0.2)

    figure.supxlabel("fraction of the training samples that the models are trained on again", fontsize=9)
    figure.axes[0].set_ylabel("linear datamodeling score\n(rank correlation ± standard error)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main(arguments: list[str]) -> None:
    config = configure("data_attribution", arguments)
    if unknown := [name for name in config.settings if name not in SETTINGS]:
        sys.exit(f"there is no setting {unknown[0]!r}: settings are some of {', '.join(map(repr, SETTINGS))}")
    data = images.load(config)
    out = output_directory(config, "data_attribution")
    x, y = data.x_test[: config.queries], data.y_test[: config.queries]

    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"queries": len(y), "subsets": config.subsets, "seeds": config.seeds, "rows": rows}
    summary["paper"] = PAPER_CIFAR2 if config.data.name == "cifar2" else None
    for smooth in dict.fromkeys(SETTINGS[name][0] for name in config.settings):
        kind, own = KINDS[smooth], of_kind(config, smooth)
        scores, summary[f"cost, {kind}"] = attribute(own, data, x, y, out / kind)
        for setting in (name for name in config.settings if SETTINGS[name][0] == smooth):
            for row in datamodeling_rows(own, data, x, y, scores, SETTINGS[setting][1]):
                rows.append({"setting": setting, **row})
                write_json(out / "summary.json", summary)  # after each: a fraction takes minutes
        if config.flipped:
            summary[f"mislabelled, {kind}"] = mislabelled(own, data, out / f"{kind}-mislabelled")
            write_json(out / "summary.json", summary)

    save_figures(out / "figures", {"lds": draw(rows, list(config.settings))})
    print(f"\nlinear datamodeling score of {config.subsets} models for each fraction, {len(y)} queries\n{table(rows)}")
    for key in summary.keys() - {"rows"}:
        print(f"{key}: {summary[key]}")
    print(f"{out / 'summary.json'}\n{out / 'figures' / 'lds.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
