"""What anything but the optimizer changed is in the record, and a run that dies there goes on as if it had not."""

import copy
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from jobs import in_child
from loops import Body, Loop, Run, batches, nesterov, plain
from models import batch_norm
from outside_loops import averaged, between, clamp, reborn
from torch import nn

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain
from explaind_track.core.step import State
from explaind_track.errors import ResumeWarning, SampleMismatchWarning
from explaind_track.record.history import read_rows
from explaind_track.record.manifest import KEYFRAMES, Entry, Manifest
from explaind_track.record.schema import checkpoint_tensors, keyframe_header, share_tensors

STEPS = 12


# --------------------------------------------------------------------- the record


def test_keyframes_stay_as_far_apart_and_prove_the_replay(tmp_path: Path) -> None:
    for name, body in (("plain", plain), ("clamped", between(clamp))):
        Loop("", body).run(trajectory=tmp_path / name, keyframe_every=4)
    trajectories = {name: Trajectory.open(tmp_path / name) for name in ("plain", "clamped")}
    files = [[entry.path for entry in one.manifest.entries] for one in trajectories.values()]
    assert files[0] == files[1]

    clamped = trajectories["clamped"]
    keyframes = [clamped.read(entry).header["continues"] for entry in clamped.manifest.entries if entry.is_keyframe]
    assert keyframes == [False, True, True]  # the first has nothing before it
    assert len(list(clamped.steps())) == 7  # the last clamp is behind the last step


def as_written_before(directory: Path) -> Trajectory:
    """The record as older versions wrote it: a keyframe wherever something else had changed the model."""
    trajectory = Trajectory.open(directory)
    entries = []
    for entry in trajectory.manifest.entries:
        file = trajectory.read(entry)
        tensors = {name: file[name] for name in file.names if not name.startswith("outside:")}
        changed = entry.is_keyframe and not trajectory.outside(entry.first).is_empty
        if not changed:
            entries.append(Entry.write(directory, entry.folder, entry.first, entry.last, tensors, file.header))

    for number in range(1, len(trajectory) + 1):
        if not trajectory.outside(number).is_empty:
            replay = trajectory.replay(number)
            tensors = checkpoint_tensors(replay.observer, State(replay.parameters, replay.buffers))
            tensors |= share_tensors(replay.observer)
            header = keyframe_header(replay.observer, False)
            entries.append(Entry.write(directory, KEYFRAMES, number, number, tensors, header))
    Manifest(trajectory.manifest.head, tuple(entries)).write(directory)
    return Trajectory.open(directory)


@pytest.mark.parametrize("body", [between(clamp), averaged], ids=["clamped", "averaged"])
def test_records_of_older_versions_tell_the_same(body: Body, tmp_path: Path) -> None:
    run = Loop("", body, batch_norm, nesterov).run(trajectory=tmp_path / "t", keyframe_every=4)
    keep: dict[str, Any] = {"keep": ("step", "group"), "quadrature": Quadrature.fixed(1), "progress": False}

    def told(trajectory: Trajectory) -> list[xr.Dataset]:
        windows = ((0, 6), (2, 3), (4, 6), (3, 5))
        return [explain(trajectory, run.model, run.query, window=window, **keep).data for window in windows]

    def states(trajectory: Trajectory) -> list[dict[str, torch.Tensor]]:
        return [trajectory.state_dict(step) for step in range(7)]

    now = Trajectory.open(tmp_path / "t")
    wanted, checkpoints = told(now), states(now)
    before = as_written_before(tmp_path / "t")
    for found, data in zip(told(before), wanted, strict=True):
        xr.testing.assert_identical(found, data)
    for found, state in zip(states(before), checkpoints, strict=True):
        assert all(torch.equal(found[name], value) for name, value in state.items())

    # and they are gone on with
    again = Loop("", body, batch_norm, nesterov).run(trajectory=tmp_path / "t", resume=True)
    assert again.tracker.number == 12
    assert len(list(Trajectory.open(tmp_path / "t").steps())) == 13


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    def shifted(model: nn.Module) -> None:
        with torch.no_grad():
            model[2].bias.add_(0.1)

    Loop("", between(shifted)).run(trajectory=tmp_path / "t")
    trajectory = Trajectory.open(tmp_path / "t")
    assert [list(trajectory.outside(step).parameters) for step in range(7)] == [[], *[["2.bias"]] * 6]


def test_moments_that_change_along_with_the_weights_are_in_a_keyframe(tmp_path: Path) -> None:
    run = Loop("", reborn).run(trajectory=tmp_path / "t", quadrature=Quadrature(1e-9, 4, 64))
    trajectory, model = Trajectory.open(tmp_path / "t"), run.model
    replaced = [step for step in range(1, 7) if trajectory.is_replaced(step)]
    assert replaced == [3]
    offline = explain(
        trajectory,
        model,
        run.query,
        parts=run.tracker.parts("query"),
        quadrature=run.tracker.quadrature,
        progress=False,
    )
    xr.testing.assert_equal(offline.data["influence"], run.tracker.influence("query").data["influence"])

    # what momentum carried on is cut off there, and its samples with it
    one_node = Quadrature.fixed(1)

    def of_samples(window: tuple[int, int]) -> float:
        found = explain(
            trajectory, model, run.query, keep=("query", "output", "sample"), window=window, quadrature=one_node,
            sample_loss=run.sample_loss, data=lambda index: (run.x[index], run.y[index]), progress=False,
        ).data  # fmt: skip
        return float(abs(found["influence"].sum("sample") - found["kernel"]).max())

    assert of_samples((0, 3)) < 1e-12
    with pytest.warns(SampleMismatchWarning, match="something other than its steps has changed that state"):
        of_samples((0, 6))


