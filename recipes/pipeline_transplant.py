"""Fig. 3(b), 10 and 11: training on grokked layers, and swapping them into checkpoints of the run they grew in.

The figures name the layers that *are* taken from the grokked run, and beside them what the paper calls the case. These
differ: the authors' `inject_previous_step` keeps the grokked values of the layers in its list `ignore_layers` and
randomises all others, while its callers list the layers that are to be random. So the paper's "Att. + Lin. 1" has a
grokked embedding, linear 2 and decoder. Of Fig. 10, the paper's "Decoder" swaps linear 2 too, its "Emb." linear 2's
weights too, and its "All but att." leaves linear 1's bias (`linea1.bias` in the script).

    python -m recipes.pipeline_transplant run=DIR [key=value …]

`out` receives summary.json, config.yaml and figures/: transplant.png, swaps.png, confusion.png.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track import resolve_groups
from explaind_track.core.tables import table
from recipes.common import Run, configure, output_directory, save_figures, write_json
from recipes.data import Split
from recipes.grokking_figures import COLORS, LINES
from recipes.modulo_addition import GROUPS, accuracies, accuracy, finished, fresh_model, make_optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = np.ndarray[Any, Any]

OUTER = "embedding + linear 2 + decoder"
ALL_BUT_ATTENTION = "all but attention"

PARTS = {
    "attention + linear 1": ("att_encoder", "att_decoder", "linear1"),
    "attention": ("att_encoder", "att_decoder"),
    OUTER: ("embedding", "linear2", "decoder"),
    ALL_BUT_ATTENTION: ("embedding", "linear1", "linear2", "decoder"),
    "nothing": (),
}
"""The layers that are transplanted: those of the paper's text, those of its script, and none at all to compare with."""

PAPER_LABELS = {
    "attention + linear 1": "Emb. + Lin. 2 + Dec.",
    OUTER: "Att. + Lin. 1",
    ALL_BUT_ATTENTION: "Att.",
}
"""The paper's names of what is transplanted, by what its script did."""

SWAPS = {
    "unedited": (),
    OUTER: ("embedding", "linear2", "decoder"),
    "embedding + decoder": ("embedding", "decoder"),
    "linear 2 + decoder": ("linear2", "decoder"),
    "attention + linear 1": ("att_encoder", "att_decoder", "linear1"),
}
"""The layers of the final model that are swapped into its checkpoints; linear 2 + decoder is the paper's "Decoder"."""


def transplant(model: nn.Module, donor: Mapping[str, Tensor], groups: Sequence[str]) -> None:
    """Puts the parameters of these groups, from the donor's state, in the place of the model's."""
    members = resolve_groups(GROUPS, dict(model.named_parameters()))
    model.load_state_dict({name: donor[name] for group in groups for name in members[group]}, strict=False)


def retrain(recorded: DictConfig, config: DictConfig, model: nn.Module, data: Split) -> Curve:
    """Trains as the run was trained. Returns train and test accuracy every so many steps, (evaluations, 2), the last
    ones repeated once the test accuracy is 1."""
    optimizer = make_optimizer(recorded, model)
    curve: list[tuple[float, float]] = []
    for step in range(config.steps + 1):
        if step % config.evaluate_every == 0:
            generalises = bool(curve) and curve[-1][1] == 1.0
            curve.append(curve[-1] if generalises else accuracies(model, data))
        if curve[-1][1] < 1.0:
            optimizer.zero_grad()
            F.nll_loss(model(data.x_train), data.y_train).backward()
            optimizer.step()
    return np.array(curve)


