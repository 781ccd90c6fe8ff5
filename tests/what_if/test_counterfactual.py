"""The derivative of a run against central differences of training again, in float64."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from cases import OPTIMIZERS
from helpers import some_of
from jobs import child_environment, make_job, sample_loss
from loops import LOOPS, Loop
from low_precision_loops import LOW_PRECISION_LOOPS
from models import mlp
from optimizers import Lion, nesterov
from outside_loops import OUTSIDE_LOOPS
from torch import Tensor, nn

from explaind_track import (
    Influence,
    Query,
    Rule,
    Tracker,
    Trajectory,
    counterfactual,
    open_influence,
    rerun,
    update_rule,
)
from explaind_track.errors import SampleMismatchWarning, UnexplainedUpdateError
from explaind_track.what_if import Change, Reweighted, Settings, Transplanted, plan_counterfactual
from explaind_track.what_if.adjoint import Adjoint
from explaind_track.what_if.curvature import Curvature

H = 3e-5
"""Central differences are off by h² times a third derivative, and by rounding, 1e-16/h."""

KEEP = ("query", "output", "sample")


@dataclass
class Recorded:
    """A run, and what is needed to ask of it."""

    trajectory: Trajectory
    model: nn.Module
    query: Query
    options: dict[str, Any]

    def effects(self, **options: Any) -> xr.Dataset:
        options = {"keep": KEEP, "progress": False, **self.options, **options}
        return counterfactual(self.trajectory, self.model, self.query, **options).data

    def end(self, change: Change) -> np.ndarray[Any, Any]:
        """The query's targets where the run ends with something changed."""
        options = {"progress": False, "change": change, **self.options}
        values = rerun(self.trajectory, self.model, **options).compare(self.query)["value"]
        return np.asarray(values.values[0, 1])

    def difference(self, change: Callable[[float], Change], h: float = H) -> np.ndarray[Any, Any]:
        """The derivative by what `change` takes."""
        return np.asarray((self.end(change(h)) - self.end(change(-h))) / (2 * h))


def of_loop(loop: Loop, directory: Path) -> Recorded:
    live = loop.run(trajectory=directory / "t", keyframe_every=4, queries={})

    def data(index: Tensor | list[str]) -> Any:
        if isinstance(index, list):
            index = torch.tensor([int(name.removeprefix("id")) for name in index])
        return loop.data(live.x[index], live.y[index])

    options = {"sample_loss": loop.sample_loss, "data": data, "auxiliary": loop.options.get("auxiliary")}
    return Recorded(Trajectory.open(directory / "t"), live.model, live.query, options)


def of_optimizer(name: str, directory: Path, steps: int = 6, **options: Any) -> Recorded:
    torch.manual_seed(0)
    model = mlp().double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    make: Any = OPTIMIZERS[name]
    optimizer = make(model)
    tracker = Tracker(model, optimizer, queries={}, trajectory=directory / "t", keyframe_every=4)
    for _ in range(steps):
        index = torch.randperm(12)[:5]
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            optimizer.step()
    tracker.finish()
    options = {"sample_loss": sample_loss, "data": lambda index: (x[index], y[index])}
    return Recorded(Trajectory.open(directory / "t"), model, Query.loss(x[:2], y[:2]), options)


def weighted(sample: Any) -> Callable[[float], Change]:
    return lambda h: Reweighted({sample: 1 + h})


def check(found: Any, wanted: np.ndarray[Any, Any], tolerance: float = 1e-6) -> None:
    assert np.abs(np.asarray(found) - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-12)


REFUSED = {
    "clipping by value": "no sum over samples",
    **{loop.id: "something other than the optimizer" for loop in OUTSIDE_LOOPS if loop.dtype is torch.float64},
}
del REFUSED["weights swapped for others and restored"]
BY_NAME = {loop.id: loop for loop in (*LOOPS, *OUTSIDE_LOOPS) if loop.dtype is torch.float64}


QUICK = ("weighted samples", "auxiliary loss (L1)", "gradient accumulation", "clipping by norm", "warm start, Nesterov",
         "frozen, thawed later", "parameter group added later", "dropout", "batch norm", "tied weights",
         "samples named by words",
         "activation checkpointing", "OneCycle, SGD's momentum")  # fmt: skip


@pytest.mark.filterwarnings("ignore::explaind_track.errors.ForwardModeFallbackWarning")
@pytest.mark.parametrize("name", some_of([name for name in BY_NAME if name not in REFUSED], QUICK))
def test_effects_are_differences_of_training_again(name: str, tmp_path: Path) -> None:
    run = of_loop(BY_NAME[name], tmp_path)
    effects = run.effects()
    assert float(effects["mismatch"].max()) < 1e-12
    sample = effects["sample"].values[3]
    check(effects["effect"].sel(sample=sample), run.difference(weighted(sample)))


