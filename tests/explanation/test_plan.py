"""What an explanation will take, results on disk, and several processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from jobs import KEEPS, Job, child_environment, make_job, options_of

from explaind_track import (
    Explainer,
    Influence,
    Quadrature,
    Query,
    StepObserver,
    Trajectory,
    explain,
    open_influence,
    plan_explanation,
)
from explaind_track.errors import ResidualWarning
from explaind_track.explanation import plan
from explaind_track.explanation.digests import query_digest
from explaind_track.explanation.group_plan import GroupPlan


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    job, directory = make_job(), tmp_path_factory.mktemp("run") / "t"
    tracker = job.tracker(trajectory=directory, keyframe_every=4)
    job.run(tracker, 10)
    tracker.finish()
    return job, directory


@pytest.mark.parametrize("keep", KEEPS, ids="+".join)
def test_a_plan_tells_the_shape_and_does_it(recorded: tuple[Job, Path], keep: tuple[str, ...]) -> None:
    job, directory = recorded
    options = {**options_of(job, keep), "progress": False}
    plan = plan_explanation(Trajectory.open(directory), job.model, job.queries["query"], **options)
    words = plan.describe()
    found = plan.run().data["influence"]
    assert found.sizes == plan.shape
    assert plan.result_bytes >= found.nbytes
    for axis, size in plan.shape.items():
        assert f"{size} {axis}" in words
    assert plan.seconds() > 0
    assert plan.steps >= 8


@pytest.mark.parametrize(
    ("accuracy", "quadrature"),
    [("live", Quadrature.fixed(1)), ("1e-2", Quadrature(1e-2)), ("1e-3", Quadrature()), (None, Quadrature())],
)
def test_accuracies_are_quadratures(recorded: tuple[Job, Path], accuracy: Any, quadrature: Quadrature) -> None:
    job, directory = recorded
    asked = (Trajectory.open(directory), job.model, job.queries["query"])
    found = explain(*asked, accuracy=accuracy, progress=False)
    xr.testing.assert_identical(found.data, explain(*asked, quadrature=quadrature, progress=False).data)
    assert found.data.attrs["mode"] in ("forward mode", "reverse mode")
    with pytest.raises(ValueError, match="accuracy= and quadrature= both"):
        explain(*asked, accuracy="live", quadrature=quadrature)
    with pytest.raises(ValueError, match=r"accuracy=.*live.*1e-2.*1e-3"):
        explain(*asked, accuracy="1e-4")  # type: ignore[arg-type]


def test_long_work_is_told_of_before_it_starts(
    recorded: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job, directory = recorded
    asked = (Trajectory.open(directory), job.model, job.queries["query"])
    monkeypatch.setattr(plan, "WORTH_TRYING", 10)
    for seconds, is_told in ((59.0, False), (600.0, True)):
        monkeypatch.setattr(GroupPlan, "seconds", lambda self, seconds=seconds: seconds)
        for progress in (True, False):
            explain(*asked, accuracy="live", progress=progress)
            told = capfd.readouterr().err
            assert ("10 steps in forward mode will take about 10 min" in told) is (is_told and progress)


def test_steps_that_leave_most_of_their_change_over_are_warned_of() -> None:
    """ReLU(w·x) with w from −3 to 1: the one node lies where the unit is off."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    observer, weight = StepObserver(optimizer, dict(model.named_parameters())), model.get_parameter("0.weight")
    weight.data.fill_(-3.0)
    weight.grad = torch.full_like(weight, -4.0)
    observer.before({})
    optimizer.step()
    asked = ([observer.after(0, {})], model, Query.outputs(torch.ones(1, 1, dtype=torch.float64)))

    for keep in (("step", "group"), ("group",)):
        with pytest.warns(ResidualWarning, match=r'leaves 1 of the change over, with 1 node.*accuracy="1e-2"'):
            explain(*asked, accuracy="live", keep=keep, progress=False)
    explain(*asked, accuracy="1e-2", progress=False)
    explain(*asked, accuracy="live", parts=("regularization",), progress=False)  # the rest was not asked for


def test_walks_multiply_as_the_memory_shrinks(recorded: tuple[Job, Path]) -> None:
    job, directory = recorded
    options = options_of(job, ("query", "output", "sample"))
    bytes_each = 8 * sum(parameter.numel() for parameter in job.model.parameters())
    for copies, passes in ((15, 1), (6, 3), (3, 5), (2, 10), (1, 15)):
        plan = plan_explanation(
            Trajectory.open(directory), job.model, job.queries["query"], memory=3 * bytes_each * copies, **options
        )
        assert plan.passes == passes


