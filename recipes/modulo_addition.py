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

from explaind_track import Influence, Quadrature, Query, Task, Tracker, Trajectory, open_run, where_to_look
from explaind_track.analysis import plots
from explaind_track.wandb_io.artifacts import directory_mb
from recipes.common import configure, output_directory, write_json
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
    return F.nll_loss(model(batch[0]), batch[1], reduction="none")


def fresh_model(config: DictConfig, seed: int) -> ModuloTransformer:
    """The model before training."""
    torch.manual_seed(seed)
    return ModuloTransformer(tokens=config.modulus + 2).to(config.device)


def build(config: DictConfig) -> tuple[ModuloTransformer, Split]:
    """The model before training, and the data."""
    model = fresh_model(config, config.seed)
    return model, modulo_addition(config.modulus, config.train, config.test, config.seed).to(config.device)


def make_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.AdamW:
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def finished(directory: str) -> tuple[DictConfig, ModuloTransformer, Split, Trajectory]:
    """The configuration, the model (as it was before training), the data and the record of a finished run of this
    recipe; exits with a message if there is none."""
    run = Path(directory)
    if not (run / "config.yaml").is_file() or not (run / "trajectory").is_dir():
        sys.exit(f"run={run} holds no run of recipes.modulo_addition: there is no config.yaml or no trajectory in it")
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)  # a mapping at the top
    return config, *build(config), Trajectory.open(run / "trajectory")


def held_out(config: DictConfig, data: Split) -> Query:
    """The queries: the first samples of the test set."""
    return Query.outputs(data.x_test[: config.queries], data.y_test[: config.queries])


def task(run: str) -> Task:
    """The job behind a run, as `explaind-track explain RUN recipes.modulo_addition:task` asks for it. run: a directory
    of results; for what has no config.yaml, such as a trajectory at W&B, the job of the defaults."""
    path = Path(run) / "config.yaml"
    config = OmegaConf.load(path if path.is_file() else Path(__file__).with_suffix(".yaml"))
    assert isinstance(config, DictConfig)  # a mapping at the top
    model, split = build(config)

    def data(index: Tensor) -> tuple[Tensor, Tensor]:
        return split.x_train[index], split.y_train[index]

    return Task(model, held_out(config, split), GROUPS, sample_loss, data)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())


def train(config: DictConfig, tracker: Tracker, data: Split) -> dict[str, list[float]]:
    """Trains until the test accuracy is 1 and `config.go_on` steps more, at most `config.steps` in all. Returns what
    Fig. 3(a) shows of accuracy."""
    model, optimizer = tracker.model, tracker.optimizer
    index = torch.arange(len(data.y_train))
    curve: dict[str, list[float]] = {"step": [], "train": [], "test": []}
    last = config.steps
    with tqdm(total=last, desc="train", unit="step") as bar:
        while tracker.number < last:
            with tracker.step():
                optimizer.zero_grad()
                tracker.batch((data.x_train, data.y_train), index=index)
                if tracker.samples_due:
                    loss = tracker.backward()
                else:
                    loss = F.nll_loss(model(data.x_train), data.y_train)
                    loss.backward()
                    tracker.log({"train/loss": loss.item()})
                optimizer.step()
            bar.update()
            if tracker.number % config.evaluate_every == 0 or tracker.number == last:
                train_accuracy = accuracy(model, data.x_train, data.y_train)
                test_accuracy = accuracy(model, data.x_test, data.y_test)
                tracker.log({"train/accuracy": train_accuracy, "test/accuracy": test_accuracy})
                for key, value in zip(curve, (tracker.number, train_accuracy, test_accuracy), strict=True):
                    curve[key].append(value)
                bar.set_postfix(
                    loss=f"{loss.item():.4f}",
                    train=f"{train_accuracy:.3f}",
                    test=f"{test_accuracy:.3f}",
                    residual=f"{tracker.residual('query'):.4f}",
                )
                if test_accuracy == 1.0:
                    last = min(last, tracker.number + config.go_on)
    return curve


def summarize(tracker: Tracker, curve: dict[str, list[float]], trajectory: Path) -> dict[str, Any]:
    """The run in one flat mapping."""
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


def draw(influence: Influence, curve: dict[str, list[float]], directory: Path) -> None:
    directory.mkdir()
    figure = plots.training(influence, curve, "nats")
    figure.savefig(directory / "training.png", dpi=130)


def main(arguments: list[str]) -> None:
    started = perf_counter()
    config = configure("modulo_addition", arguments)
    out = output_directory(config.out, "modulo_addition")
    OmegaConf.save(config, out / "config.yaml")
    model, data = build(config)
    optimizer = make_optimizer(config, model)
    run = open_run(config.project, out, name=out.name, config=OmegaConf.to_container(config))
    queries = {
        "query": held_out(config, data),
        "query_loss": Query.loss(data.x_test[: config.queries], data.y_test[: config.queries]).mean(),
    }
    tracker = Tracker(
        model,
        optimizer,
        queries=queries,
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
    summary = summarize(tracker, curve, out / "trajectory")
    tracker.influence("query").save(out / "influence.safetensors")
    draw(tracker.influence("query"), curve, out / "figures")
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
