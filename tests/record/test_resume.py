"""A run that dies and is taken up again is, bit for bit, the run that never died."""

import copy
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from jobs import in_child, make_job, sample_loss
from torch import nn

from explaind_track import Influence, Query, Tracker, Trajectory
from explaind_track.errors import ResumeWarning, TrajectoryError
from explaind_track.record.history import read_rows
from explaind_track.record.manifest import Manifest

STEPS = 23


def job(
    directory: Path, resume: bool | int = False, before_step: Callable[[Tracker], None] = lambda _: None
) -> Tracker:
    """Trains a model with dropout and batch norm to step `STEPS`, from wherever its tracker says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))

    tracker = Tracker(
        model,
        optimizer,
        queries={"query": Query.outputs(x[:5], y[:5]), "loss": Query.loss(x[5:9], y[5:9]).mean()},
        sample_loss=sample_loss,
        auxiliary={"l1": lambda model: 0.01 * model[0].weight.abs().sum()},
        trajectory=directory,
        keyframe_every=5,
        resume=resume,
    )

    while tracker.number < STEPS:
        before_step(tracker)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.9**tracker.number
        with tracker.step():
            index = torch.randperm(24)[:8]
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            loss = sample_loss(model, (x[index], y[index])).mean() + 0.01 * model[0].weight.abs().sum()
            loss.backward()
            tracker.clip_grad_norm_(0.5)
            optimizer.step()

    tracker.finish()
    return tracker


def steps_of(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Everything of every step, as copies."""
    found = []
    for step in Trajectory.open(directory).steps():
        values = {f"{part} {name}": v.clone() for part in step.parts for name, v in step.parts[part].items()}
        values |= {
            f"after {name}": v.clone() for name, v in (*step.after.parameters.items(), *step.after.buffers.items())
        }
        values |= {f"index {place}": batch.index for place, batch in enumerate(step.batches)}
        found.append(values)
    return found


def rows_of(directory: Path) -> list[dict[str, float]]:
    """The rows of metrics, without what a clock said."""
    return [{key: v for key, v in row.items() if not key.startswith("cost/")} for row in read_rows(directory)]


class Whole:
    """The run that nothing happens to."""

    def __init__(self, directory: Path) -> None:
        tracker = job(directory)
        self.steps, self.rows = steps_of(directory), rows_of(directory)
        self.influence = tracker.influence("query")

    def check(self, directory: Path, influence: Influence) -> None:
        for mine, other in zip(self.steps, steps_of(directory), strict=True):
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[name], other[name]) for name in mine)
        assert rows_of(directory) == self.rows
        xr.testing.assert_identical(influence.data, self.influence.data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "t")


def resumed(directory: Path) -> Tracker:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResumeWarning)
        return job(directory, resume=True)


