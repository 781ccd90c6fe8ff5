"""What live influences cost, as a ratio to the training step they explain, in one process.

pytest -m slow tests/benchmarks/test_live_cost.py -s
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from explaind_track import Explainer, Quadrature, Query, Step, Stepper, Tracker, resolve_groups
from explaind_track.autodiff import Functional, sample_gradients
from explaind_track.step import State
from recipes.data import Split, modulo_addition
from recipes.models import ModuloTransformer
from recipes.modulo_addition import GROUPS, sample_loss

pytestmark = pytest.mark.slow


class Training:
    """The main job's model, data and optimizer; `step` trains and keeps the times it takes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.data: Split = modulo_addition(113, 4000, 2000, 0)
        self.model = ModuloTransformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=4.0)
        self.stepper = Stepper(self.optimizer, dict(self.model.named_parameters()))
        self.seconds: list[float] = []

    def step(self) -> Step:
        started = perf_counter()
        self.optimizer.zero_grad()
        F.nll_loss(self.model(self.data.x_train), self.data.y_train).backward()
        watching = perf_counter()
        self.stepper.before()
        watched = perf_counter()
        self.optimizer.step()
        self.seconds.append(perf_counter() - started - (watched - watching))
        return self.stepper.after(len(self.seconds) - 1, ({}, {}))

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
    parts = Tracker._parts(query)
    explainer = Explainer(training.model, query, training.groups(), keep, parts, Quadrature.fixed(1))
    explainer.add(training.step())
    training.seconds.clear()

    def setup() -> tuple[tuple[Step], dict[str, object]]:
        return (training.step(),), {}

    benchmark.pedantic(explainer.add, setup=setup, rounds=40)
    ratio = benchmark.stats.stats.median / median(training.seconds)
    benchmark.extra_info |= {"training_step_seconds": median(training.seconds), "ratio": ratio}
    print(
        f"\n{name}: {benchmark.stats.stats.median:.4f} s, training step {median(training.seconds):.4f} s: {ratio:.2f}"
    )


@pytest.mark.parametrize("size", [50, 100, 200, 400, 800, 1600])
def test_chunks_of_per_sample_gradients(size: int, benchmark: BenchmarkFixture) -> None:
    """By which `samples.CHUNK_BYTES` was chosen: 4000 samples in chunks of `size`."""
    training = Training()
    functional = Functional(training.model)
    state = State({name: p.detach() for name, p in training.model.named_parameters()}, {})
    data = training.data

    def run() -> None:
        for start in range(0, 4000, size):
            piece = slice(start, start + size)
            sample_gradients(functional, sample_loss, state, (data.x_train[piece], data.y_train[piece]))

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
