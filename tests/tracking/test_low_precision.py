"""Parameters in bfloat16 and float16: explained in float32, recorded as trained, and every rule still proved."""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from low_precision_loops import Half, half, in_float32
from models import mlp
from torch import Tensor, nn

from explaind_track import Quadrature, Query, Rule, Tracker, Trajectory, audit, explain, update_rule
from explaind_track.analysis import kernel_machine, parameter_scores, similarity
from explaind_track.errors import SampleMismatchWarning, UnexplainedUpdateError

LOW = (torch.bfloat16, torch.float16)
STEPS = 7
X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
REFINED = Quadrature(1e-6)


class TwiceSGD(torch.optim.SGD):
    """Has a rule of twice the rate that it steps with."""


@update_rule.register
def _twice(optimizer: TwiceSGD, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> Rule:
    return Rule(None, beta=0.0, b=1.0, e=0.0, d=2 * settings["lr"])


class TwiceAdamW(torch.optim.AdamW):
    """The same."""


@update_rule.register
def _twice_adamw(optimizer: TwiceAdamW, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> Rule:
    rule = update_rule.dispatch(torch.optim.Adam)(optimizer, settings, state, first)
    return replace(rule, e=2 * rule.e)


def data(index: Tensor) -> tuple[Tensor, Tensor]:
    return X[index].bfloat16(), Y[index]


def train(
    directory: Path | None,
    model: nn.Module,
    last: int = STEPS,
    between: Callable[[nn.Module], None] = lambda model: None,
    **options: Any,
) -> tuple[Tracker, torch.optim.Optimizer]:
    """Its batches depend on the number of the step alone. between: what the loop does behind each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    queries = {"outputs": Query.outputs(X[:5]), "loss": Query.loss(X[:5], Y[:5]).mean()}
    options = {"sample_loss": in_float32, "quadrature": REFINED, "keyframe_every": 3, **options}
    tracker = Tracker(model, optimizer, queries=queries, trajectory=directory, **options)
    for number in range(tracker.number, last):
        index = torch.arange(number, number + 8)
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch(data(index), index=index)
            loss = tracker.backward() if tracker.samples_due else in_float32(model, data(index)).mean()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
        between(model)
    return tracker, optimizer


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("cls", "lr"), [(TwiceSGD, 0.05), (TwiceAdamW, 0.02), (TwiceAdamW, 1e-3)])
def test_a_wrong_rule_is_refused(cls: type[torch.optim.Optimizer], lr: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mlp().to(dtype)
    settings = {"eps": 1e-4} if cls is TwiceAdamW else {}
    optimizer = cls(model.parameters(), lr=lr, **settings)  # type: ignore[call-arg]
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(X[:5])})
    with pytest.raises(UnexplainedUpdateError, match="does not explain"), tracker.step():
        F.cross_entropy(model(X.to(dtype)), Y).backward()
        optimizer.step()


def test_steps_are_in_float32_and_the_record_as_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = half()
    train(tmp_path / "t", model)[0].finish()
    trajectory = Trajectory.open(tmp_path / "t")

    for step in trajectory.steps():
        assert step.precision is torch.bfloat16
        tensors = [*step.before.parameters.values(), *step.after.buffers.values(), *step.parts["kernel"].values()]
        assert {value.dtype for value in tensors} == {torch.float32, torch.int64}
        for name, update in step.updates.items():
            parts = sum(step.parts[part][name] for part in ("kernel", "regularization", "rounding"))
            assert torch.allclose(parts, update.before - update.after, atol=1e-6)

    last = trajectory.state_dict(STEPS)
    for name, value in model.state_dict().items():
        assert last[name].dtype is value.dtype
        assert torch.equal(last[name], value)


def test_the_model_may_be_given_in_either_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tracker, _ = train(tmp_path / "t", half())
    tracker.finish()
    trajectory = Trajectory.open(tmp_path / "t")
    options: dict[str, Any] = {"parts": tracker.parts("outputs"), "quadrature": REFINED, "progress": False}
    live = tracker.influence("outputs").data["influence"].values
    for model, x in ((half(), X), (Half(), X.double())):
        found = explain(trajectory, model, Query.outputs(x[:5]), **options).data["influence"].values
        assert (found == live).all()
    with pytest.raises(ValueError, match=r"recorded .*bfloat16"):
        explain(trajectory, half().double(), Query.outputs(X[:5]), **options)


def test_plain_autograd_on_a_copy_in_float32_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train(tmp_path / "t", half())[0].finish()
    trajectory = Trajectory.open(tmp_path / "t")
    for query in (Query.outputs(X[:5]), Query.loss(X[:5], Y[:5]).mean()):
        found = audit(trajectory, half(), query, step=4, sample_loss=in_float32, data=data)
        exact = [finding for finding in found.findings if finding.what != "gradient of the batches"]
        assert found.ok, found
        assert max(finding.difference for finding in exact) <= 1e-5, found


def test_a_run_that_was_killed_is_the_run_that_was_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, killed = half(), half()
    killed.load_state_dict(whole.state_dict())
    again = deepcopy(killed)
    train(tmp_path / "whole", whole)[0].finish()

    tracker, _ = train(tmp_path / "killed", killed, last=5)
    tracker._outputs.writer.flush(tracker.number)  # type: ignore[union-attr]
    tracker._outputs.writer._lock.release()  # type: ignore[union-attr]
    resumed, _ = train(tmp_path / "killed", again, resume=True)
    resumed.finish()

    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    steps = zip(Trajectory.open(tmp_path / "whole").steps(), Trajectory.open(tmp_path / "killed").steps(), strict=True)
    for one, other in steps:
        for part in one.parts:
            assert all(torch.equal(value, other.parts[part][name]) for name, value in one.parts[part].items())


def test_gradients_of_samples_and_analyses_are_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp().bfloat16()
    tracker, _ = train(tmp_path / "t", model, samples_every=2, scores="loss")
    tracker.finish()
    assert {value.dtype for value in tracker.parameter_scores().values()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.bfloat16}

    trajectory, query = Trajectory.open(tmp_path / "t"), Query.outputs(X[:3])
    scores = parameter_scores(trajectory, model, Query.loss(X[:5], Y[:5]).mean(), quadrature=REFINED, progress=False)
    for name, value in tracker.parameter_scores().items():
        assert torch.allclose(value, scores[name], atol=1e-6)
    found = similarity(trajectory, model, query, sample_loss=in_float32, data=data, progress=False)
    assert abs(found.values.diagonal(axis1=1, axis2=2) - 1).max() < 1e-5
    kernels = kernel_machine(
        trajectory,
        model,
        query,
        outputs=lambda model, batch: model(batch[0]).float().log_softmax(-1),
        loss=lambda outputs, batch: F.nll_loss(outputs, batch[1], reduction="none"),
        data=data,
        progress=False,
    )
    assert float(kernels["spread"].max()) == 0


@pytest.mark.parametrize(("weight", "is_told"), [(1 / 8, False), (1 / 7, True)])
def test_weights_that_are_not_the_loops_are_noticed(weight: float, is_told: bool) -> None:
    torch.manual_seed(0)
    model = mlp().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(X[:5])}, sample_loss=in_float32)
    with warnings.catch_warnings(record=True) as told, tracker.step():
        warnings.simplefilter("always", SampleMismatchWarning)
        tracker.batch(data(torch.arange(8)), weight=weight)
        in_float32(model, data(torch.arange(8))).mean().backward()
        optimizer.step()
    assert bool(told) is is_told


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.3, 0.3)


def test_what_changes_weights_from_outside_is_told_and_recorded_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = half()
    tracker, _ = train(tmp_path / "t", model, between=clamp)
    tracker.finish()
    live = tracker.influence("outputs").data["influence"]
    assert float(abs(live.sel(part="outside")).max()) > 0

    predicted = torch.from_numpy(tracker.influence("outputs", ("query", "output")).prediction().values)
    model.eval()
    assert (predicted - deepcopy(model).float()(X[:5])).abs().max() <= 1e-5

    trajectory = Trajectory.open(tmp_path / "t")
    options: dict[str, Any] = {"parts": tracker.parts("outputs"), "quadrature": REFINED, "progress": False}
    for steps in (trajectory, list(trajectory.steps(lasting=True))):
        found = explain(steps, half(), Query.outputs(X[:5]), **options).data["influence"]
        assert abs(found.values[:, :STEPS] - live.values[:, :STEPS]).max() == 0
    assert all(torch.equal(value, trajectory.state_dict(STEPS)[name]) for name, value in model.state_dict().items())


def scaled(model: nn.Module, x: Tensor) -> Tracker:
    """Trains with a GradScaler and a fused optimizer, which unscales by itself; the second step overflows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-4, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(X[:5])}, sample_loss=in_float32, quadrature=REFINED)
    for number in range(4):
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x, Y))
            loss = in_float32(model, (x, Y)).mean()
            scaler.scale(loss * float("inf") if number == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return tracker


def test_a_fused_optimizer_and_a_scaler() -> None:
    torch.manual_seed(0)
    model = mlp().bfloat16()
    tracker = scaled(model, X.bfloat16())
    found = torch.from_numpy(tracker.influence("q", ("query", "output")).prediction().values)
    assert tracker.number == 3
    assert (found - deepcopy(model).float()(X[:5])).abs().max() <= 1e-5


def test_second_moments_that_vanish_in_float16_are_told() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnexplainedUpdateError, match="squared gradients below 6e-8 vanish"):
        scaled(mlp().half(), X.half())


def test_a_cast_by_name_is_told() -> None:
    class Casts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16())

    model = Casts(4, 3).bfloat16()
    with pytest.raises(RuntimeError, match="dtype") as raised:
        Tracker(model, torch.optim.SGD(model.parameters(), lr=0.1), queries={"q": Query.outputs(X[:5])})
    assert any("casts to a type by its name" in note for note in raised.value.__notes__)
