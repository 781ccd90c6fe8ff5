"""What `describe()` says a request will take, and what it takes: on the modulo-113 Transformer, in one run.

pytest -m slow tests/benchmarks/test_estimates.py -s
"""

from time import perf_counter
from typing import Any

import pytest
import torch

from explaind_track import Quadrature, Query, Tracker, Trajectory, plan_explanation
from recipes.data import modulo_addition
from recipes.models import ModuloTransformer
from recipes.modulo_addition import GROUPS, sample_loss

pytestmark = pytest.mark.slow

STEPS = 210
DATA = modulo_addition(113, 4000, 2000, 0)
OUTPUTS = Query.outputs(DATA.x_test[:200])
LOSS = Query.loss(DATA.x_test[:200], DATA.y_test[:200])
ONE_NODE: dict[str, Any] = {"quadrature": Quadrature.fixed(1)}
OF_SAMPLES: dict[str, Any] = {
    **ONE_NODE,
    "sample_loss": sample_loss,
    "data": lambda index: (DATA.x_train[index], DATA.y_train[index]),
}

REQUESTS: dict[str, tuple[Query, dict[str, Any]]] = {
    "a map of Fig. 4: 200 queries × 1,000 samples by layer": (
        OUTPUTS,
        {**OF_SAMPLES, "groups": GROUPS, "keep": ("group", "query", "sample"), "window": (160, 210),
         "samples": range(1000)},
    ),
    "groups, refined to the tolerance": (OUTPUTS, {"groups": GROUPS, "keep": ("group",), "window": (100, 160)}),
    "steps × groups, one node": (OUTPUTS, {**ONE_NODE, "groups": GROUPS, "keep": ("step", "group")}),
    "steps × groups of a mean loss": (LOSS.mean(), {**ONE_NODE, "groups": GROUPS, "keep": ("step", "group")}),
    "all samples on a mean loss, by JVP": (LOSS.mean(), {**OF_SAMPLES, "keep": ("sample",), "window": (160, 210)}),
    "steps × samples × 20 queries, in several walks": (
        Query.loss(DATA.x_test[:20], DATA.y_test[:20]),
        {**OF_SAMPLES, "keep": ("step", "query", "sample"), "window": (205, 210), "samples": range(500),
         "memory": 2**26},
    ),
    "by the step at which 200 samples were seen, 10 queries": (
        LOSS.mean(),
        {**OF_SAMPLES, "groups": GROUPS, "keep": ("seen", "group", "sample"), "window": (200, 210),
         "samples": range(200)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    torch.manual_seed(0)
    model, directory = ModuloTransformer(), tmp_path_factory.mktemp("run") / "t"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=4.0)
    tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
    for _ in range(STEPS):
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((DATA.x_train, DATA.y_train), index=torch.arange(4000))
            sample_loss(model, (DATA.x_train, DATA.y_train)).mean().backward()
            optimizer.step()
    tracker.finish()
    return Trajectory.open(directory)


@pytest.mark.parametrize("name", REQUESTS)
def test_estimate_against_the_time_it_takes(trajectory: Trajectory, name: str) -> None:
    query, options = REQUESTS[name]
    options = {**options, "progress": False}
    started = perf_counter()
    estimate = plan_explanation(trajectory, ModuloTransformer(), query, **options).seconds()
    tried = perf_counter() - started
    started = perf_counter()
    plan_explanation(trajectory, ModuloTransformer(), query, **options).run()
    taken = perf_counter() - started
    print(f"\n{name}: estimate {estimate:.1f} s (found in {tried:.1f} s), took {taken:.1f} s: {estimate / taken:.2f}")
    assert estimate > 0