def full_disk(directory: Path, size: int) -> None:
    """No file may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    resumed(directory)


def survive(directory: Path, whole: Whole, kind: str, chance: random.Random, duration: float) -> None:
    for _ in range(chance.randint(1, 3)):
        if kind == "full disk":
            child = in_child(lambda: full_disk(directory, chance.randint(100, 40_000)))
        else:
            child = in_child(lambda: resumed(directory))
            time.sleep(chance.uniform(0, duration))
            os.kill(child, getattr(signal, kind))
        os.waitpid(child, 0)
        manifest = directory / "manifest.json"
        if manifest.is_file() and json.loads(manifest.read_text())["files"]:
            number = len(Trajectory.open(directory))  # whatever happened, it can be opened
            assert len(list(Trajectory.open(directory).steps())) == number
    whole.check(directory, resumed(directory).influence("query"))


KINDS = ("SIGKILL", "SIGTERM", "full disk")


@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_die_at_random_moments(kind: str, tmp_path: Path, whole: Whole) -> None:
    chance = random.Random(kind)
    started = time.perf_counter()
    job(tmp_path / "timed")
    duration = time.perf_counter() - started
    for trial in range(2):
        survive(tmp_path / f"{trial}", whole, kind, chance, duration)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_deaths(kind: str, tmp_path: Path, whole: Whole) -> None:
    chance = random.Random(kind + "200")
    for trial in range(67):
        survive(tmp_path / f"{trial}", whole, kind, chance, 0.6)


def test_sigterm_loses_no_step(tmp_path: Path) -> None:
    """keyframe_every is far away, so all that is on disk was written on the way out."""
    told, tell = os.pipe()

    def wait(tracker: Tracker) -> None:
        if tracker.number == 4:
            os.write(tell, b"x")
            time.sleep(30)

    child = in_child(lambda: job(tmp_path / "t", before_step=wait))
    os.read(told, 1)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    assert len(Trajectory.open(tmp_path / "t")) == 4


def test_steps_that_are_lost_are_named(tmp_path: Path, whole: Whole) -> None:
    directory = tmp_path / "t"
    child = in_child(lambda: stop_hard(directory, 8))
    os.waitpid(child, 0)
    assert len(Trajectory.open(directory)) == 5
    with pytest.warns(ResumeWarning, match="steps 5 to 7 were trained before the run ended"):
        tracker = job(directory, resume=True)
    whole.check(directory, tracker.influence("query"))


def stop_hard(directory: Path, number: int) -> None:
    def stop(tracker: Tracker) -> None:
        if tracker.number == number:
            os._exit(9)

    job(directory, before_step=stop)


@pytest.mark.parametrize("at", [5, 7])
def test_a_checkpoint_of_the_loop_is_gone_on_from(at: int, tmp_path: Path, whole: Whole) -> None:
    """The loop has its own checkpoint of step `at`; what the record holds of later steps is dropped, at one moment."""
    directory = tmp_path / "t"
    job(directory)
    early = tmp_path / "early"
    saved: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def save(tracker: Tracker) -> None:
        if tracker.number == at:
            saved.update(
                model={n: v.clone() for n, v in tracker.model.state_dict().items()},
                optimizer=tracker.optimizer.state_dict(),
                random=torch.get_rng_state(),
            )
            raise Enough

    with pytest.raises(Enough):
        job(early, before_step=save)

    def load(tracker: Tracker) -> None:
        if tracker.number == at:
            torch.set_rng_state(saved["random"])

    make = torch.optim.Adam

    def loaded(*arguments: Any, **options: Any) -> torch.optim.Adam:
        optimizer = make(*arguments, **options)
        optimizer.load_state_dict(saved["optimizer"])
        return optimizer

    sequential = nn.Sequential

    def with_weights(*modules: nn.Module) -> nn.Module:
        model = sequential(*modules)
        model.load_state_dict(saved["model"])
        return model

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", loaded)
        patch.setattr(nn, "Sequential", with_weights)
        with pytest.MonkeyPatch.context() as interruption:
            interruption.setattr(Manifest, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                job(directory, resume=at, before_step=load)
        assert len(steps_of(directory)) == STEPS

        tracker = job(directory, resume=at, before_step=load)
    whole.check(directory, tracker.influence("query"))


def test_a_record_that_is_cut_has_the_random_state_of_its_new_end(tmp_path: Path) -> None:
    first, again = make_job(), make_job()
    tracker = first.tracker(trajectory=tmp_path / "t", keyframe_every=4)
    first.run(tracker, 6)
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    first.run(tracker, 3)
    tracker.finish()

    torch.manual_seed(7)
    expected = torch.get_rng_state()
    again.tracker(trajectory=tmp_path / "t", resume=6).finish()
    trajectory = Trajectory.open(tmp_path / "t")
    assert len(trajectory) == 6
    assert torch.equal(trajectory.random_state()["cpu"], expected)


def test_another_state_than_the_records_is_refused(tmp_path: Path) -> None:
    job(tmp_path / "t")
    with pytest.raises(ValueError, match=r"not what the record says they were before step 7: they differ in"):
        job(tmp_path / "t", resume=7)
    assert len(Trajectory.open(tmp_path / "t")) == STEPS


def test_another_model_is_refused(tmp_path: Path) -> None:
    job(tmp_path / "t")
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has other optimizer"):
        Tracker(
            model,
            torch.optim.SGD(model.parameters()),
            queries={"q": Query.outputs(torch.zeros(1, 2))},
            trajectory=tmp_path / "t",
            resume=True,
        )


def test_one_process_at_a_time(tmp_path: Path) -> None:
    writing: list[Tracker] = []

    def stop(tracker: Tracker) -> None:
        if tracker.number == 7:
            writing.append(tracker)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "t", before_step=stop)
    with pytest.raises(TrajectoryError, match="process is writing to"):
        job(tmp_path / "t", resume=True)


def test_a_finished_run_can_be_gone_on_with(tmp_path: Path, whole: Whole) -> None:
    directory = tmp_path / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "STEPS", 12)
        job(directory)
    tracker = job(directory, resume=True)
    whole.check(directory, tracker.influence("query"))
    assert json.loads((directory / "manifest.json").read_text())["files"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match="cannot be made"):
        job(tmp_path / "file" / "t")
