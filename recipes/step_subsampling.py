"""§4.2, G.2, Fig. 8: the decomposition over a part of the training steps, chosen by rankings of the steps.

    python -m recipes.step_subsampling [key=value …]

`out` receives summary.json, config.yaml, figures/steps.png and the trajectory.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from explaind_track import Quadrature, Query, accuracy_curve, explain, step_scores
from recipes import images
from recipes.common import configure, output_directory, save_figures, table, write_json
from recipes.images import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("kernel", "regularization")

PAPER = "the paper: accurate with 60% of the steps, ranked by the change of the loss"


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


def rankings(config: DictConfig, run: Run, x: Tensor, y: Tensor) -> dict[str, xr.DataArray]:
    """Scores of the steps, (step) each, the most important ones largest; the held-out batch (x, y) is all they see of
    predictions."""
    rule = Quadrature.fixed(config.nodes)
    outputs = explain(
        run.trajectory, run.model, Query.outputs(x), keep=("step", "query", "output"), parts=PARTS, quadrature=rule
    )
    changes = -torch.from_numpy(outputs.total().transpose("step", "query", "output").values)
    aligned = (changes * changes.sum(0)).sum((1, 2))
    random = torch.rand(len(changes), generator=torch.Generator().manual_seed(config.seed))

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
    held_out, shown = slice(-config.held_out, None), slice(None, -config.held_out)
    influence = explain(
        run.trajectory,
        run.model,
        Query.outputs(data.x_test[shown]),
        keep=("step", "query", "output"),
        parts=PARTS,
        quadrature=Quadrature.fixed(config.nodes),
    )
    kept = list(config.kept)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, scores in rankings(config, run, data.x_test[held_out], data.y_test[held_out]).items():
        curve = accuracy_curve(influence, scores, kept)
        values = zip(kept, curve["agreement"].values.tolist(), curve["kl"].values.tolist(), strict=True)
        curves[name] = [{"kept": fraction, "agreement": one, "kl": other} for fraction, one, other in values]
    rows = [
        {"kept": fraction, **{name: curves[name][place]["agreement"] for name in curves}}
        for place, fraction in enumerate(config.kept)
    ]
    needed = {
        name: next((row["kept"] for row in rows if row["agreement"] >= 0.9), None) for name, rows in curves.items()
    }
    accuracy = images.accuracy(run.model, data.x_test[shown], data.y_test[shown])
    summary = {"steps": len(run.trajectory), "accuracy": accuracy, "steps_for_90_percent": needed, "curves": curves}
    write_json(out / "summary.json", summary)
    save_figures(out / "figures", {"steps": draw(curves)})
    print(
        f"\nagreement of the sum over some of {len(run.trajectory)} steps with the model's decisions\n{table(rows)}\n"
        f"{PAPER}"
    )
    print(f"fraction of the steps needed for 90%: {needed}\n{out / 'summary.json'}\n{out / 'figures' / 'steps.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
