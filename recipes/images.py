"""The image classifiers of the paper (E.1): model, data, and a training run under a Tracker."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track import Query, Tracker, Trajectory, open_run, where_to_look
from explaind_track.core.faithfulness import faithfulness
from recipes.common import Run
from recipes.data import Split, image_data
from recipes.models import CNN, ResNet9, SmoothCNN

WATCHED = 100
"""Test samples whose loss is explained live, in a run at W&B."""


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of each sample of a batch, (N,)."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def build(config: DictConfig, data: Split, seed: int) -> nn.Module:
    """The model before training, in the memory format of `load`'s images."""
    torch.manual_seed(seed)
    _, channels, side, _ = data.x_train.shape
    classes = int(data.y_train.max()) + 1
    cnns = {"cnn": CNN, "smooth_cnn": SmoothCNN}
    kind = cnns.get(config.model)
    model: nn.Module = ResNet9(channels, classes) if kind is None else kind(side, channels, classes)
    return model.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def make_optimizer(config: DictConfig, model: nn.Module, steps_per_epoch: int) -> tuple[Any, Any]:
    """The optimizer, and the schedule of its learning rate (a triangle over all epochs, or none).

    Raises ValueError for a peak that is not within the epochs.
    """
    if config.peak is not None and not 0 < config.peak < config.epochs:
        raise ValueError(f"the learning rate's peak={config.peak} has to lie between 0 and epochs={config.epochs}")
    options = {name: value for name, value in config.optimizer.items() if value is not None and name != "name"}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    optimizer = getattr(torch.optim, config.optimizer.name)(model.parameters(), **options)

    def factor(step: int) -> float:
        if config.peak is None:
            return 1.0
        peak, end = config.peak * steps_per_epoch, config.epochs * steps_per_epoch
        return float(min((step + 1) / peak, (end - step) / (end - peak)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def batches(size: int, config: DictConfig, seed: int) -> Iterator[Tensor]:
    """The indices of every step's batch: each epoch in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        yield from torch.randperm(size, generator=generator).split(config.batch)


def train(config: DictConfig, data: Split, seed: int, directory: Path) -> Run:
    """Trains a model and records it in `directory`.

    If `config.project` names a project of W&B, the record goes there too, with panels of what changes the loss of some
    test samples.
    """
    model = build(config, data, seed)
    size = len(data.y_train)
    steps_per_epoch = -(-size // config.batch)
    optimizer, schedule = make_optimizer(config, model, steps_per_epoch)

    run, queries = None, {}
    if config.project is not None:
        queries["test_loss"] = Query.loss(data.x_test[:WATCHED], data.y_test[:WATCHED]).mean()
        options: Any = {**OmegaConf.to_container(config), "seed": seed}  # type: ignore[dict-item]
        run = open_run(config.project, directory.parent, name=f"{config.model}-{seed}", config=options)
    tracker = Tracker(model, optimizer, queries=queries, run=run, trajectory=directory)

    with tqdm(batches(size, config, seed), "train", config.epochs * steps_per_epoch, unit="step") as bar:
        for index in bar:
            batch = data.training_batch(index)
            with tracker.step():
                optimizer.zero_grad()
                tracker.batch(batch, index=index)
                loss = sample_loss(model, batch).mean()
                loss.backward()
                optimizer.step()
                tracker.log({"train/loss": loss.item()})
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}")

    tracker.finish()
    if run is not None:
        run.finish()
        print(where_to_look(run))
    return Run(model.eval(), data, Trajectory.open(directory))


def obtain(config: DictConfig, data: Split, seed: int, directory: Path) -> Run:
    """The run of this seed: the one that `config.trajectory` holds, if it is of `config.seed`, or a new one."""
    if config.trajectory is None or seed != config.seed:
        return train(config, data, seed, directory)

    model, trajectory = build(config, data, seed), Trajectory.open(config.trajectory)
    trajectory.check_model(model)
    model.load_state_dict(trajectory.state_dict(len(trajectory)))
    return Run(model.eval(), data, trajectory)


def fit(config: DictConfig, model: nn.Module, x: Tensor, y: Tensor, seed: int, weight: Tensor | None = None) -> None:
    """Trains a model on these samples as `train` does, without watching it. weight: by which their losses are
    multiplied, (N,)."""
    optimizer, schedule = make_optimizer(config, model, -(-len(y) // config.batch))
    for index in batches(len(y), config, seed):
        optimizer.zero_grad()
        losses = sample_loss(model, (x[index], y[index]))
        (losses if weight is None else losses * weight[index]).mean().backward()
        optimizer.step()
        schedule.step()


def load(config: DictConfig) -> Split:
    """The data that the configuration names, channels last: the CNN trains 1.6 times as fast so on a CPU."""
    data = image_data(config.data.name, config.data.path, config.data.train, config.data.test).to(config.device)
    x_train, x_test = (x.contiguous(memory_format=torch.channels_last) for x in (data.x_train, data.x_test))
    return replace(data, x_train=x_train, x_test=x_test)


@torch.no_grad()
def log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output on x, (X, classes), a thousand inputs at a time."""
    return torch.cat([model(chunk) for chunk in x.split(1000)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of inputs x whose class the model finds."""
    return float((log_probabilities(model, x).argmax(-1) == y).float().mean())


def compare(before: Tensor, after: Tensor, y: Tensor) -> Mapping[str, float]:
    """A model before and after a change, by log-probabilities (X, classes): the accuracy after it on the labels y, the
    agreement of decisions, and KL(before ‖ after) in nats."""
    return {"accuracy": float((after.argmax(-1) == y).float().mean()), **faithfulness(before, after)}