@pytest.mark.parametrize("name", some_of(REFUSED, ("clipping by value", "pruning masks")))
def test_what_has_no_derivative_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        of_loop(BY_NAME[name], tmp_path).effects()


QUICK_OPTIMIZERS = ("adamw", "adamw-amsgrad", "adam-decay-maximize", "sgd-dampening-decay", "sgd-nesterov-maximize",
                    "sgd-groups", "nadam", "radam", "rmsprop-momentum", "adagrad", "adadelta")  # fmt: skip


@pytest.mark.parametrize("name", some_of([name for name in OPTIMIZERS if name != "lion"], QUICK_OPTIMIZERS))
def test_every_optimizer_is_differentiated_through_its_state(name: str, tmp_path: Path) -> None:
    run = of_optimizer(name, tmp_path)
    effects = run.effects(initial=True)
    sample = effects["sample"].values[0]
    check(effects["effect"].sel(sample=sample), run.difference(weighted(sample)))

    # where it began
    start = run.trajectory.state_dict(0)
    bump = torch.zeros_like(start["0.weight"])
    bump[0, 1] = 1
    check(
        effects["initial:0.weight"][..., 0, 1],
        run.difference(lambda h: Transplanted({**start, "0.weight": start["0.weight"] + h * bump}, at=0)),
    )


@pytest.mark.parametrize("name", ["adamw", "adam-decay", "sgd-groups"])
def test_rates_and_decays_of_single_steps_are_differentiated(name: str, tmp_path: Path) -> None:
    run = of_optimizer(name, tmp_path)
    effects, replay = run.effects(), run.trajectory.replay(0)
    group = replay.optimizer.param_groups[-1]
    members = [name for name, p in replay.parameters.items() if any(p is member for member in group["params"])]

    def other(key: str) -> Callable[[float], Change]:
        return lambda h: Settings({key: float(group[key]) + h}, parameters=members, window=(2, 3))

    for key, variable in (("lr", "rate"), ("weight_decay", "decay")):
        check(effects[variable].sel(step=2).isel(settings=-1), run.difference(other(key)))


class Norms(nn.Module):
    """A norm that averages all batches so far and is used twice, a frozen one, and one without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.twice, self.frozen = nn.BatchNorm1d(5, momentum=None), nn.BatchNorm1d(5, momentum=0.3)
        self.fresh = nn.BatchNorm1d(5, track_running_stats=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(self.first(x))))
        return self.last(torch.tanh(self.frozen(hidden)) + self.fresh(hidden) if self.training else hidden)


def test_targets_depend_on_batches_through_running_statistics(tmp_path: Path) -> None:
    loop = BY_NAME["gradient accumulation"]
    run = of_loop(replace(loop, model=Norms, optimizer=nesterov), tmp_path)  # Adam would divide a bias by noise
    effects = run.effects()
    for sample in effects["sample"].values[:2]:
        check(effects["effect"].sel(sample=sample), run.difference(weighted(sample)))


class Counting(nn.Module):
    """With a buffer that follows its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().std())
        return self.linear(x) / self.scale


def test_buffers_that_move_in_another_way_are_refused(tmp_path: Path) -> None:
    run = of_loop(replace(BY_NAME["ragged batches"], model=Counting), tmp_path)
    with pytest.raises(ValueError, match="moved the buffers scale in another way"):
        run.effects()


# ------------------------------------------------------------- that the check can fail


def off(run: Recorded, sample: int, wanted: np.ndarray[Any, Any]) -> float:
    found = run.effects()["effect"].sel(sample=sample).values
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_without_the_hessian_or_the_second_moment_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = of_optimizer("adamw", tmp_path)
    sample = int(run.effects()["sample"][0])
    wanted = run.difference(weighted(sample))
    assert off(run, sample, wanted) < 1e-6

    along, through = Curvature.along, Adjoint.through_optimizer

    def flat(*arguments: Any) -> Any:
        products, curved, *others = along(*arguments)
        return products, {name: 0 * value for name, value in curved.items()}, *others

    def without_second_moment(self: Adjoint, snapshot: Any) -> Any:
        found = through(self, snapshot)
        self.state = {n: {k: v * (k != "exp_avg_sq") for k, v in held.items()} for n, held in self.state.items()}
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Curvature, "along", flat)
        assert off(run, sample, wanted) > 0.01
    with monkeypatch.context() as patch:
        patch.setattr(Adjoint, "through_optimizer", without_second_moment)
        assert off(run, sample, wanted) > 0.01


# ------------------------------------------------------------- axes, windows, parts


