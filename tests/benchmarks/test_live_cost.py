"""What live influences cost, as a ratio to the training step they explain, in one process.

pytest -m slow tests/benchmarks/test_live_cost.py -s
"""

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from explaind_track import Explainer, Quadrature, Query, Step, StepObserver, resolve_groups
from explaind_track.core.step import State
from explaind_track.engine.functional import Functional
from explaind_track.engine.per_sample import sample_gradients
from recipes.data import Split, modulo_addition
from recipes.models import ModuloTransformer
from recipes.modulo_addition import GROUPS, sample_loss

pytestmark = pytest.mark.slow


class Training:
    """The main job's model, data and optimizer; `step` trains, and keeps the times of training and of watching it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.data: Split = modulo_addition(113, 4000, 2000, 0)
        self.model = ModuloTransformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=4.0)
        self.observer = StepObserver(self.optimizer, dict(self.model.named_parameters()))
        self.training: list[float] = []
        self.watching: list[float] = []

    def step(self) -> Step:
        times = [perf_counter()]
        if self.training:
            self.observer.settle()
        times.append(perf_counter())
        self.optimizer.zero_grad()
        F.nll_loss(self.model(self.data.x_train), self.data.y_train).backward()
        times.append(perf_counter())
        self.observer.before({})
        times.append(perf_counter())
        self.optimizer.step()
        times.append(perf_counter())
        step = self.observer.after(len(self.training), {})
        times.append(perf_counter())
        settled, backward, before, stepped, after = (end - start for start, end in pairwise(times))
        self.training.append(backward + stepped)
        self.watching.append(settled + before + after)
        return step

    def groups(self) -> dict[str, tuple[str, ...]]:
        return resolve_groups(GROUPS, dict(self.model.named_parameters()))


QUERIES: dict[str, Callable[[Split], Query]] = {
    "200 queries x 115 outputs": lambda data: Query.outputs(data.x_test[:200]),
    "mean loss of 200 queries": lambda data: Query.loss(data.x_test[:200], data.y_test[:200]).mean(),
}


@pytest.mark.parametrize("name", QUERIES)
def test_live_influence_against_the_training_step(name: str, benchmark: BenchmarkFixture) -> None:
    training = Training()
    keep = [("step", "group"), ("query", "output")]
    query = QUERIES[name](training.data)
    parts = ("kernel", "regularization")
    explainer = Explainer(training.model, query, training.groups(), keep, parts, Quadrature.fixed(1))
    explainer.add(training.step())

    def setup() -> tuple[tuple[Step], dict[str, object]]:
        return (training.step(),), {}

    benchmark.pedantic(explainer.add, setup=setup, rounds=40)
    step, watching = median(training.training[1:]), median(training.watching[1:])
    influence = benchmark.stats.stats.median
    benchmark.extra_info |= {"training_step": step, "watching": watching, "ratio": influence / step}
    print(
        f"\n{name}: training step {step:.4f} s, influences {influence:.4f} s: {influence / step:.2f}; "
        f"with watching the optimizer {(influence + watching) / step:.2f}"
    )


@pytest.mark.parametrize("size", [50, 100, 200, 400, 800, 1600])
def test_chunks_of_per_sample_gradients(size: int, benchmark: BenchmarkFixture) -> None:
    """By which `per_sample.CHUNK_BYTES` was chosen: 4000 samples in chunks of `size`."""
    training = Training()
    functional = Functional(training.model)
    state = State({name: p.detach() for name, p in training.model.named_parameters()}, {})
    data = training.data

    def run() -> None:
        for start in range(0, 4000, size):
            piece = slice(start, start + size)
            sample_gradients(functional, sample_loss, state, (data.x_train[piece], data.y_train[piece]))

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
