"""Exceptions and Ctrl-C at any line of the package: the record, and all that follows from it, is right behind them."""

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from jobs import sample_loss
from torch import nn

import explaind_track
from explaind_track import Query, Tracker, Trajectory, explain
from explaind_track.core.switches import SWITCHES
from explaind_track.record.history import read_rows

pytestmark = pytest.mark.filterwarnings("ignore::explaind_track.errors.ResumeWarning")

PACKAGE = str(Path(explaind_track.__file__).parent)
STEPS = 4


class Interruption(Exception):
    pass


ERRORS: tuple[type[BaseException], ...] = (Interruption, KeyboardInterrupt)


class Lines:
    """Counts the lines of the package that are run, and raises at one of them."""

    def __init__(self, at: int | None = None, error: type[BaseException] = Interruption) -> None:
        """at: the number of the line to raise at; None: at none."""
        self.count, self._at, self._error = 0, at, error
        self.place = ""
        """Where it was raised."""

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count - 1 == self._at:
                self.place = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
                raise self._error(self.place)
        return self._line

    @contextmanager
    def counted(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)


class Run:
    """A small run, watched and recorded, whose batches follow from the number of the step."""

    def __init__(self, directory: Path, resume: bool = False) -> None:
        torch.manual_seed(0)
        self.directory = directory
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.3), nn.Linear(2, 2)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        self.x, self.y = torch.randn(8, 3).double(), torch.arange(8) % 2
        self.tracker = Tracker(
            self.model,
            self.optimizer,
            queries={"query": Query.outputs(self.x[:2], self.y[:2])},
            sample_loss=sample_loss,
            auxiliary={"l1": self.l1},
            trajectory=directory,
            keyframe_every=2,
            resume=resume,
        )
        self.begun: list[dict[str, torch.Tensor]] = []
        """The model as each step of the record began."""

    def l1(self, model: nn.Module) -> torch.Tensor:
        return 0.01 * model[0].weight.abs().sum()  # type: ignore[index, union-attr]

    def _look(self) -> None:
        del self.begun[self.tracker.number :]
        self.begun.append({name: value.clone() for name, value in self.model.state_dict().items()})

    def step(self) -> None:
        """Trains a step. Its random numbers are its own, so that a step that is taken again draws the same."""
        self._look()
        number = self.tracker.number
        index = torch.arange(4) + number
        torch.manual_seed(number)
        with self.tracker.step():
            self.optimizer.zero_grad()
            self.tracker.batch((self.x[index], self.y[index]), index=index)
            (sample_loss(self.model, (self.x[index], self.y[index])).mean() + self.l1(self.model)).backward()
            self.tracker.clip_grad_norm_(0.5)
            self.tracker.log({"number": number})
            self.optimizer.step()

    def go_on(self) -> "Run":
        """Trains to the end."""
        while self.tracker.number < STEPS:
            self.step()
        self._look()
        self.tracker.finish()
        return self

    def content(self) -> dict[str, Any]:
        """What has to be the same, bit for bit, after a run was resumed."""
        rows = read_rows(self.directory)
        assert all(row.get("number", row["train/step"]) == row["train/step"] for row in rows)
        return {
            "weights": {name: value.tolist() for name, value in self.model.state_dict().items()},
            "steps": steps_of(self.directory),
            "rows": [{k: v for k, v in row.items() if k != "number" and not k.startswith("cost/")} for row in rows],
            "influence": self.tracker.influence("query").data.to_dict(),
            "by output": self.tracker.influence("query", ("query", "output")).data.to_dict(),
        }


def steps_of(directory: Path) -> list[dict[str, Any]]:
    found = []
    for step in Trajectory.open(directory).steps():
        values = {f"{part} {name}": v.tolist() for part in step.parts for name, v in step.parts[part].items()}
        after = {**step.after.parameters, **step.after.buffers}
        values |= {f"after {name}": value.tolist() for name, value in after.items()}
        found.append({**values, "index": [batch.index.tolist() for batch in step.batches]})
    return found


ACTIONS: dict[str, Callable[[Run], Any]] = {
    "step": Run.step,
    "record": lambda run: run.tracker.recorded(),
    "finish": lambda run: run.tracker.finish(),
}


