"""Scalar queries on models whose gradients are streamed: live by the trapezoid, without copies between steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check
from torch import Tensor, nn
from untracked import compare_trained

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain
from explaind_track.core.fingerprint import WHOLE, fingerprint
from explaind_track.engine import carried_gradient
from explaind_track.errors import UnseenChangeWarning

torch.manual_seed(5)
X, Y = torch.randn(6, 40, dtype=torch.float64), torch.randint(3, (6,))
QUERIES = {"en": Query.loss(X, Y).mean(), "de": Query.loss(X[:2] + 1, Y[:2]).mean()}


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.Dropout(0.1), nn.Tanh(), nn.Linear(300, 9), nn.Linear(9, 3)).double()
    model[3].weight.requires_grad_(False)  # frozen
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def tracked(
    count: int = 5, between: Callable[[nn.Module, int], object] = lambda *_: None, **options: Any
) -> tuple[Tracker, nn.Module, torch.optim.Optimizer]:
    """memory=1: so little that gradients are streamed."""
    model, optimizer = made()
    tracker = Tracker(model, optimizer, **{"queries": QUERIES, "memory": 1, **options})
    while tracker.number < count:
        with tracker.step():
            train(model, optimizer)
        between(model, tracker.number - 1)
    tracker.finish()
    return tracker, model, optimizer


def psi(tracker: Tracker, query: str = "en") -> Any:
    return tracker.influence(query).data["influence"]


def test_training_is_the_untracked_one_and_nothing_is_copied_between_steps() -> None:
    tracker, model, optimizer = tracked()
    state = torch.get_rng_state()
    assert tracker.quadrature == Quadrature.trapezoid()
    assert tracker._observer.kept.left.parameters["0.weight"].data_ptr() == model[0].weight.data_ptr()

    plain, other = made()
    for _ in range(5):
        train(plain, other)
    assert torch.equal(torch.get_rng_state(), state)
    compare_trained((plain, other), (model, optimizer))


def test_live_offline_resumed_and_on_the_host_are_the_same(tmp_path: Path) -> None:
    live = tracked()[0]
    tracked(3, trajectory=tmp_path / "t")
    resumed, model, _ = tracked(trajectory=tmp_path / "t", resume=True)
    on_host = tracked(keep_before="host")[0]
    for query, asked_of in QUERIES.items():
        asked = {"quadrature": live.quadrature, "parts": live.parts(query), "keep": ("step", "group")}
        found = [explain(Trajectory.open(tmp_path / "t"), model, asked_of, memory=m, **asked, progress=False)
                 for m in (1, 2**28)]  # fmt: skip
        scale = float(abs(psi(live, query)).max())
        for other in (psi(resumed, query), psi(on_host, query), *(one.data["influence"] for one in found)):
            check(psi(live, query), other, scale, 1e-12)


def test_every_third_step_is_what_it_is_among_all() -> None:
    check(psi(tracked(7, every=3)[0]), psi(tracked(7)[0]).sel(step=[0, 3, 6]), tolerance=1e-13)


def test_an_outside_change_is_warned_of_and_from_then_on_explained(tmp_path: Path) -> None:
    def clamp(model: nn.Module, number: int) -> None:
        if number in (1, 2):
            model[0].weight.data.mul_(0.99)  # which no version of the tensor tells

    with pytest.warns(UnseenChangeWarning, match=r"0\.weight since the last step"):
        found = psi(tracked(between=clamp)[0])
    exact = psi(tracked(between=clamp, trajectory=tmp_path / "t")[0])
    rest = [part for part in exact["part"].values if part != "outside"]
    check(found.sel(part=rest), exact.sel(part=rest), tolerance=1e-12)
    outside, missing = (one.sel(part="outside") for one in (exact, found))
    check(missing.sel(step=[0, 1, 3, 4]), outside.sel(step=[0, 1, 3, 4]), tolerance=1e-12)
    assert float(abs(outside.sel(step=2)).max()) > 0
    assert float(abs(missing.sel(step=2)).max()) == 0


def test_an_outside_change_behind_the_last_step_is_warned_of() -> None:
    with pytest.warns(UnseenChangeWarning):
        tracked(2, between=lambda model, number: model[0].weight.data.neg_() if number == 1 else None)


def test_queries_of_many_numbers_keep_the_midpoint() -> None:
    assert tracked(1, queries={**QUERIES, "all": Query.outputs(X)})[0].quadrature == Quadrature.fixed(1)
    assert tracked(1, memory=2**28)[0].quadrature == Quadrature.fixed(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_leaves_training_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    products, calls = carried_gradient.step_products, []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 14:  # in the second step
            raise error
        return products(*arguments)

    monkeypatch.setattr(carried_gradient, "step_products", interrupted)
    model, optimizer = made()
    tracker = Tracker(model, optimizer, queries={"en": QUERIES["en"]}, memory=1)
    plain, other = made()
    torch.manual_seed(1)
    for _ in range(5):
        train(plain, other)

    torch.manual_seed(1)
    for number in range(5):
        try:
            with tracker.step():
                train(model, optimizer)
        except error:
            assert number == 1
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert model.training
    compare_trained((plain, other), (model, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (1, 7), (257, 131), (40_001,)])
def test_a_fingerprint_tells_every_entry_and_every_exchange(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(*shape).to(dtype)
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    assert len(before) <= max(WHOLE, tensor.numel() // 16)

    def tells(change: Callable[[Tensor], object]) -> bool:
        other = tensor.clone()
        change(other)
        return not torch.equal(before, fingerprint(other))

    assert tells(lambda t: t.neg_())
    assert tells(lambda t: t.mul_(0.5))
    assert tells(lambda t: t.copy_(t.reshape(-1).flip(0).reshape(shape)))
    for place in (0, 1, tensor.numel() // 2, tensor.numel() - 1):
        assert tells(lambda t, place=place: t.view(-1)[place].neg_())
    assert tells(lambda t: t.view(-1).index_copy_(0, torch.tensor([0, 1]), t.view(-1)[[1, 0]]))