def test_axes_are_sums_and_targets_may_come_in_any_number(tmp_path: Path) -> None:
    run = of_loop(BY_NAME["clipping by norm"], tmp_path)
    whole = run.effects(keep=("seen", "query", "output", "sample"))["effect"]
    for keep, memory in ((("sample",), 1), (("query", "sample"), 1), (("seen", "sample"), 2**28), (("output",), 1)):
        found = run.effects(keep=keep, memory=memory)["effect"]
        wanted = whole.sum([axis for axis in whole.dims if axis not in keep])
        assert found.dims == wanted.dims
        check(found, wanted.values, 1e-9)

    some = run.effects(keep=("query", "sample"), samples=[4, 2])["effect"]
    check(some, whole.sum(["seen", "output"]).sel(sample=[4, 2]).values, 1e-9)
    parts = run.effects(keep=("sample",), partition=["odd" if k % 2 else "even" for k in range(24)])["effect"]
    odd = [k for k in whole["sample"].values if k % 2]
    check(parts.sel(sample="odd"), whole.sel(sample=odd).sum().values, 1e-9)


def test_in_a_window_the_factors_count_there_alone(tmp_path: Path) -> None:
    run = of_loop(BY_NAME["learning-rate schedule"], tmp_path)
    effects = run.effects(window=(1, 4))["effect"]
    sample = effects["sample"].values[0]
    check(effects.sel(sample=sample), run.difference(lambda h: Reweighted({sample: 1 + h}, window=(1, 4))))


def test_a_result_on_disk_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run = of_loop(BY_NAME["ragged batches"], tmp_path)
    options: dict[str, Any] = {**run.options, "keep": KEEP, "progress": False, "memory": 2000, "out": tmp_path / "out"}
    options["keep"] = ("query", "sample")
    plan = plan_counterfactual(run.trajectory, run.model, run.query, **options)
    assert plan.passes == 5
    assert "5 pass(es)" in plan.describe()
    data, calls = options["data"], 0

    def interrupted(index: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return data(index)

    with pytest.raises(KeyboardInterrupt):
        counterfactual(run.trajectory, run.model, run.query, **{**options, "data": interrupted})
    counterfactual(run.trajectory, run.model, run.query, **options)
    whole = run.effects(keep=("query", "sample"))
    for name in ("effect", "rate", "decay"):
        check(open_influence(tmp_path / "out").data[name], whole[name].values, 1e-12)


SCRIPT = """
import sys
import torch.distributed as dist
from jobs import make_job, sample_loss
from explaind_track import Trajectory, counterfactual

dist.init_process_group("gloo")
job = make_job()
options = dict(sample_loss=sample_loss, data=lambda index: (job.x[index], job.y[index]), progress=False)
for name, query in job.queries.items():
    found = counterfactual(Trajectory.open(sys.argv[1]), job.model, query, initial=True, **options)
    found.save(f"{sys.argv[2]}/{name}-{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_targets_and_find_what_one_does(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", queries={}, keyframe_every=4)
    job.run(tracker, 6)
    tracker.finish()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    places = [str(tmp_path / "t"), str(tmp_path)]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False, env=child_environment())
    assert done.returncode == 0, done.stderr[-3000:]

    options: dict[str, Any] = {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    for name, query in job.queries.items():
        trajectory = Trajectory.open(tmp_path / "t")
        wanted = counterfactual(trajectory, job.model, query, initial=True, progress=False, **options)
        for rank in range(2):
            found = Influence.load(tmp_path / f"{name}-{rank}.safetensors").data
            xr.testing.assert_allclose(found, wanted.data, rtol=1e-9, atol=1e-13)


# ------------------------------------------------------------- what is told and refused


def test_samples_that_are_not_the_runs_are_told_of(tmp_path: Path) -> None:
    run = of_loop(BY_NAME["batches of one size"], tmp_path)
    data = run.options["data"]
    with pytest.warns(SampleMismatchWarning):
        run.effects(data=lambda index: data((index + 1) % 24))


class Signed(Lion):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)


def test_optimizers_without_a_differentiable_step_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "signed", lambda model: Signed(model.parameters()))
    run = of_optimizer("signed", tmp_path)
    with pytest.raises(TypeError, match=r"Signed cannot be differentiated.*\n.*differentiable_step\.register"):
        run.effects()


class Halved(torch.optim.SGD):
    """Inherits a differentiable step that is not its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] / 2)


@update_rule.register
def _(optimizer: Halved, settings: Any, state: Any, first: bool) -> Rule:
    return Rule(buffer=None, beta=0.0, b=1.0, e=0.0, d=settings["lr"] / 2)


def test_a_differentiable_step_that_is_not_the_optimizers_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "halved", lambda model: Halved(model.parameters(), lr=0.1))
    run = of_optimizer("halved", tmp_path)
    with pytest.raises(UnexplainedUpdateError, match="differentiable step of Halved"):
        run.effects()


def test_low_precision_is_refused(tmp_path: Path) -> None:
    run = of_loop(LOW_PRECISION_LOOPS[0], tmp_path)
    with pytest.raises(ValueError, match="a chain of roundings"):
        run.effects()
