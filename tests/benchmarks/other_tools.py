"""What each of the packages of this field takes for what it offers: on the same CNN, data and queries as ours.

Each is a function of a `Race` → a function that does the work once. A package that is not installed raises ImportError.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import cnn, cross_entropy, images

from explaind_track import Quadrature, Query, Tracker, Trajectory, counterfactual, explain

SAMPLES, QUERIES, BATCH, STEPS = 1280, 50, 128, 20


@dataclass(frozen=True)
class Race:
    """A CNN that was trained for 20 steps, its record, and what is asked of it: 1,280 samples' scores on 50 losses."""

    model: nn.Module
    directory: Path
    train: TensorDataset
    test: TensorDataset

    @classmethod
    def prepare(cls, directory: Path) -> "Race":
        torch.manual_seed(0)
        model, (x, y) = cnn(), images(SAMPLES, (1, 14, 14), 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        for step in range(STEPS):
            index = torch.arange(BATCH) + step * BATCH % SAMPLES
            with tracker.step():
                optimizer.zero_grad()
                tracker.batch((x[index], y[index]), index=index)
                cross_entropy(model, (x[index], y[index])).mean().backward()
                optimizer.step()
        tracker.finish()
        return cls(model, directory, TensorDataset(x, y), TensorDataset(*images(QUERIES, (1, 14, 14), 1)))

    @property
    def task(self) -> dict[str, Any]:
        x, y = self.train.tensors
        return {"sample_loss": cross_entropy, "data": lambda index: (x[index], y[index]), "progress": False}


def path_kernel(race: Race) -> Callable[[], Any]:
    query, trajectory = Query.loss(*race.test.tensors), Trajectory.open(race.directory)
    rule = Quadrature.fixed(1)
    return lambda: explain(trajectory, race.model, query, keep=("query", "sample"), quadrature=rule, **race.task)


def metagradient(race: Race) -> Callable[[], Any]:
    query, trajectory = Query.loss(*race.test.tensors), Trajectory.open(race.directory)
    return lambda: counterfactual(trajectory, race.model, query, **race.task)


def _by_dattri(race: Race, of: str) -> Callable[[], Any]:
    from dattri.algorithm import TracInAttributor, TRAKAttributor
    from dattri.task import AttributionTask

    def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(torch.func.functional_call(race.model, parameters, (x[None],)), y[None])

    def probability(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.exp(-loss(parameters, batch))

    weights = {name: value.detach() for name, value in race.model.named_parameters()}

    def work() -> Any:
        task = AttributionTask(loss_func=loss, model=race.model, checkpoints=[weights])
        if of == "TRAK":
            projected = {"proj_dim": 512, "device": "cpu"}
            attributor: Any = TRAKAttributor(task, probability, regularization=1e-3, projector_kwargs=projected)
            attributor.cache(DataLoader(race.train, BATCH))
            return attributor.attribute(DataLoader(race.test, BATCH))
        attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False)
        return attributor.attribute(DataLoader(race.train, BATCH), DataLoader(race.test, BATCH))

    return work


def tracin(race: Race) -> Callable[[], Any]:
    return _by_dattri(race, "TracIn")


def trak(race: Race) -> Callable[[], Any]:
    return _by_dattri(race, "TRAK")


def ekfac(race: Race) -> Callable[[], Any]:
    from kronfluence import Analyzer, Task, prepare_model

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            output = model(batch[0])
            labels = torch.multinomial(output.detach().softmax(1), 1).flatten() if sample else batch[1]
            return F.cross_entropy(output, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    task = Classification()
    model = prepare_model(cnn(), task)

    def work() -> Any:
        with tempfile.TemporaryDirectory() as directory:
            analyzer = Analyzer("race", model, task, cpu=True, disable_tqdm=True, output_dir=directory)
            analyzer.fit_all_factors("ekfac", race.train, per_device_batch_size=BATCH)
            return analyzer.compute_pairwise_scores(
                "scores", "ekfac", race.test, race.train, per_device_query_batch_size=QUERIES,
                per_device_train_batch_size=BATCH,
            )  # fmt: skip

    return work


SCORES: dict[str, tuple[Callable[[Race], Callable[[], Any]], str]] = {
    "explaind_track `explain`": (path_kernel, "exact split of this run, every step (midpoints)"),
    "explaind_track `counterfactual`": (metagradient, "exact derivative of this run"),
    "dattri TracIn": (tracin, "first order, last checkpoint alone"),
    "dattri TRAK": (trak, "linearized, last checkpoint alone, projected to 512"),
    "kronfluence EK-FAC": (ekfac, "influence function at the last checkpoint, Kronecker-factored curvature"),
}
"""Ways to scores of 1,280 samples on 50 losses, and what is approximated."""


def plain_backward(race: Race) -> Callable[[], Any]:
    x, y = (tensor[:BATCH] for tensor in race.train.tensors)
    return lambda: cross_entropy(race.model, (x, y)).mean().backward()


def by_vmap(race: Race) -> Callable[[], Any]:
    from torch.func import functional_call, grad, vmap

    x, y = (tensor[:BATCH] for tensor in race.train.tensors)
    weights = {name: value.detach() for name, value in race.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(race.model, parameters, (one[None],)), label[None])

    return lambda: vmap(grad(loss), (None, 0, 0))(weights, x, y)


def tracked_backward(race: Race) -> Callable[[], Any]:
    x, y = (tensor[:BATCH] for tensor in race.train.tensors)
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    # only its backward pass is looked at: the first step is explained, in the turn that is not counted
    queries = {"one": Query.loss(x[:1], y[:1]).mean()}
    tracker = Tracker(model, optimizer, queries=queries, sample_loss=cross_entropy, every=10**9)

    def work() -> None:
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x, y))
            tracker.backward()

    return work


def opacus(race: Race) -> Callable[[], Any]:
    from opacus import GradSampleModule

    x, y = (tensor[:BATCH] for tensor in race.train.tensors)
    model = GradSampleModule(cnn())

    def work() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return work


GRADIENTS: dict[str, tuple[Callable[[Race], Callable[[], Any]], str]] = {
    "`loss.backward()`": (plain_backward, "no gradients of samples: the 1 that the others are measured by"),
    "explaind_track `tracker.backward()`": (tracked_backward, "norms of the samples' gradients, and their sum"),
    "`torch.func` `vmap(grad)`": (by_vmap, "every sample's gradient"),
    "opacus `GradSampleModule`": (opacus, "every sample's gradient"),
}
"""Ways to the gradients of 128 samples."""
