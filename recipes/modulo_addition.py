"""The main job: trains the modulo-113 Transformer until it groks and watches its influences at every step.

    python -m recipes.modulo_addition [key=value …]

`out` receives summary.json, figures/, trajectory/, influence.safetensors, config.yaml and the W&B run. Fig. 3(a) of
the paper, and the check of its Table 1.
"""

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track import Quadrature, Query, Task, Tracker, Trajectory, open_run, where_to_look
from explaind_track.analysis import plots
from explaind_track.record.files import directory_mb
from recipes.common import Run, configure, load_config, output_directory, save_figures, write_json
from recipes.data import Split, modulo_addition
from recipes.models import ModuloTransformer

GROUPS = {
    "embedding": "embedding.*",
    "att_encoder": "attention.encoder.*",
    "att_decoder": "attention.decoder.*",
    "linear1": "linear1.*",
    "linear2": "linear2.*",
    "decoder": "decoder.*",
}
"""The layers of Fig. 3."""


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of each sample of a batch, (N,)."""
    return F.nll_loss(model(batch[0]), batch[1], reduction="none")


def fresh_model(config: DictConfig, seed: int) -> ModuloTransformer:
    """The model before training; drawn in float32 whatever its precision, so that a seed begins at the same weights."""
    torch.manual_seed(seed)
    precision = {"float64": torch.float64, "float32": torch.float32}[config.dtype]
    return ModuloTransformer(tokens=config.modulus + 2).to(config.device, precision)


def build(config: DictConfig) -> tuple[ModuloTransformer, Split]:
    """The model before training, and the data."""
    model = fresh_model(config, config.seed)
    data = modulo_addition(config.modulus, config.train, config.test, config.seed, config.diagonal)
    return model, data.to(config.device)


def make_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of the run, for any model."""
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def held_out(config: DictConfig, data: Split) -> Query:
    """The queries: the first samples of the test set."""
    return Query.outputs(data.x_test[: config.queries], data.y_test[: config.queries])


# ------------------------------------------------------------------ runs that have been trained


def finished(directory: str) -> tuple[DictConfig, Run]:
    """The configuration of a finished run of this recipe, and the run, its model as it was before training.

    Exits with a message if there is none.
    """
    path = Path(directory)
    if not (path / "config.yaml").is_file() or not (path / "trajectory").is_dir():
        sys.exit(f"run={path} holds no run of recipes.modulo_addition: there is no config.yaml or no trajectory in it")
    config = load_config(path / "config.yaml")
    return config, Run(*build(config), Trajectory.open(path / "trajectory"))


def task(run: str) -> Task:
    """The job behind a run, as `explaind-track explain RUN recipes.modulo_addition:task` asks for it.

    run: a directory of results; for what has no config.yaml, such as a trajectory at W&B, the job of the defaults.
    """
    path = Path(run) / "config.yaml"
    config = load_config(path if path.is_file() else Path(__file__).with_suffix(".yaml"))
    model, data = build(config)
    return Task(model, held_out(config, data), GROUPS, sample_loss, data.training_batch)


# ------------------------------------------------------------------ training


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of inputs x whose class the model finds."""
    return float((model(x).argmax(-1) == y).float().mean())


def accuracies(model: nn.Module, data: Split) -> tuple[float, float]:
    """The accuracy on the training and on the test set."""
    return accuracy(model, data.x_train, data.y_train), accuracy(model, data.x_test, data.y_test)


def train(config: DictConfig, tracker: Tracker, data: Split) -> dict[str, list[float]]:
    """Trains until the test accuracy is 1 and `config.go_on` steps more, at most `config.steps` in all.

    Returns the accuracies of Fig. 3(a): on the training and the test set, by step.
    """
    curve: dict[str, list[float]] = {"step": [], "train": [], "test": []}
    last = config.steps
    with tqdm(total=last, desc="train", unit="step") as bar:
        while tracker.number < last:
            loss = take_step(tracker, data)
            bar.update()
            if tracker.number % config.evaluate_every and tracker.number < last:
                continue

            on_train, on_test = accuracies(tracker.model, data)
            tracker.log({"train/accuracy": on_train, "test/accuracy": on_test})
            for key, value in zip(curve, (tracker.number, on_train, on_test), strict=True):
                curve[key].append(value)
            bar.set_postfix(
                loss=f"{loss.item():.4f}",
                train=f"{on_train:.3f}",
                test=f"{on_test:.3f}",
                residual=f"{tracker.residual('query'):.4f}",
            )
            if on_test == 1.0:
                last = min(last, tracker.number + config.go_on)
    return curve


def take_step(tracker: Tracker, data: Split) -> Tensor:
    """Takes a step on the whole training set; returns its loss."""
    batch = (data.x_train, data.y_train)
    with tracker.step():
        tracker.optimizer.zero_grad()
        tracker.batch(batch, index=torch.arange(len(data.y_train)))
        if tracker.samples_due:
            loss = tracker.backward()  # from per-sample gradients, whose norms the table of samples shows
        else:
            loss = F.nll_loss(tracker.model(data.x_train), data.y_train)
            loss.backward()
            tracker.log({"train/loss": loss.item()})
        tracker.optimizer.step()
    return loss


def summarize(tracker: Tracker, curve: dict[str, list[float]], trajectory: Path) -> dict[str, Any]:
    """The run in a flat mapping."""
    residual = tracker.influence("query").residual
    faithfulness = tracker.influence("query", ("query", "output")).faithfulness()

    return {
        "steps": tracker.number,
        "train_accuracy": curve["train"][-1],
        "test_accuracy": curve["test"][-1],
        "epk_agreement": faithfulness["agreement"],
        "epk_kl": faithfulness["kl"],
        "residual_median": float(residual.median()),
        "residual_max": float(residual.max()),
        "seconds_training": round(tracker.seconds["training"], 2),
        "seconds_influence": round(tracker.seconds["influence"], 2),
        "seconds_trajectory": round(tracker.seconds["trajectory"], 2),
        "trajectory_mb": round(directory_mb(trajectory), 1),
    }


def main(arguments: list[str]) -> None:
    started = perf_counter()
    config = configure("modulo_addition", arguments)
    out = output_directory(config, "modulo_addition")
    model, data = build(config)
    run = open_run(config.project, out, name=out.name, config=OmegaConf.to_container(config))
    tracker = Tracker(
        model,
        make_optimizer(config, model),
        queries={
            "query": held_out(config, data),
            "query_loss": Query.loss(data.x_test[: config.queries], data.y_test[: config.queries]).mean(),
        },
        groups=GROUPS,
        sample_loss=sample_loss,
        run=run,
        trajectory=out / "trajectory",
        samples_every=config.samples_every,
        quadrature=Quadrature.fixed(config.nodes),
        keyframe_every=config.keyframe_every,
    )
    curve = train(config, tracker, data)
    tracker.finish()

    influence = tracker.influence("query")
    influence.save(out / "influence.safetensors")
    save_figures(out / "figures", {"training": plots.training(influence, curve, "nats")})
    summary = summarize(tracker, curve, out / "trajectory")
    summary |= {"artifact_staging_mb": tracker.staging_mb, "seconds_total": round(perf_counter() - started, 2)}
    run.summary.update(summary)
    write_json(out / "summary.json", summary)
    run.finish()

    print(f"\n{out / 'summary.json'}")
    for key, value in summary.items():
        print(f"  {key:22} {value}")
    print(f"{out / 'figures' / 'training.png'}\n{where_to_look(run)}")
    print(f"Look at its figures in a browser with `explaind-track report {out}`")


if __name__ == "__main__":
    main(sys.argv[1:])
