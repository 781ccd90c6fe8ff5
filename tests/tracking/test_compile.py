"""Compiled models and optimizers: training stays compiled, and the names are those of the plain model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query, Tracker, Trajectory, explain

pytestmark = pytest.mark.filterwarnings("ignore::explaind_track.errors.ReplayWarning")

GROUPS = {"body": "body.*", "head": "head.*"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Counter:
    """A back end of the compiler that runs graphs as they are, and counts their runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


def whole(model: Net, backend: Counter) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: Net, backend: Counter) -> nn.Module:
    model.compile(backend=backend)
    return model


def one_module(model: Net, backend: Counter) -> nn.Module:
    model.body = torch.compile(model.body, backend=backend)
    return model


def as_it_is(model: Net, backend: Counter) -> nn.Module:
    return model


def train(wrap: Callable[[Net, Counter], nn.Module], directory: Path, tracked: bool = True) -> tuple[Any, list[int]]:
    """Six steps; the Tracker (or the model), and how often a graph ran in each forward pass of the loop."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend, model = Counter(), Net().double()
    made, x, y = wrap(model, backend), torch.randn(12, 4).double(), torch.arange(12) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    queries = {"q": Query.outputs(x[:4]), "loss": Query.loss(x[:4], y[:4]).mean()}
    options: dict[str, Any] = {"queries": queries, "groups": GROUPS, "sample_loss": sample_loss, "samples_every": 2}
    tracker = Tracker(made, optimizer, trajectory=directory, **options) if tracked else None

    runs = []
    for number in range(6):
        index = torch.arange(number, number + 5)
        optimizer.zero_grad()
        if tracker is None:
            sample_loss(made, (x[index], y[index])).mean().backward()
            optimizer.step()
            continue
        with tracker.step():
            tracker.batch((x[index], y[index]), index=index)
            before = backend.runs
            loss = sample_loss(made, (x[index], y[index])).mean()
            runs.append(backend.runs - before)
            loss.backward()
            optimizer.step()
    if tracker is None:
        return made, runs
    tracker.finish()
    return tracker, runs


@pytest.mark.parametrize("wrap", [whole, in_place, one_module])
def test_training_stays_compiled_and_is_the_same(wrap: Callable[[Net, Counter], nn.Module], tmp_path: Path) -> None:
    tracker, runs = train(wrap, tmp_path / "t")
    assert all(count > 0 for count in runs)

    plain, _ = train(as_it_is, tmp_path / "plain")
    untracked, _ = train(wrap, tmp_path, tracked=False)
    for other in (plain.model, untracked):
        for one, two in zip(tracker.model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
    assert tracker.influence("q").data.equals(plain.influence("q").data)

    trajectory = Trajectory.open(tmp_path / "t")
    assert list(trajectory.state_dict(3)) == list(Net().state_dict())
    options: dict[str, Any] = {"groups": GROUPS, "quadrature": tracker.quadrature, "progress": False}
    found = explain(trajectory, tracker.model, tracker_query(), parts=tracker.parts("q"), **options)
    assert abs(found.data["influence"] - tracker.influence("q").data["influence"]).max() == 0


def tracker_query() -> Query:
    torch.manual_seed(0)
    Net()
    return Query.outputs(torch.randn(12, 4).double()[:4])


def test_a_compiled_optimizer_step_is_watched(tmp_path: Path) -> None:
    """It corrects the moments' bias in float32, which the replay does not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(12, 4).double()
    optimizer, backend = torch.optim.AdamW(model.parameters(), lr=0.01), Counter()
    step = torch.compile(optimizer.step, backend=backend)
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(x[:4])}, groups=GROUPS, trajectory=tmp_path / "t")
    for _ in range(3):
        with tracker.step():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            step()
    tracker.finish()

    assert backend.runs >= 3
    assert tracker.number == 3
    options: dict[str, Any] = {"groups": GROUPS, "quadrature": tracker.quadrature, "progress": False}
    trajectory = Trajectory.open(tmp_path / "t")
    found = explain(trajectory, model, Query.outputs(x[:4]), parts=tracker.parts("q"), **options)
    live = tracker.influence("q").data["influence"]
    assert float(abs(found.data["influence"] - live).max()) <= 1e-4 * float(abs(live).max())