def interrupted(
    directory: Path, action: str, number: int, at: int | None, error: type[BaseException]
) -> tuple[Run, Lines]:
    """A run whose action at step `number` was interrupted."""
    run, lines = Run(directory), Lines(at, error)
    while run.tracker.number < number:
        run.step()
    with suppress(*ERRORS), lines.counted():
        ACTIONS[action](run)
    assert all(module.training for module in run.model.modules()), lines.place
    assert all(read() for read, _ in SWITCHES), lines.place
    return run, lines


def check_resumed(directory: Path, whole: dict[str, Any], place: str) -> None:
    found = Run(directory, resume=True).go_on().content()
    for what, value in whole.items():
        assert found[what] == value, (what, place)


def check_gone_on(run: Run, place: str) -> None:
    """The record is that of the steps which were taken in fact."""
    live = run.go_on().tracker.influence("query").data
    trajectory, rows = Trajectory.open(run.directory), read_rows(run.directory)
    assert len(trajectory) == STEPS, place
    for number, state in enumerate(run.begun):
        found = trajectory.state_dict(number)
        assert all(torch.equal(value, found[name]) for name, value in state.items()), (number, place)

    steps = [row["train/step"] for row in rows]
    assert steps == sorted(set(steps)), place
    again = explain(
        trajectory, run.model, Query.outputs(run.x[:2], run.y[:2]), parts=run.tracker.parts("query"),
        quadrature=run.tracker.quadrature, progress=False,
    ).data  # fmt: skip
    assert live["step"].values.tolist() == again["step"].values.tolist(), place
    assert abs(live["influence"] - again["influence"]).max() < 1e-12, place
    assert float(abs(live["residual"]).max()) < 0.1, place  # outside of what the parts explain, there is nothing


def killed(run: Run, whole: dict[str, Any], place: str) -> None:
    """The process is gone, and another one takes the run up."""
    copy = run.directory.with_name("copy")
    shutil.copytree(run.directory, copy)
    check_resumed(copy, whole, f"killed at {place}")


def finished(run: Run, whole: dict[str, Any], place: str) -> None:
    """As by `finally: tracker.finish()`; the run is taken up later."""
    run.tracker.finish()
    check_resumed(run.directory, whole, f"finished behind {place}")


def gone_on(run: Run, whole: dict[str, Any], place: str) -> None:
    """The loop goes on."""
    check_gone_on(run, f"gone on behind {place}")


FOLLOWING = (killed, finished, gone_on)


def check(path: Path, whole: dict[str, Any], action: str, number: int, at: int, error: type[BaseException]) -> None:
    """What may follow upon an interruption: from line to line something else."""
    run, lines = interrupted(path / "run", action, number, at, error)
    following = FOLLOWING[at % (2 if action == "finish" else 3)]
    following(run, whole, lines.place)


POINTS = [("step", 0), ("step", 2), ("step", 3), ("record", 2), ("record", 3), ("finish", 3), ("finish", 4)]
"""What is interrupted, and at which step: the first, one with a keyframe, one without."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nothing interrupts."""
    return Run(tmp_path_factory.mktemp("whole") / "run").go_on().content()


def points_of(path: Path, action: str, number: int) -> range:
    """The lines that the action runs."""
    return range(interrupted(path / "counted", action, number, None, Interruption)[1].count)


@pytest.mark.parametrize(("action", "number"), POINTS)
def test_an_interruption_anywhere(action: str, number: int, tmp_path: Path, whole: dict[str, Any]) -> None:
    """At some of the lines, in every run of the tests."""
    chance, points = random.Random(f"{action} {number}"), points_of(tmp_path, action, number)
    for at in chance.sample(points, 3):
        (tmp_path / str(at)).mkdir()
        check(tmp_path / str(at), whole, action, number, at, ERRORS[at % 2])


@pytest.mark.slow
@pytest.mark.parametrize(("action", "number"), POINTS)
def test_an_interruption_at_every_line(action: str, number: int, tmp_path: Path, whole: dict[str, Any]) -> None:
    """By an exception and by Ctrl-C in turn."""
    points, failed = points_of(tmp_path, action, number), []
    for at in points:
        (tmp_path / str(at)).mkdir()
        try:
            check(tmp_path / str(at), whole, action, number, at, ERRORS[at % 2])
        except Exception as problem:
            failed.append(f"{at}: {problem!r}"[:300])
        shutil.rmtree(tmp_path / str(at))
    print(f"{action} {number}: interrupted at {len(points)} lines")
    assert not failed, failed[:20]