@pytest.mark.parametrize("keep", KEEPS, ids="+".join)
def test_results_on_disk_go_on_where_they_stopped(
    recorded: tuple[Job, Path], keep: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, directory = recorded
    trajectory, query = Trajectory.open(directory), job.queries["query"]
    options = {**options_of(job, keep), "memory": 12000 if {"step", "sample"} <= set(keep) else 2000, "progress": False}
    wanted = explain(trajectory, job.model, query, **options).data
    calls, least = 0, 10**9
    steps, steps_back = Trajectory.steps, Trajectory.steps_back

    def interrupted(method: Any) -> Any:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            for step in method(*arguments, **more):
                calls += 1
                if calls > least:
                    raise KeyboardInterrupt
                yield step

        return wrapped

    monkeypatch.setattr(Trajectory, "steps_back", interrupted(steps_back))
    if "sample" not in keep:
        monkeypatch.setattr(Trajectory, "steps", interrupted(steps))
    explain(trajectory, job.model, query, out=tmp_path / "whole", **options)
    whole, calls, least = calls, 0, 2 * calls // 3
    with pytest.raises(KeyboardInterrupt):
        explain(trajectory, job.model, query, out=tmp_path / "r", **options)
    with pytest.raises(ValueError, match="no complete result"):
        open_influence(tmp_path / "r")
    calls, least = 0, 10**9
    found = explain(trajectory, job.model, query, out=tmp_path / "r", **options)
    monkeypatch.undo()
    xr.testing.assert_allclose(found.data, wanted, rtol=1e-10, atol=1e-13)
    xr.testing.assert_identical(open_influence(tmp_path / "r").data, found.data)
    if len(keep) > 2:
        assert calls < whole
        assert isinstance(found.data["influence"].values.base, np.ndarray)
    with pytest.raises(FileExistsError, match="differs in window"):
        explain(trajectory, job.model, query, out=tmp_path / "r", **{**options, "window": (0, 9)})


def test_what_does_not_fit_is_refused(recorded: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    job, directory = recorded
    monkeypatch.setattr(plan, "room", lambda: 1000)
    for keep in (KEEPS[1], KEEPS[4]):
        options = options_of(job, keep)
        with pytest.raises(ValueError, match=r"5 query × 3 output.*out="):
            explain(Trajectory.open(directory), job.model, job.queries["query"], **options)
        words = plan_explanation(Trajectory.open(directory), job.model, job.queries["query"], **options).describe()
        assert "needs out=" in words


SCRIPT = """
import sys
import torch.distributed as dist
from jobs import KEEPS, make_job, options_of
from explaind_track import Trajectory, explain

dist.init_process_group("gloo")
job = make_job()
for place, keep in enumerate(KEEPS[1:]):
    for name, query in job.queries.items():
        trajectory = Trajectory.open(sys.argv[1])
        steps = trajectory if place % 2 else list(trajectory.steps(lasting=True))
        found = explain(steps, job.model, query, progress=False, **options_of(job, keep))
        found.save(f"{sys.argv[2]}/{place}-{name}-{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_find_what_one_does(recorded: tuple[Job, Path], tmp_path: Path) -> None:
    job, directory = recorded
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    places = [str(directory), str(tmp_path)]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False, env=child_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    for place, keep in enumerate(KEEPS[1:]):
        for name, query in job.queries.items():
            wanted = explain(Trajectory.open(directory), job.model, query, progress=False, **options_of(job, keep)).data
            for rank in range(2):
                found = Influence.load(tmp_path / f"{place}-{name}-{rank}.safetensors").data
                xr.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_pieces_and_processes_agree_on_parts_that_only_some_have(tmp_path: Path) -> None:
    """Weights are changed from outside before a single step, and behind the last one."""
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)
    for steps in (6, 4):
        job.run(tracker, steps)
        with torch.no_grad():
            job.model[0].weight.mul_(0.9)
    tracker.finish()
    trajectory, query = Trajectory.open(tmp_path / "t"), job.queries["query"]
    keep = ("step", "group", "query", "output")
    more: dict[str, Any] = {"keep": keep, "quadrature": Quadrature.fixed(1), "progress": False}
    for parts in (None, ("outside", "kernel", "regularization")):
        wanted = explain(trajectory, job.model, query, parts=parts, **more).data
        assert wanted["part"].values.tolist() == list(parts or ("kernel", "regularization", "outside"))
        assert wanted["step"].values.tolist() == list(range(11))

        # each step a piece of its own
        out = tmp_path / f"{parts}"
        found = explain(trajectory, job.model, query, parts=parts, memory=2000, out=out, **more).data
        xr.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)
        assert {name: found.attrs[name] for name in ("steps", "last_step")} == {"steps": 11, "last_step": 10}

        # the sums of two stretches of steps, as two processes have them
        stretches = [Explainer(job.model, query, tracker.groups, [keep, ("query", "output")], parts) for _ in range(2)]
        for step in trajectory.steps():
            stretches[step.number >= 5].add(step)
        one, other = stretches
        for first, second in zip(one.accumulators, other.accumulators, strict=True):
            first.join([first.sums, second.sums])
        whole = explain(trajectory, job.model, query, parts=parts, keep=keep, progress=False).data
        xr.testing.assert_allclose(one.results()[0].data, whole, rtol=1e-12, atol=1e-14)
        summed = one.results()[1]
        torch.testing.assert_close(
            torch.from_numpy(summed.prediction().values), query(job.model).detach(), rtol=1e-3, atol=1e-4
        )


def test_queries_are_told_apart_by_what_they_compute() -> None:
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    made = [
        lambda: Query.logit(x, 1), lambda: Query.logit(x, 2), lambda: Query.logit(x, y), lambda: Query.outputs(x),
        lambda: Query.loss(x, y), lambda: Query.loss(x, y).mean(), lambda: Query.projection(x, torch.eye(3)),
        lambda: Query.projection(x, 2 * torch.eye(3)), lambda: Query.entropy(x), lambda: Query.activation(x, "first"),
        lambda: Query.function(x, lambda output: output * 2), lambda: Query.function(x, lambda output: output * 3),
    ]  # fmt: skip
    first, second = ([query_digest(make()).hex for make in made] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(made)