def transplants(recorded: DictConfig, config: DictConfig, run: Run) -> dict[tuple[int, str], Curve]:
    """For every checkpoint and choice of layers the curves of all seeds, (seeds, evaluations, 2)."""
    curves: dict[tuple[int, str], Curve] = {}
    steps = [round(fraction * len(run.trajectory)) for fraction in config.checkpoints]
    cases = [(step, name) for name in PARTS for step in (steps if PARTS[name] else steps[:1])]

    with tqdm(total=len(cases) * len(config.seeds), desc="transplants", unit="run") as bar:
        for step, name in cases:
            donor, trained = run.trajectory.state_dict(step), []
            for seed in config.seeds:
                model = fresh_model(recorded, seed)
                if config.deviation is not None:
                    for parameter in model.parameters():
                        nn.init.normal_(parameter, std=config.deviation)
                transplant(model, donor, PARTS[name])
                trained.append(retrain(recorded, config, model, run.data))
                bar.update()
            curves[step, name] = np.stack(trained)
    return curves


def swaps(config: DictConfig, run: Run) -> dict[str, Any]:
    """The test accuracy of the run's checkpoints, with layers of the final model in them; by step."""
    final = run.trajectory.state_dict(len(run.trajectory))
    steps = list(range(0, len(run.trajectory), config.swap_every))
    curves: dict[str, Any] = {"step": steps, **{name: [] for name in SWAPS}}
    for step in tqdm(steps, "swaps", unit="checkpoint"):
        checkpoint = run.trajectory.state_dict(step)
        for name, groups in SWAPS.items():
            run.model.load_state_dict(checkpoint)
            transplant(run.model, final, groups)
            curves[name].append(accuracy(run.model, run.data.x_test, run.data.y_test))
    return curves


def confusions(config: DictConfig, run: Run, modulus: int) -> dict[tuple[int, str], Tensor]:
    """The confusion matrices of some checkpoints, as they are and with the final model's outer layers."""
    final = run.trajectory.state_dict(len(run.trajectory))
    matrices: dict[tuple[int, str], Tensor] = {}
    for fraction in config.confusion:
        step = round(fraction * len(run.trajectory))
        for name in ("unedited", OUTER):
            run.model.load_state_dict(run.trajectory.state_dict(step))
            transplant(run.model, final, SWAPS[name])
            matrices[step, name] = confusion(run.model, run.data, modulus)
    return matrices


@torch.no_grad()
def confusion(model: nn.Module, data: Split, modulus: int) -> Tensor:
    """The number of test samples of each class that were taken for each: (right, predicted)."""
    predicted = model(data.x_test)[:, :modulus].argmax(-1)
    return torch.bincount(data.y_test * modulus + predicted, minlength=modulus**2).reshape(modulus, modulus)


def systematic(counts: Tensor) -> float:
    """The share of the test samples whose prediction is off by one of the five most common differences."""
    modulus = len(counts)
    right, predicted = torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij")
    difference = ((predicted - right) % modulus).flatten()
    by_difference = torch.bincount(difference, counts.flatten().double(), modulus)[1:]  # at 0 stands what is right
    return float(by_difference.topk(min(5, modulus - 1)).values.sum() / counts.sum())


def draw_transplants(curves: Mapping[tuple[int, str], Curve], every: int) -> "Figure":
    """Fig. 11: a row for each checkpoint and a column for each choice of layers; mean and deviation over the seeds."""
    from matplotlib.figure import Figure

    steps, names = sorted({step for step, _ in curves}, reverse=True), [name for name in PARTS if PARTS[name]]
    baseline = next(values for (_, name), values in curves.items() if not PARTS[name])
    figure = Figure(figsize=(8.5, 1.9 * len(steps) + 0.6), layout="constrained")
    axes = figure.subplots(len(steps), len(names), sharex=True, sharey=True, squeeze=False)
    for row, step in enumerate(steps):
        for axis, name in zip(axes[row], names, strict=True):
            values = curves[step, name]
            time = np.arange(values.shape[1]) * every
            for place, label in enumerate(("train", "test")):
                mean, deviation = values[..., place].mean(0), values[..., place].std(0)
                axis.plot(time, mean, label=label, color=COLORS[place], linestyle=LINES[place])
                axis.fill_between(time, mean - deviation, mean + deviation, color=COLORS[place], alpha=0.25)
            axis.plot(time, baseline[..., 1].mean(0), color="gray", linestyle=":", label="test, nothing transplanted")
            label = f'the paper\'s "{PAPER_LABELS[name]}"' if name in PAPER_LABELS else "not in the paper"
            axis.set_title(f"grokked: {name}\n({label}), step {step}", fontsize=7)
            axis.grid(alpha=0.2)

    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (mean ± deviation)")
    for axis in axes[-1]:
        axis.set_xlabel("training step after the transplant")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    return figure


