"""What influences of training samples cost as the data set grows, against the definition with a momentum buffer for
every sample, in one run.

pytest -m slow tests/benchmarks/test_sample_cost.py -s
"""

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.path_integral import gauss_legendre
from explaind_track.engine.per_sample import sample_gradients

pytestmark = pytest.mark.slow

BATCH, STEPS, QUERIES = 256, 10, 100
SIZES = (1280, 5120, 20480)


def network() -> nn.Module:
    """A small CNN for images of 14 × 14: 31,258 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 10),
    )  # fmt: skip


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def data_of(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 14, 14, generator=generator), torch.randint(10, (count,), generator=generator)


def query() -> Query:
    x, y = data_of(QUERIES)
    return Query.loss(x, y)


def train(count: int, directory: Path) -> None:
    """10 steps on batches drawn from `count` samples."""
    model, (x, y) = network(), data_of(count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.7, 0.9), weight_decay=0.1)
    tracker = Tracker(model, optimizer, queries={"loss": query().mean()}, trajectory=directory, every=10**9)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        index = torch.randperm(count, generator=generator)[:BATCH]
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            optimizer.step()
    tracker.finish()


def by_reverse_replay(count: int, directory: Path) -> Tensor:
    x, y = data_of(count)
    found = explain(
        Trajectory.open(directory), network(), query(), keep=("query", "sample"), quadrature=Quadrature.fixed(1),
        sample_loss=sample_loss, data=lambda index: (x[index], y[index]), progress=False, memory=2**26,
    ).data["influence"]  # fmt: skip
    result = torch.zeros(QUERIES, count)
    result[:, found["sample"].values.tolist()] = torch.from_numpy(found.transpose("query", "sample").values)
    return result


def by_itself(count: int, directory: Path) -> Tensor:
    """One query and one sample of the last step: what the program and its data take before there is anything to do."""
    x, y = data_of(count)
    trajectory = Trajectory.open(directory)
    (batch,) = next(trajectory.steps(STEPS - 1, STEPS)).batches
    assert batch.index is not None
    one = query().rows(0, 1, torch.device("cpu"))
    found = explain(
        trajectory, network(), one, keep=("query", "sample"), window=(STEPS - 1, STEPS), samples=[int(batch.index[0])],
        quadrature=Quadrature.fixed(1), sample_loss=sample_loss, data=lambda index: (x[index], y[index]),
        progress=False,
    ).data["influence"]  # fmt: skip
    return torch.from_numpy(found.values)


def by_the_definition(count: int, directory: Path) -> Tensor:
    """A momentum buffer for every sample, decayed and multiplied with the test features at every step."""
    model, (x, y) = network(), data_of(count)
    features = Features(Functional(model), query(), 2**28)
    momentum = {name: torch.zeros(count, value.numel()) for name, value in model.named_parameters()}
    result = torch.zeros(QUERIES, count)
    for step in Trajectory.open(directory).steps():
        (batch,) = step.batches
        assert batch.index is not None
        chunk = (x[batch.index], y[batch.index])
        gradients, _ = sample_gradients(Functional(model), sample_loss, step.before, chunk)
        for name, rows in features.of(step, gauss_legendre(1)).items():
            update = step.updates[name]
            own = momentum[name].mul_(update.rule.beta)
            own.index_add_(0, batch.index, gradients[name].flatten(1), alpha=update.rule.b / BATCH)
            test = update.precondition(rows).flatten(1) * update.rule.e
            result.addmm_(test, own.T)
    return result


def measured(what: Callable[[int, Path], Tensor], count: int, directory: Path) -> tuple[float, float, Tensor]:
    """Seconds per step, MB, and the result, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (what, count, directory))


def _measure(what: Callable[[int, Path], Tensor], count: int, directory: Path) -> tuple[float, float, Tensor]:
    torch.set_num_threads(1)
    what(count, directory)  # once more than it takes to measure: without what the first call pays for
    started = perf_counter()
    result = what(count, directory)
    seconds = (perf_counter() - started) / STEPS
    return seconds, _peak_mb(), result


def _peak_mb() -> float:
    """Of this program; `ru_maxrss` would count what its process held before it became this program, too."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1024


def test_cost_as_the_data_set_grows(tmp_path: Path) -> None:
    rows: list[tuple[Any, ...]] = []
    print("\n samples  reverse s/step      MB  definition s/step      MB    time  memory")
    for count in SIZES:
        train(count, tmp_path / str(count))
        _, idle, _ = measured(by_itself, count, tmp_path / str(count))
        reverse, reverse_mb, found = measured(by_reverse_replay, count, tmp_path / str(count))
        forward, forward_mb, wanted = measured(by_the_definition, count, tmp_path / str(count))
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
        rows.append((reverse, reverse_mb - idle, forward, forward_mb - idle))
        a, a_mb, b, b_mb = rows[-1]
        print(f"{count:8} {a:15.4f} {a_mb:7.0f} {b:18.4f} {b_mb:7.0f} {b / a:7.1f} {b_mb / a_mb:7.1f}")


def _nothing(count: int, directory: Path) -> Tensor:
    """The memory of the libraries, the model and the data."""
    network()(data_of(count)[0][:BATCH]).sum().backward()
    return torch.zeros(1)