def test_checkpoints_are_where_the_steps_begin(tmp_path: Path) -> None:
    begun: list[dict[str, torch.Tensor]] = []

    def body(run: Run) -> None:
        for index in batches():
            begun.append({name: value.clone() for name, value in run.model.state_dict().items()})
            run.step(index)
            clamp(run.model)

    run = Loop("", body).run(trajectory=tmp_path / "t", keyframe_every=4)
    begun.append(dict(run.model.state_dict()))
    trajectory = Trajectory.open(tmp_path / "t")
    for step, state in enumerate(begun):
        found = trajectory.state_dict(step)
        assert all(torch.equal(found[name], value) for name, value in state.items())


# ----------------------------------------------------------- killed, and taken up again


def job(
    directory: Path,
    resume: bool | int = False,
    act: Callable[[str, Tracker], None] = lambda *_: None,
    saved: Mapping[str, Any] | None = None,
) -> Tracker:
    """Weights that shrink before every forward pass, are clamped behind every step, and more so at the end.

    act: is told of every place that the loop comes to. saved: a checkpoint of the loop's own.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))
    queries = {"query": Query.outputs(x[:5], y[:5])}
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
    tracker = Tracker(model, optimizer, queries=queries, trajectory=directory, keyframe_every=4, resume=resume)
    while tracker.number < STEPS:
        act("between", tracker)
        with tracker.step():
            act("begun", tracker)
            with torch.no_grad():
                model[0].weight.mul_(0.99)
            optimizer.zero_grad()
            index = torch.randperm(24)[:8]
            tracker.batch((x[index], y[index]), index=index)
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            act("backward", tracker)
            optimizer.step()
            act("stepped", tracker)
        act("behind", tracker)
        clamp(model)
    with torch.no_grad():
        model[4].weight.clamp_(-0.05, 0.05)  # again where the finished run is taken up
    tracker.finish()
    return tracker


class Whole:
    """The run that nothing happens to."""

    def __init__(self, directory: Path) -> None:
        self.tracker = job(directory)
        self.rows, self.steps = rows_of(directory), steps_of(directory)

    def check(self, directory: Path) -> None:
        """That the run in the directory, taken up, is this one, bit for bit."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResumeWarning)
            self.compare(directory, job(directory, resume=True))

    def compare(self, directory: Path, tracker: Tracker) -> None:
        for name, value in tracker.model.state_dict().items():
            assert torch.equal(value, self.tracker.model.state_dict()[name]), name
        assert rows_of(directory) == self.rows
        for mine, other in zip(self.steps, steps_of(directory), strict=True):
            assert mine.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in mine.items())
        xr.testing.assert_identical(tracker.influence("query").data, self.tracker.influence("query").data)


def rows_of(directory: Path) -> list[dict[str, float]]:
    return [{key: v for key, v in row.items() if not key.startswith("cost/")} for row in read_rows(directory)]


def steps_of(directory: Path) -> list[dict[str, torch.Tensor]]:
    found = []
    for step in Trajectory.open(directory).steps():
        values = {f"after {name}": value.clone() for name, value in step.after.parameters.items()}
        values |= {f"buffer {name}": value.clone() for name, value in step.after.buffers.items()}
        for change in (step, step.outside):
            parts = {} if change is None else change.parts
            values |= {f"{part} {name}": v for part, of in parts.items() for name, v in of.items()}
        found.append(values)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "t")


PLACES = ("between", "begun", "backward", "stepped", "behind")


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("number", [3, 4, 7])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_dies_there_goes_on_as_if_it_had_not(
    place: str, number: int, kind: str, tmp_path: Path, whole: Whole
) -> None:
    def die(here: str, tracker: Tracker) -> None:
        if here == place and tracker.number == number:
            os.kill(os.getpid(), getattr(signal, kind))
            time.sleep(10)

    os.waitpid(in_child(lambda: job(tmp_path / "t", act=die)), 0)
    whole.check(tmp_path / "t")


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM"])
def test_runs_that_die_at_random_moments(kind: str, tmp_path: Path, whole: Whole) -> None:
    chance = random.Random(kind)
    for trial in range(4):
        directory = tmp_path / str(trial)
        for _ in range(3):
            child = in_child(partial(job, directory, resume=True))
            time.sleep(chance.uniform(0, 0.3))
            os.kill(child, getattr(signal, kind))
            os.waitpid(child, 0)
        whole.check(directory)


@pytest.mark.parametrize("at", [5, 8])
def test_a_checkpoint_of_the_loop_is_gone_on_from(at: int, tmp_path: Path, whole: Whole) -> None:
    """The loop has saved the model between two steps, where something has changed it since the first of them."""
    saved: dict[str, Any] = {}

    def save(here: str, tracker: Tracker) -> None:
        if here == "between" and tracker.number == at:
            saved["model"] = copy.deepcopy(tracker.model.state_dict())
            saved["optimizer"] = copy.deepcopy(tracker.optimizer.state_dict())
            saved["random"] = torch.get_rng_state()

    job(tmp_path / "t", act=save)
    whole.compare(tmp_path / "t", job(tmp_path / "t", resume=at, saved=saved))


def test_a_finished_run_is_gone_on_with(tmp_path: Path) -> None:
    """The weights that were averaged at its end are where the next step begins."""
    Loop("", averaged).run(trajectory=tmp_path / "t")
    run = Loop("", averaged).run(trajectory=tmp_path / "t", resume=True)
    assert run.tracker.number == 12
    by_output = run.tracker.influence("query", ("query", "output"))
    assert float(by_output.residual) < 1e-2
    steps = run.tracker.influence("query").data["step"].values.tolist()
    assert steps == list(range(13))
    trajectory = Trajectory.open(tmp_path / "t")
    assert [step.number for step in trajectory.steps() if step.outside is not None] == [6, 12]
