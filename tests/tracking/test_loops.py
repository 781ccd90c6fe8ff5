"""Training loops as people have them: influences are exact in each, live and offline, or refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPTIMIZERS
from exactness import measure
from jobs import TESTS
from loops import LOOPS, Loop
from low_precision_loops import LOW_PRECISION_LOOPS
from models import MODELS
from outside_loops import OUTSIDE_LOOPS
from torch import nn

from explaind_track import Query, Tracker
from explaind_track.errors import SampleMismatchWarning


@pytest.mark.parametrize("loop", [*LOOPS, *LOW_PRECISION_LOOPS, *OUTSIDE_LOOPS], ids=lambda loop: loop.id)
def test_a_loop_is_explained_exactly(loop: Loop, tmp_path: Path) -> None:
    """Every warning is an error here, that of samples that do not add up to the step's gradient too."""
    found = measure(loop, tmp_path / "t")
    exact = loop.dtype is torch.float64
    assert found.residual <= (1e-3 if loop.jumps else 1e-6 if exact else 1e-4)
    assert found.prediction <= (1e-8 if exact and not loop.jumps else 1e-4)
    assert found.offline == 0
    assert loop.rounded or loop.jumps or not found.audit
    if loop.refused:
        assert loop.refused in found.refusal
    else:
        assert found.samples <= (1e-9 if exact else 0.1 if loop.rounded or loop.is_low_precision else 1e-4)


def test_the_page_tells_of_all_that_is_tested() -> None:
    page = (TESTS / "README.md").read_text()
    for name in (*OPTIMIZERS, *MODELS, *(loop.id for loop in (*LOOPS, *LOW_PRECISION_LOOPS, *OUTSIDE_LOOPS))):
        assert f"| {name} |" in page, "run `python tests/exactness.py`"


def tracked(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Tracker:
    return Tracker(model, optimizer, queries={"q": Query.outputs(torch.randn(2, 4))}, **options)


def test_closures_are_refused() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = tracked(model, optimizer)

    def closure() -> float:
        model(torch.randn(2, 4)).sum().backward()
        return 0.0

    with pytest.raises(ValueError, match="call the closure before it"), tracker.step():
        optimizer.step(closure)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(torch.tensor([0, 1]))})
    with pytest.raises(ValueError, match=r"'0\.weight' is sparse; use sparse=False"), tracker.step():
        model(torch.tensor([0, 1])).sum().backward()
        optimizer.step()


def test_state_that_is_loaded_on_the_way_is_refused() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    tracker = tracked(model, optimizer)
    for number in range(2):
        if number:
            optimizer.load_state_dict(optimizer.state_dict())
            with pytest.raises(RuntimeError, match="load first, then make the Tracker"), tracker.step():
                optimizer.step()
        else:
            with tracker.step():
                model(torch.randn(2, 4)).sum().backward()
                optimizer.step()


def test_state_that_is_loaded_before_the_first_step_is_the_past() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    trained = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    trained.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = tracked(model, optimizer)
    optimizer.load_state_dict(trained.state_dict())
    with tracker.step():
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    assert float(tracker.influence("q").importance().sel(part="past").sum()) > 0


def test_names_of_parts_are_no_names_of_auxiliary_losses() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="kernel"):
        tracked(model, torch.optim.SGD(model.parameters()), auxiliary={"kernel": lambda model: model.weight.sum()})


def test_a_factor_that_begins_late_is_noticed_by_the_tables() -> None:
    """Though the gradients of samples are compared with the step's in the first three steps only."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(
        model, optimizer, queries={"test": Query.loss(x, y).mean()}, samples_every=1,
        sample_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
    )  # fmt: skip

    def step(factor: float) -> None:
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x, y), index=torch.arange(8))
            F.cross_entropy(model(x), y).backward()
            for parameter in model.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad * factor
            optimizer.step()

    for _ in range(4):
        step(1.0)
    with pytest.warns(SampleMismatchWarning, match=r"table of step 4 .* clipping that the Tracker was not told of"):
        step(0.01)
