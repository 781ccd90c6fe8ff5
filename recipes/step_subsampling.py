"""§4.2, G.2, Fig. 8: the decomposition over a part of the training steps, chosen together or by rankings.

Steps undo each other, so that a choice has to look at them together: `greedy` takes the step that brings the sum of the
changes taken closest to the change of the whole run, then the next. It needs no influence, only the held-out batch's
predictions before and after each step, which are one forward pass a step, as live residuals make them anyway. Within
windows of steps it can be made while a run trains, which then keeps a window's steps and drops those not chosen.

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


def greedy_in_windows(changes: Tensor, window: int) -> Tensor:
    """Scores (S,) of a choice that sees `window` steps at a time, as a run that trains can make it: of each window the
    steps that `greedy` takes first are the most important."""
    scores = torch.empty(len(changes))
    for first in range(0, len(changes), window):
        order = greedy(changes[first : first + window])
        scores[first + order] = -torch.arange(len(order)) / len(order)
    return scores


@torch.no_grad()
def prediction_changes(run: Run, x: Tensor) -> Tensor:
    """f_{s+1}(x) − f_s(x) of every step, (S, X, O): forward passes alone."""
    predictions = []
    for step in range(len(run.trajectory) + 1):
        run.model.load_state_dict(run.trajectory.state_dict(step))
        predictions.append(run.model(x))
    return torch.stack(predictions).diff(dim=0)


def rankings(config: DictConfig, run: Run, x: Tensor, y: Tensor, seed: int) -> dict[str, xr.DataArray]:
    """Scores of the steps, (step) each, the most important ones largest; of predictions they see those on the held-out
    batch (x, y) alone."""
    changes = prediction_changes(run, x)
    aligned = (changes * changes.sum(0)).sum((1, 2))  # ⟨c_s, Σ c⟩
    random = torch.rand(len(changes), generator=torch.Generator().manual_seed(seed))

    def labelled(scores: Tensor) -> xr.DataArray:
        return xr.DataArray(scores.numpy(), {"step": range(len(scores))}, ("step",))

    loss = Query.loss(x, y).mean()
    return {
        "greedy": labelled(-greedy(changes).argsort().double()),
        f"greedy, {config.window} steps at a time": labelled(greedy_in_windows(changes, config.window).double()),
        "change of the loss (paper)": step_scores(run.trajectory, run.model, loss, by="loss"),
        "size of the update": step_scores(run.trajectory, run.model, by="size"),
        "importance": step_scores(run.trajectory, run.model, Query.outputs(x), by="influence"),
        "alignment with the whole change": labelled(aligned),
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


def judge(found: Sequence[Mapping[str, xr.Dataset]]) -> list[dict[str, Any]]:
    """What the seeds say of the paper's claim, and of the choice that it asks for."""

    def agreement(curves: Mapping[str, xr.Dataset], name: str, kept: float) -> float:
        return float(curves[name]["agreement"].sel(fraction=kept, method="nearest"))

    paper = [agreement(curves, "change of the loss (paper)", 0.6) for curves in found]
    together = [agreement(curves, "greedy", 0.2) for curves in found]
    differences = [ours - theirs for ours, theirs in zip(together, paper, strict=True)]
    return judged(
        {
            "60% of the steps, by the change of the loss, agree on 95% (less 0.95)": of_numbers(
                [v - 0.95 for v in paper]
            ),
            "20% chosen together agree better than those 60% (difference)": of_numbers(differences),
        }
    )


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
    claims = judge(found)
    summary = {
        "seeds": len(found),
        "claims": claims,
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
    print(f"{table(rows)}\n{PAPER}\n{table(claims)}")
    print(f"fraction of the steps needed for 90%: {needed}\n{out / 'summary.json'}\n{out / 'figures' / 'steps.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
