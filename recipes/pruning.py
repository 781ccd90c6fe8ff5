"""§4.1, Fig. 2: the parameters that matter most by their scores, in the place of the whole model.

    python -m recipes.pruning [key=value …]

`out` receives summary.json, config.yaml, figures/pruning.png and a trajectory for each seed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils import prune

from explaind_track import Quadrature, Query
from explaind_track.analysis import evaluate_pruning, parameter_scores, prune_masks
from explaind_track.core.tables import table
from recipes import images
from recipes.block_statistics import judged, of_numbers
from recipes.common import (
    Run,
    configure,
    draw_methods,
    output_directory,
    over_seeds,
    save_figures,
    write_json,
)
from recipes.data import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "path kernel"
FILTERS = "filters, retrained (Li et al.)"
OUTPUT = {"cnn": "linear2", "resnet9": "linear"}
"""The output layer, which nobody prunes."""


def rankings(config: DictConfig, run: Run, seed: int) -> dict[str, dict[str, Tensor]]:
    """Scores of every parameter, by method; the largest are kept."""
    x, y = run.data.x_train[: config.queries], run.data.y_train[: config.queries]
    rule = Quadrature.fixed(config.nodes)
    loss = Query.loss(x, y).mean()
    importance = parameter_scores(run.trajectory, run.model, Query.outputs(x), importance=True, quadrature=rule)
    signed = parameter_scores(run.trajectory, run.model, loss, quadrature=rule)

    generator = torch.Generator().manual_seed(seed)
    parameters = dict(run.model.named_parameters())
    return {
        OURS: importance,
        f"{OURS}, signed, of the loss": signed,
        "magnitude": {name: value.detach().abs() for name, value in parameters.items()},
        "random": {name: torch.rand(value.shape, generator=generator) for name, value in parameters.items()},
    }


def prune_filters(config: DictConfig, run: Run, seed: int) -> list[dict[str, float]]:
    """Li et al. (2017): at every sparsity in turn, the filters with the smallest L1 norm go, and the rest is trained
    on. `sparsity` of a result is what whole filters allow."""
    model = images.build(config, run.data, seed)
    model.load_state_dict(run.model.state_dict())
    before = images.log_probabilities(run.model, run.data.x_test)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name != OUTPUT[config.model]
    ]
    retraining = OmegaConf.merge(config, {"epochs": config.retrain_epochs, "peak": None})
    assert isinstance(retraining, DictConfig)  # of two mappings

    results = []
    for sparsity in sorted(config.sparsity):
        for layer in layers:
            drop_filters(layer, sparsity)
        images.fit(retraining, model, run.data.x_train, run.data.y_train, seed)
        after = images.log_probabilities(model, run.data.x_test)

        dropped = sum(int((layer.weight == 0).sum()) for layer in layers)
        reached = dropped / sum(layer.weight.numel() for layer in layers)
        results.append({**images.compare(before, after, run.data.y_test), "sparsity": reached})
    return results


def drop_filters(layer: nn.Conv2d | nn.Linear, sparsity: float) -> None:
    """Drops the smallest filters of a layer until the fraction of those that are gone is reached; one stays."""
    filters = len(layer.weight)
    gone = int((layer.weight.flatten(1).abs().sum(1) == 0).sum())
    more = min(round(sparsity * filters), filters - 1) - gone
    if more > 0:
        prune.ln_structured(layer, "weight", more, n=1, dim=0)


def one_seed(config: DictConfig, data: Split, seed: int, out: Path) -> dict[str, list[dict[str, float]]]:
    """The results of each method, at every sparsity."""
    run = images.obtain(config, data, seed, out / f"trajectory-{seed}")
    spared = [f"{OUTPUT[config.model]}.*"]
    results: dict[str, list[dict[str, float]]] = {}
    for name, scores in rankings(config, run, seed).items():
        results[name] = [
            evaluate_pruning(run.model, prune_masks(scores, 1 - sparsity, exclude=spared), data.x_test, data.y_test)
            for sparsity in sorted(config.sparsity)
        ]
    results[FILTERS] = prune_filters(config, run, seed)
    return results


def draw(methods: Mapping[str, Mapping[str, Any]], sparsity: list[float]) -> "Figure":
    """Fig. 2: mean and standard deviation over the seeds."""
    labels = {
        "accuracy": "test accuracy (mean ± deviation)",
        "kl": "KL(whole ‖ pruned), nats (mean ± deviation)",
    }
    x_label = "sparsity (fraction of parameters pruned, output layer aside)"
    return draw_methods(methods, sparsity, labels, x_label, width=12.5)


def judge(sparsity: list[float], seeds: Sequence[Mapping[str, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """What the seeds say of §4.1's claims, at every sparsity: that our KL is below the retrained filters', and our
    accuracy above theirs."""

    def differences(key: str, place: int) -> list[float]:
        return [seed[OURS][place][key] - seed[FILTERS][place][key] for seed in seeds]

    closer = {
        f"KL of retrained filters less ours, {level:.0%}": of_numbers([-v for v in differences("kl", place)])
        for place, level in enumerate(sparsity)
    }
    better = {
        f"our accuracy less theirs, {level:.0%}": of_numbers(differences("accuracy", place))
        for place, level in enumerate(sparsity)
    }
    return judged(closer | better)


def main(arguments: list[str]) -> None:
    config = configure("pruning", arguments)
    data = images.load(config)
    out = output_directory(config, "pruning")
    seeds = [one_seed(config, data, seed, out) for seed in config.seeds]

    sparsity = sorted(config.sparsity)
    methods = {name: over_seeds([_by_measure(seed[name]) for seed in seeds]) for name in seeds[0]}
    ours, filters = methods[OURS], methods[FILTERS]
    closer = [one < other for one, other in zip(ours["kl"], filters["kl"], strict=True)]
    as_good = [
        filters["accuracy"][place] - ours["accuracy"][place] <= filters["± accuracy"][place] + ours["± accuracy"][place]
        for place in range(len(sparsity))
    ]
    claims = judge(sparsity, seeds)
    summary = {
        "seeds": len(seeds),
        "sparsity": sparsity,
        "methods": methods,
        "kl_below_filters": closer,
        "accuracy_within_error_of_filters": as_good,
        "claims": claims,
    }
    write_json(out / "summary.json", summary)
    save_figures(out / "figures", {"pruning": draw(methods, sparsity)})

    rows = [
        {"sparsity": level}
        | {name: f"{found['accuracy'][place]:.3f} / {found['kl'][place]:.3f}" for name, found in methods.items()}
        for place, level in enumerate(sparsity)
    ]
    print(f"\ntest accuracy / KL to the whole model, mean over {len(seeds)} seeds\n{table(rows)}")
    print("the paper: KL below the retrained filters' at every sparsity, accuracy comparable")
    print(f"here: KL below theirs at {sum(closer)} of {len(sparsity)} levels,")
    print(f"accuracy within the error bars or better at {sum(as_good)}")
    print(f"\n{table(claims)}")
    print(f"{out / 'summary.json'}\n{out / 'figures' / 'pruning.png'}")


def _by_measure(results: list[dict[str, float]]) -> dict[str, list[float]]:
    """The results at every sparsity, by what was measured."""
    return {key: [result[key] for result in results] for key in ("accuracy", "agreement", "kl", "sparsity")}


if __name__ == "__main__":
    main(sys.argv[1:])
