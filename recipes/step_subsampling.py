"""§4.2, G.2, Fig. 8: the decomposition over a part of the training steps, chosen by rankings of the steps.

    python -m recipes.step_subsampling [key=value …]

`out` receives summary.json, config.yaml, figures/steps.png and a trajectory for each seed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from omegaconf import DictConfig
from torch import Tensor

from explaind_track import Quadrature, Query, explain
from explaind_track.analysis import accuracy_curve, step_scores
from explaind_track.core.tables import table
from recipes import images
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

PARTS = ("kernel", "regularization")

PAPER = "the paper: accurate with 60% of the steps, ranked by the change of the loss"


def greedy(changes: Tensor) -> Tensor:
    """An order of the steps, (S,): each next one brings the sum of the changes (S, X, O) of those taken closest to
    that of all."""
    flat = changes.flatten(1)
    gram = flat @ flat.T
    rest = gram.sum(1)  # ⟨r, c_s⟩ for every step s, where r is the sum of the changes that are not taken yet
    order, left = [], torch.ones(len(flat), dtype=torch.bool)
    for _ in range(len(flat)):
        gain = torch.where(left, 2 * rest - gram.diagonal(), -torch.inf)  # ‖r‖² − ‖r − c_s‖²
        best = int(gain.argmax())
        order.append(best)
        left[best] = False
        rest = rest - gram[best]  # r ← r − c_best
    return torch.tensor(order)


def rankings(config: DictConfig, run: Run, x: Tensor, y: Tensor, seed: int) -> dict[str, xr.DataArray]:
    """Scores of the steps, (step) each, the most important ones largest; of predictions they see those on the held-out
    batch (x, y) alone."""
    rule = Quadrature.fixed(config.nodes)
    outputs = explain(
        run.trajectory, run.model, Query.outputs(x), keep=("step", "query", "output"), parts=PARTS, quadrature=rule
    )
    changes = -torch.from_numpy(outputs.total().transpose("step", "query", "output").values)
    aligned = (changes * changes.sum(0)).sum((1, 2))  # ⟨c_s, Σ c⟩
    random = torch.rand(len(changes), generator=torch.Generator().manual_seed(seed))

    def labelled(scores: Tensor) -> xr.DataArray:
        return xr.DataArray(scores.numpy(), {"step": outputs.data["step"]}, ("step",))

    loss = Query.loss(x, y).mean()
    return {
        "change of the loss (paper)": step_scores(run.trajectory, run.model, loss, by="loss"),
        "size of the update": step_scores(run.trajectory, run.model, by="size"),
        "importance": step_scores(run.trajectory, run.model, Query.outputs(x), by="influence"),
        "alignment with the whole change": labelled(aligned),
        "greedy": labelled(-greedy(changes).argsort().double()),
        "random": labelled(random),
    }


def one_seed(config: DictConfig, data: Split, seed: int, out: Path) -> tuple[float, int, dict[str, xr.Dataset]]:
    """The model's test accuracy, the number of its steps, and how well the sum over some of these stands for it."""
    run = images.obtain(config, data, seed, out / f"trajectory-{seed}")
    held_out, shown = slice(-config.held_out, None), slice(None, -config.held_out)

    influence = explain(
        run.trajectory,
        run.model,
        Query.outputs(data.x_test[shown]),
        keep=("step", "query", "output"),
        parts=PARTS,
        quadrature=Quadrature.fixed(config.nodes),
    )
    ranked = rankings(config, run, data.x_test[held_out], data.y_test[held_out], seed)
    curves = {name: accuracy_curve(influence, scores, list(config.kept)) for name, scores in ranked.items()}

    accuracy = images.accuracy(run.model, data.x_test[shown], data.y_test[shown])
    return accuracy, len(run.trajectory), curves


def draw(curves: Mapping[str, Mapping[str, Any]], kept: Sequence[float]) -> "Figure":
    """Fig. 8, and the same for the divergence: mean and standard deviation over the seeds."""
    labels = {
        "agreement": "agreement with the model's decisions",
        "kl": "KL(model ‖ sum over the kept steps), nats",
    }
    figure = draw_methods(curves, kept, labels, "fraction of the training steps kept", width=12, dashed="random")
    figure.axes[1].set_yscale("log")
    return figure


def main(arguments: list[str]) -> None:
    config = configure("step_subsampling", arguments)
    data = images.load(config)
    out = output_directory(config, "step_subsampling")
    accuracies, steps, found = zip(*(one_seed(config, data, seed, out) for seed in config.seeds), strict=True)

    kept = list(config.kept)
    measures = ("agreement", "kl")
    curves = {
        name: over_seeds([{key: of_seed[name][key].values for key in measures} for of_seed in found])
        for name in found[0]
    }
    needed = {
        name: next((part for part, value in zip(kept, values["agreement"], strict=True) if value >= 0.9), None)
        for name, values in curves.items()
    }
    summary = {
        "seeds": len(found),
        "steps": steps[0],
        "accuracy": sum(accuracies) / len(accuracies),
        "kept": kept,
        "steps_for_90_percent": needed,
        "curves": curves,
    }
    write_json(out / "summary.json", summary)
    save_figures(out / "figures", {"steps": draw(curves, kept)})

    rows = [
        {"kept": fraction}
        | {name: f"{v['agreement'][place]:.3f} ± {v['± agreement'][place]:.3f}" for name, v in curves.items()}
        for place, fraction in enumerate(kept)
    ]
    print(f"\nagreement of the sum over some of {steps[0]} steps with the model's decisions, {len(found)} seeds")
    print(f"{table(rows)}\n{PAPER}")
    print(f"fraction of the steps needed for 90%: {needed}\n{out / 'summary.json'}\n{out / 'figures' / 'steps.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
