"""A record without gradients gives, computed again, what a record of gradients gives, bit for bit; or says what it does
not."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import some_of
from jobs import in_child, make_job, sample_loss
from loops import LOOPS, Loop
from low_precision_loops import LOW_PRECISION_LOOPS
from outside_loops import OUTSIDE_LOOPS
from torch import Tensor, nn

from explaind_track import (
    Quadrature,
    Query,
    Tracker,
    Trajectory,
    counterfactual,
    explain,
    rerun,
    with_gradients,
)
from explaind_track.errors import ReplayWarning, RerunWarning, ResumeWarning, TrajectoryError

BY_NAME = {loop.id: loop for loop in (*LOOPS, *LOW_PRECISION_LOOPS, *OUTSIDE_LOOPS)}
QUICK = ("weighted samples", "auxiliary loss (L1)", "clipping by norm", "dropout", "batch norm",
         "frozen later, zero gradients kept", "weights clamped between steps", "bfloat16 weights")  # fmt: skip


def both(loop: Loop, directory: Path) -> tuple[Trajectory, Trajectory]:
    """The records of gradients and of batches; the latter with its gradients computed again."""
    for record in ("gradients", "batches"):
        live = loop.run(trajectory=directory / record, record=record, keyframe_every=4, queries={})

    def data(index: Tensor | list[str]) -> Any:
        if isinstance(index, list):
            index = torch.tensor([int(name.removeprefix("id")) for name in index])
        return loop.data(live.x[index], live.y[index])

    whole, small = Trajectory.open(directory / "gradients"), Trajectory.open(directory / "batches")
    return whole, with_gradients(small, loop.make(), loop.sample_loss, data, loop.options.get("auxiliary"))


@pytest.mark.parametrize("name", some_of(BY_NAME, QUICK))
def test_the_steps_are_those_of_a_record_of_gradients_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, small = both(BY_NAME[name], tmp_path)
    for one, other in zip(whole.steps(), small.steps(), strict=True):
        assert one.number == other.number
        assert one.parts.keys() == other.parts.keys()
        for part, values in one.parts.items():
            assert all(torch.equal(value, other.parts[part][key]) for key, value in values.items())
        for key, value in one.after.buffers.items():
            assert torch.equal(value, other.after.buffers[key])


def large_run(directory: Path, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """Fifty steps of 22,000 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 10))
    x, y = torch.randn(64, 100), torch.randint(10, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    tracker = Tracker(model, optimizer, queries={}, trajectory=directory, keyframe_every=100, **options)
    for _ in range(50):
        index = torch.randperm(64)[:16]
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            optimizer.step()
    tracker.finish()
    return model, x, y


def test_it_takes_a_tenth_of_the_room_and_everything_comes_from_it(tmp_path: Path) -> None:
    large_run(tmp_path / "gradients")
    model, x, y = large_run(tmp_path / "batches", record="batches")
    sizes = [sum(file.stat().st_size for file in (tmp_path / kind).rglob("*") if file.is_file())
             for kind in ("gradients", "batches")]  # fmt: skip
    assert sizes[1] < sizes[0] / 10

    whole, raw = Trajectory.open(tmp_path / "gradients"), Trajectory.open(tmp_path / "batches")
    small = with_gradients(raw, model, sample_loss, lambda index: (x[index], y[index]))
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": lambda index: (x[index], y[index])}
    query = Query.loss(x[:2], y[:2])
    for keep in (("step", "group"), ("query", "sample")):
        found, wanted = (
            explain(run, model, query, keep=keep, window=(6, 9), quadrature=Quadrature.fixed(1), progress=False,
                    **(options if "sample" in keep else {})).data["influence"]
            for run in (small, whole)
        )  # fmt: skip
        assert np.array_equal(found.values, wanted.values)

    # what trains again needs no help
    again = rerun(raw, model, start=45, progress=False, **options)
    assert again.proof.exact
    assert torch.equal(again.state_dict()["0.weight"], model[0].weight)
    found, wanted = (
        counterfactual(run, model, query, window=(48, 50), progress=False, **options).data["effect"]
        for run in (raw, whole)
    )
    assert np.array_equal(found.values, wanted.values)


def recorded(directory: Path, **options: Any) -> Any:
    job = make_job()
    tracker = job.tracker(trajectory=directory, record="batches", keyframe_every=4, queries={})
    job.run(tracker, 7, **options)
    tracker.finish()
    return job, Trajectory.open(directory), lambda index: (job.x[index], job.y[index])


def test_without_help_only_its_keyframes_are_to_be_had(tmp_path: Path) -> None:
    job, trajectory, _ = recorded(tmp_path / "t")
    assert trajectory.state_dict(4).keys() == job.model.state_dict().keys()
    with pytest.raises(TrajectoryError, match=r"holds no gradients: explaind_track.with_gradients"):
        trajectory.state_dict(5)
    with pytest.raises(TrajectoryError, match="with_gradients"):
        explain(trajectory, job.model, job.queries["loss"], progress=False)


def test_where_other_bits_come_it_says_from_which_step_on(tmp_path: Path) -> None:
    job, trajectory, data = recorded(tmp_path / "t", other_bits=True)
    again = with_gradients(trajectory, job.model, sample_loss, data)
    other = pytest.warns(ReplayWarning, match="up to step [47] has other bits")
    with other, pytest.warns(RerunWarning, match="from step 0 on") as told:
        assert len(list(again.steps())) == 7
    assert len([one for one in told if one.category is RerunWarning]) == 1
    assert torch.equal(again.state_dict(7)["0.weight"], job.model[0].weight)


def test_other_samples_are_found_out_at_the_next_keyframe(tmp_path: Path) -> None:
    job, trajectory, data = recorded(tmp_path / "t")
    again = with_gradients(trajectory, job.model, sample_loss, lambda index: data((index + 1) % 24))
    off = pytest.raises(TrajectoryError, match="up to step 4 is off")
    with pytest.warns(RerunWarning, match="from step 0 on"), off:
        list(again.steps())


def test_errors_of_ones_own_functions_are_not_blamed_on_the_files(tmp_path: Path) -> None:
    job, trajectory, _ = recorded(tmp_path / "t")
    again = with_gradients(trajectory, job.model, sample_loss, lambda index: {}[0])
    with pytest.raises(KeyError):
        list(again.steps())


def test_what_cannot_be_computed_again_is_kept(tmp_path: Path) -> None:
    """Steps of which the Tracker was told no batch, or that their gradient was altered."""
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", record="batches", queries={})
    for told in (True, False, True):
        with tracker.step():
            job.optimizer.zero_grad()
            if told:
                tracker.batch((job.x, job.y), index=range(24))
            sample_loss(job.model, (job.x, job.y)).mean().backward()
            for parameter in job.model.parameters():
                parameter.grad.sign_()  # type: ignore[union-attr]
            tracker.gradient_altered()
            job.optimizer.step()
    tracker.finish()
    trajectory = Trajectory.open(tmp_path / "t")
    assert len(list(trajectory.steps())) == 3
    assert torch.equal(trajectory.state_dict(3)["0.weight"], job.model[0].weight)  # type: ignore[index,arg-type]


def went_on(directory: Path, steps: int, **options: Any) -> Tracker:
    """A run with dropout, from wherever its tracker says, without an end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    x, y = torch.randn(24, 4, dtype=torch.float64), torch.randint(0, 3, (24,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"record": "batches", "keyframe_every": 4, "queries": {"loss": Query.loss(x[:5], y[:5])}, **options}
    tracker = Tracker(model, optimizer, trajectory=directory, **options)
    while tracker.number < steps:
        with tracker.step():
            index = torch.randperm(24)[:8]
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            optimizer.step()
    return tracker


def weights(tracker: Tracker) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in tracker.model.parameters()]


def test_a_run_is_gone_on_with_from_its_last_keyframe(tmp_path: Path) -> None:
    whole = went_on(tmp_path / "whole", 11)
    whole.finish()

    def killed() -> None:
        went_on(tmp_path / "t", 7).flush()
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(killed), 0)
    assert len(Trajectory.open(tmp_path / "t")) == 7
    with pytest.raises(ValueError, match='was recorded with record="batches"'):
        went_on(tmp_path / "t", 11, record="gradients", resume=True)
    with pytest.raises(ValueError, match="before the steps 0, 4\\), not from step 6"):
        went_on(tmp_path / "t", 11, resume=6)
    with pytest.warns(ResumeWarning, match="steps 4 to 6 were trained .* last keyframe; training goes on from step 4"):
        again = went_on(tmp_path / "t", 11, resume=True)
    again.finish()
    assert all(torch.equal(one, other) for one, other in zip(weights(again), weights(whole), strict=True))
    records = [Trajectory.open(tmp_path / name) for name in ("t", "whole")]
    assert [len(record) for record in records] == [11, 11]
    for number in (4, 8, 11):
        one, other = (record.state_dict(number) for record in records)
        assert all(torch.equal(one[name], value) for name, value in other.items())

    # a run that has ended is gone on with from there
    ended = went_on(tmp_path / "t", 11, resume=True)
    assert ended.number == 11
    ended.finish()


def test_a_kind_of_record_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record= is one of 'gradients', 'batches'"):
        make_job().tracker(trajectory=tmp_path / "t", record="nothing")
