"""What the derivative of a run costs, against the influences of the same samples on the same targets, in one process
and in turns: seconds of the processor.

The influences take the gradients of all samples once, and a product of each with each target's direction. The
derivative takes a Hessian-vector product of the whole batch for each target, about two forward and two backward passes,
which no two targets share. So the ratio is bounded where a parameter is used once for a sample, for then that product
with the direction is as much work as a forward pass; and where it is used often, as in convolutions, it grows with the
targets.

pytest -m slow tests/benchmarks/test_counterfactual_cost.py -s
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Quadrature, Query, Tracker, Trajectory, counterfactual, explain
from recipes.models import CNN

pytestmark = pytest.mark.slow

STEPS, BATCH, ROUNDS = 3, 256, 3
TARGETS = (1, 10, 100)


@dataclass(frozen=True)
class Job:
    """A model, and inputs of the shape that it takes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        size = STEPS * BATCH
        return torch.randn(size, *self.shape, generator=generator), torch.randint(10, (size,), generator=generator)


def perceptron() -> nn.Module:
    """235,146 parameters, each used once for a sample."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)
    )


JOBS = {"CNN": Job(CNN, (1, 28, 28)), "perceptron": Job(perceptron, (1, 28, 28))}


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(job: Job, directory: Path) -> nn.Module:
    torch.manual_seed(0)
    model, (x, y) = job.make(), job.data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, eps=1e-4)
    tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
    for index in torch.arange(len(y)).split(BATCH):
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            optimizer.step()
    tracker.finish()
    return model


@pytest.mark.parametrize("name", JOBS)
def test_the_derivative_against_the_split(name: str, tmp_path: Path) -> None:
    job = JOBS[name]
    model, (x, y) = train(job, tmp_path / "t"), job.data()
    trajectory = Trajectory.open(tmp_path / "t")
    options: dict[str, Any] = {
        "keep": ("query", "sample"), "sample_loss": sample_loss, "data": lambda index: (x[index], y[index]),
        "progress": False,
    }  # fmt: skip

    print(f"\n{name}\n targets   split s  derivative s   ratio  ms a target and step")
    for targets in TARGETS:
        query = Query.loss(x[:targets], y[:targets])

        def split(query: Query = query) -> Any:
            return explain(trajectory, model, query, quadrature=Quadrature.fixed(1), **options)

        def derivative(query: Query = query) -> Any:
            return counterfactual(trajectory, model, query, **options)

        times: dict[Any, list[float]] = {split: [], derivative: []}
        for _ in range(ROUNDS):
            for what, taken in times.items():
                started = process_time()
                what()
                taken.append(process_time() - started)
        one, other = (median(taken) for taken in times.values())
        print(f"{targets:8} {one:9.3f} {other:13.3f} {other / one:7.1f} {1000 * other / STEPS / targets:21.1f}")