def draw_swaps(curves: Mapping[str, Any]) -> "Figure":
    """Fig. 10, left: the test accuracy of checkpoints with layers of the final model in them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, color, line in zip(SWAPS, reversed(COLORS), LINES, strict=False):
        axis.plot(curves["step"], curves[name], label=name, color=color, linestyle=line)
    axis.set_xlabel("training step of the checkpoint")
    axis.set_ylabel("test accuracy")
    axis.set_title("layers of the final model in earlier checkpoints", fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)
    return figure


def draw_confusion(matrices: Mapping[tuple[int, str], Tensor]) -> "Figure":
    """Fig. 10, right: the difference of prediction and truth shows as a diagonal."""
    from matplotlib.figure import Figure

    steps, names = sorted({step for step, _ in matrices}), list(dict.fromkeys(name for _, name in matrices))
    figure = Figure(figsize=(4.6 * len(names), 4.2 * len(steps)), layout="constrained")
    axes = figure.subplots(len(steps), len(names), squeeze=False)
    for (step, name), counts in matrices.items():
        axis = axes[steps.index(step), names.index(name)]
        image = axis.imshow(counts.numpy(), vmin=0, vmax=10, cmap="magma_r", interpolation="nearest")
        axis.set_title(f"step {step}, {name}", fontsize=9)
        axis.set_xlabel("predicted (a + b) mod p")
        axis.set_ylabel("right (a + b) mod p")

    figure.colorbar(image, ax=axes, label="test samples", shrink=0.6, extend="max")
    return figure


def main(arguments: list[str]) -> None:
    config = configure("pipeline_transplant", arguments)
    if OmegaConf.is_missing(config, "run"):
        sys.exit("say which run to take layers from: python -m recipes.pipeline_transplant run=DIR")
    recorded, run = finished(config.run)
    out = output_directory(config, "pipeline_transplant")

    swapped = swaps(config, run)
    matrices = confusions(config, run, recorded.modulus)
    curves = transplants(recorded, config, run)

    rows = [
        {
            "transplanted": name,
            "from step": step if PARTS[name] else None,
            "test accuracy": float(values[:, -1, 1].mean()),
            "±": float(values[:, -1, 1].std()),
            "train accuracy": float(values[:, -1, 0].mean()),
            "steps to 90% on test": _first(values[..., 1].mean(0) >= 0.9, config.evaluate_every),
        }
        for (step, name), values in curves.items()
    ]
    gain = np.array(swapped[OUTER]) - np.array(swapped["unedited"])
    summary = {
        "steps": config.steps,
        "seeds": len(config.seeds),
        "transplants": rows,
        "swaps": swapped,
        "swap_largest_gain": float(gain.max()),
        "swap_largest_gain_step": swapped["step"][int(gain.argmax())],
        "systematic_errors": {f"{name}, step {step}": systematic(m) for (step, name), m in matrices.items()},
    }
    write_json(out / "summary.json", summary)
    figures = {
        "transplant": draw_transplants(curves, config.evaluate_every),
        "swaps": draw_swaps(swapped),
        "confusion": draw_confusion(matrices),
    }
    save_figures(out / "figures", figures)

    print(f"\nafter at most {config.steps} steps, {len(config.seeds)} seeds\n{table(rows)}")
    print(f"the outer layers swapped in: at most {gain.max():+.3f}, at step {summary['swap_largest_gain_step']}")
    print(f"{out / 'summary.json'}\n{out / 'figures'}")


def _first(found: np.ndarray[Any, Any], every: int) -> int | None:
    """The step of the first evaluation that was found; None if none was."""
    return int(found.argmax()) * every if found.any() else None


if __name__ == "__main__":
    main(sys.argv[1:])
