"""A fault at any file operation of a run loses no step that was flushed, and changes no number without a word.

The operations of a run from its beginning to its end, of one that is resumed or cut, and of `explain(out=…)` are
counted; each of them goes wrong in each way that `faults` knows; then the run goes on, and is what it would have been.
"""

import mmap
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from faults import KINDS, operations, suffer
from jobs import in_child, sample_loss
from torch import nn

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain, open_influence
from explaind_track.errors import ResumeWarning
from explaind_track.record.history import read_rows
from explaind_track.record.manifest import Manifest
from explaind_track.record.results import LABELS

STEPS, CUT = 7, 4


@dataclass
class Checkpoint:
    """The loop's own, of the beginning of a step."""

    number: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    random: torch.Tensor


def train(
    directory: Path,
    resume: bool = False,
    checkpoint: Checkpoint | None = None,
    before_step: Callable[[Tracker], None] = lambda _: None,
) -> Tracker:
    """Trains a model with dropout and batch norm to step `STEPS`, from wherever its tracker says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))
    if checkpoint is not None:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.random)

    tracker = Tracker(
        model,
        optimizer,
        queries={"loss": Query.loss(x[:5], y[:5]).mean()},
        sample_loss=sample_loss,
        samples_every=5,
        render=lambda index: torch.full((2, 2), float(index % 2)).numpy(),
        trajectory=directory,
        keyframe_every=3,
        resume=resume if checkpoint is None else checkpoint.number,
    )

    while tracker.number < STEPS:
        before_step(tracker)
        with tracker.step():
            index = torch.randperm(24)[:4]
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            tracker.log({"own": float(tracker.number)})
            optimizer.step()
    tracker.finish()
    return tracker


def rows_of(directory: Path) -> dict[int, dict[str, Any]]:
    """The rows by step, without what a clock said."""
    rows = read_rows(directory)
    assert len({row["train/step"] for row in rows}) == len(rows)
    return {row["train/step"]: {k: v for k, v in row.items() if not k.startswith("cost/")} for row in rows}


def states_of(trajectory: Trajectory) -> list[dict[str, torch.Tensor]]:
    found = [{n: v.clone() for n, v in step.before.parameters.items()} for step in trajectory.steps()]
    return [*found, trajectory.state_dict(len(trajectory))]


class Whole:
    """The run that nothing happens to, and a checkpoint of it."""

    def __init__(self, directory: Path) -> None:
        def save(tracker: Tracker) -> None:
            if tracker.number == CUT:
                state = {name: value.clone() for name, value in tracker.model.state_dict().items()}
                optimizer = tracker.optimizer
                self.checkpoint = Checkpoint(CUT, state, _copied(optimizer.state_dict()), torch.get_rng_state())

        self.directory = directory
        tracker = train(directory, before_step=save)
        self.states, self.rows = states_of(Trajectory.open(directory)), rows_of(directory)
        self.influence = tracker.influence("loss").data

    def check(self, directory: Path, tracker: Tracker, told: list[str]) -> None:
        """Steps and influences are equal to the bit; of a row that was lost, what is missing was told."""
        trajectory = Trajectory.open(directory)
        for mine, other in zip(self.states, states_of(trajectory), strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in mine)
        xr.testing.assert_identical(tracker.influence("loss").data, self.influence)

        rows = rows_of(directory)
        assert rows.keys() == self.rows.keys()
        for step, row in self.rows.items():
            if rows[step] != row:
                lacking = row.keys() - rows[step].keys()
                assert rows[step] == {key: value for key, value in row.items() if key not in lacking}
                assert any(step in _steps_named(text) for text in told), (step, lacking, told)


def _copied(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _steps_named(text: str) -> set[int]:
    """Those of which a warning says that their rows were lost."""
    found = re.search(r"the rows of the steps ([\d, to]+) were not written", text)
    stretches = re.findall(r"(\d+)(?: to (\d+))?", found[1]) if found else []
    return {step for first, last in stretches for step in range(int(first), int(last or first) + 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "t")


def counting(flushed: mmap.mmap) -> None:
    """From here on, in this process, notes how many steps a manifest on disk has had at most."""
    write = Manifest.write

    def written(manifest: Manifest, directory: Path) -> None:
        write(manifest, directory)
        flushed[0] = max(flushed[0], manifest.steps)

    Manifest.write = written  # type: ignore[method-assign]


class Record:
    """Faults while a run is recorded."""

    def __init__(self, whole: Whole, tmp_path: Path, kind: str) -> None:
        self.whole, self.kind, self.flushed = whole, kind, mmap.mmap(-1, 1)
        self.directory, self.start = tmp_path / "t", tmp_path / "start"
        if kind == "resumed":
            child = in_child(lambda: train(self.start, before_step=self._stop))
            os.waitpid(child, 0)
        if kind == "cut":
            shutil.copytree(whole.directory, self.start)

    @staticmethod
    def _stop(tracker: Tracker) -> None:
        if tracker.number == CUT + 1:
            os._exit(9)

    def prepare(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, self.directory)
        self.flushed[0] = 0

    def act(self) -> None:
        counting(self.flushed)
        warnings.simplefilter("ignore")  # of W&B, and what a killed process tells of nobody sees
        checkpoint = self.whole.checkpoint if self.kind == "cut" else None
        train(self.directory, resume=self.kind == "resumed", checkpoint=checkpoint)

    def check(self) -> None:
        """Whatever happened, the record opens, with all the steps that were flushed; and the run goes on."""
        number = 0
        if self.kind != "begun" or self.flushed[0]:
            number = len(Trajectory.open(self.directory))
        least = {"begun": 0, "resumed": 3, "cut": CUT}[self.kind]
        assert number >= max(least, self.flushed[0])

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker = train(self.directory, resume=True)
        assert {warning.category for warning in caught} <= {ResumeWarning}
        self.whole.check(self.directory, tracker, [str(warning.message) for warning in caught])
        left = [path for path in self.directory.rglob("*") if path.name.endswith(".part")]
        assert left == []
        named = {entry.path for entry in Manifest.read(self.directory).entries}
        assert {str(p.relative_to(self.directory)) for p in self.directory.glob("*/*.safetensors")} == named


class Result:
    """Faults while a result is written."""

    def __init__(self, whole: Whole, tmp_path: Path, keep: tuple[str, ...]) -> None:
        self.trajectory, self.directory, self.keep = Trajectory.open(whole.directory), tmp_path / "r", keep
        self.wanted = self._explain(tmp_path / "whole")

    def prepare(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def act(self) -> None:
        self._explain(self.directory)

    def _explain(self, out: Path) -> xr.Dataset:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))
        x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))
        options: dict[str, Any] = {"keep": self.keep, "quadrature": Quadrature.fixed(1), "progress": False, "out": out}
        if "sample" in self.keep:
            options |= {"sample_loss": sample_loss, "data": lambda index: (x[index], y[index])}
        memory = 12_000 if "sample" in self.keep else 600
        return explain(self.trajectory, model, Query.outputs(x[:4]), memory=memory, **options).data.load()

    def check(self) -> None:
        if (self.directory / LABELS).exists():
            xr.testing.assert_identical(open_influence(self.directory).data, self.wanted)
        xr.testing.assert_identical(self._explain(self.directory), self.wanted)
        xr.testing.assert_identical(open_influence(self.directory).data, self.wanted)
        assert not list(self.directory.glob("*.part"))


SCENARIOS: dict[str, Callable[[Whole, Path], Record | Result]] = {
    "a run from its beginning to its end": lambda whole, path: Record(whole, path, "begun"),
    "a run that is resumed": lambda whole, path: Record(whole, path, "resumed"),
    "a run that is cut": lambda whole, path: Record(whole, path, "cut"),
    "explain(out=) of groups": lambda whole, path: Result(whole, path, ("step", "group", "query")),
    "explain(out=) of sums": lambda whole, path: Result(whole, path, ("query", "output")),
    "explain(out=) of samples": lambda whole, path: Result(whole, path, ("step", "query", "sample")),
}


@pytest.mark.parametrize("sample", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_at_any_file_operation(name: str, sample: int | None, whole: Whole, tmp_path: Path) -> None:
    scenario = SCENARIOS[name](whole, tmp_path)
    scenario.prepare()
    done = operations(scenario.directory, scenario.act)
    points = [(at, kind) for at in range(len(done)) for kind in KINDS]
    print(f"{name}: {len(done)} operations, {len(points)} points")
    if sample is not None:
        points = random.Random(name).sample(points, sample)

    failures = []
    for at, kind in points:
        scenario.prepare()
        suffer(scenario.directory, scenario.act, at, kind)
        try:
            scenario.check()
        except Exception as error:
            failures.append(f"{done[at]} ({at}) {kind}: {type(error).__name__} {str(error)[:300]}")
    assert failures == [], "\n".join([f"{len(failures)} of {len(points)}", *failures])


def test_a_file_takes_its_name_once_it_is_on_the_disk_and_so_does_the_name(whole: Whole, tmp_path: Path) -> None:
    """What a machine that loses its power may leave: nothing is named before its content and its own name are safe."""
    scenario = Record(whole, tmp_path, "begun")
    scenario.prepare()
    done = operations(scenario.directory, scenario.act)
    renamed = [(place, done[place].removeprefix("rename ")) for place in range(len(done)) if "rename" in done[place]]
    assert len(renamed) > 10
    for place, path in renamed:
        folder = path.rpartition("/")[0]
        assert done[place - 1] == f"fsync {path}.part"
        assert done[place + 1 : place + 3] == [f"open {folder}", f"fsync {folder}"]
    for place, operation in enumerate(done):
        if operation.startswith("mkdir "):
            folder = operation.removeprefix("mkdir ").rpartition("/")[0]
            assert not operation.endswith("/keyframes") or done[place + 2] == f"fsync {folder}"
