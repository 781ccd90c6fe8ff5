"""§4.2, G.2, Fig. 8: the decomposition over a part of the training steps, chosen by rankings of the steps.

    python -m recipes.step_subsampling [key=value …]

`out` receives summary.json, config.yaml, figures/steps.png and the trajectory.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from explaind_track import Quadrature, Query, Trajectory, explain
from recipes import images
from recipes.common import configure, output_directory, save_figures, table, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "the paper: accurate with 60% of the steps, ranked by the change of the loss"


def update_sizes(trajectory: Trajectory) -> Tensor:
    """‖θ_{s+1} − θ_s‖ of every step, (S,)."""
    squares = [
        sum(float((update.after - update.before).square().sum()) for update in step.updates.values())
        for step in trajectory.steps()
    ]
    return torch.tensor(squares).sqrt()


def loss_changes(initial: Tensor, changes: Tensor, y: Tensor) -> Tensor:
    """The change of the mean loss in every step, (S,), from the outputs before training, (X, O), and their changes in
    every step, (S, X, O)."""
    outputs = torch.cat([initial[None], initial + changes.cumsum(0)]).log_softmax(-1)
    losses = -outputs.gather(-1, y[None, :, None].expand(len(outputs), -1, 1)).mean((1, 2))
    return losses.diff()


def greedy(changes: Tensor) -> Tensor:
    """An order of the steps, (S,): each next one brings the sum of the changes (S, X, O) of those taken closest to
    that of all."""
    flat = changes.flatten(1)
    gram = flat @ flat.T
    rest, order, left = gram.sum(1), [], torch.ones(len(flat), dtype=torch.bool)
    for _ in range(len(flat)):
        gain = torch.where(left, 2 * rest - gram.diagonal(), -torch.inf)  # ‖r‖² − ‖r − c_s‖²
        best = int(gain.argmax())
        order.append(best)
        left[best] = False
        rest = rest - gram[best]
    return torch.tensor(order)


def rankings(trajectory: Trajectory, initial: Tensor, changes: Tensor, y: Tensor, seed: int) -> dict[str, Tensor]:
    """Orders of the steps, (S,) each, most important first; all that is known of predictions is known of the held-out
    batch."""
    total = changes.sum(0)
    scores = {
        "change of the loss (paper)": loss_changes(initial, changes, y).abs(),
        "size of the update": update_sizes(trajectory),
        "importance": changes.abs().sum((1, 2)),
        "alignment with the whole change": (changes * total).sum((1, 2)),
        "random": torch.rand(len(changes), generator=torch.Generator().manual_seed(seed)),
    }
    orders = {name: score.argsort(descending=True) for name, score in scores.items()}
    return {**orders, "greedy": greedy(changes)}


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Fig. 8, and the same for the divergence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, rows in curves.items():
        kept = [row["kept"] for row in rows]
        style = "--" if name == "random" else "-"
        axes[0].plot(kept, [row["agreement"] for row in rows], style, marker=".", label=name)
        axes[1].plot(kept, [max(row["kl"], 1e-7) for row in rows], style, marker=".", label=name)
    axes[0].set_ylabel("agreement with the model's decisions")
    axes[1].set_ylabel("KL(model ‖ sum over the kept steps), nats")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("fraction of the training steps kept")
        axis.grid(alpha=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main(arguments: list[str]) -> None:
    config = configure("step_subsampling", arguments)
    data = images.load(config)
    out = output_directory(config.out, "step_subsampling")
    OmegaConf.save(config, out / "config.yaml")
    run = images.obtain(config, data, config.seed, out / "trajectory")
    influence = explain(
        run.trajectory,
        run.model,
        Query.outputs(data.x_test),
        keep=("step", "query", "output"),
        quadrature=Quadrature.fixed(config.nodes),
    )
    changes = -torch.from_numpy(influence.total().transpose("step", "query", "output").values)
    initial = torch.from_numpy(influence.data["initial"].values)
    final = torch.from_numpy(influence.data["final"].values).log_softmax(-1)
    held_out, shown = slice(-config.held_out, None), slice(None, -config.held_out)

    orders = rankings(run.trajectory, initial[held_out], changes[:, held_out], data.y_test[held_out].cpu(), config.seed)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, order in orders.items():
        curves[name] = []
        for fraction in config.kept:
            chosen = order[: max(1, round(fraction * len(order)))].sort().values
            sparse = (initial[shown] + changes[chosen][:, shown].sum(0)).log_softmax(-1)
            fit = images.compare(final[shown], sparse, data.y_test[shown].cpu())
            curves[name].append({"kept": fraction, "steps": len(chosen), **fit})

    rows = [
        {"kept": fraction, **{name: curves[name][place]["agreement"] for name in curves}}
        for place, fraction in enumerate(config.kept)
    ]
    needed = {
        name: next((row["kept"] for row in rows if row["agreement"] >= 0.9), None) for name, rows in curves.items()
    }
    accuracy = float(np.mean((final[shown].argmax(-1) == data.y_test[shown].cpu()).numpy()))
    summary = {"steps": len(changes), "accuracy": accuracy, "steps_for_90_percent": needed, "curves": curves}
    write_json(out / "summary.json", summary)
    save_figures(out / "figures", {"steps": draw(curves)})
    print(
        f"\nagreement of the sum over some of {len(changes)} steps with the model's decisions\n{table(rows)}\n{PAPER}"
    )
    print(f"fraction of the steps needed for 90%: {needed}\n{out / 'summary.json'}\n{out / 'figures' / 'steps.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
