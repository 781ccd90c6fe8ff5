"""A fault at any file operation of what is sent to W&B leaves the record whole; the same call again completes it."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import KINDS, operations, suffer
from jobs import in_child, make_job
from servers import Server

from explaind_track import Trajectory
from explaind_track.record.run_directory import Tie, write_tie
from explaind_track.wandb_io.artifacts import add_offline, trajectory_version
from explaind_track.wandb_io.sync import sync

STEPS = 5
ALL = pytest.param(None, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded") / "t"
    job = make_job()
    tracker = job.tracker(trajectory=directory, keyframe_every=3)
    job.run(tracker, STEPS)
    tracker.finish()
    return directory


def faults(
    root: Path, prepare: Callable[[], Any], act: Callable[[], Any], check: Callable[[], Any], sample: int | None
) -> None:
    """Lets each operation beneath the directory go wrong, or as many as `sample` says."""
    prepare()
    done = operations(root, act)
    points = [(at, kind) for at in range(len(done)) for kind in KINDS]
    print(f"{len(done)} operations, {len(points)} points")
    failures = []
    for at, kind in points if sample is None else random.Random(1).sample(points, sample):
        prepare()
        suffer(root, act, at, kind)
        try:
            check()
        except Exception as error:
            failures.append(f"{done[at]} ({at}) {kind}: {type(error).__name__} {str(error)[:300]}")
    assert failures == [], "\n".join([f"{len(failures)} of {len(points)}", *failures])


def last_of(directory: Path) -> torch.Tensor:
    trajectory = Trajectory.open(directory)
    assert sum(1 for _ in trajectory.steps()) == STEPS
    return trajectory.state_dict(STEPS)["0.weight"]


@pytest.mark.parametrize("sample", [4, ALL], ids=["some", "all"])
def test_while_a_record_is_added_to_an_offline_run(sample: int | None, recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "all"
    run: Any = SimpleNamespace(
        id="a", settings=SimpleNamespace(sync_dir=str(root / "w")), log_artifact=lambda *_, **__: None
    )

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(recorded, root / "t")
        (root / "w").mkdir()
        (root / "w" / "trajectory").symlink_to(root / "t", target_is_directory=True)

    def check() -> None:
        assert torch.equal(last_of(root / "t"), last_of(recorded))
        add_offline(run, root / "t")
        assert torch.equal(last_of(root / "w" / "trajectory"), last_of(recorded))

    faults(root, prepare, lambda: add_offline(run, root / "t"), check, sample)


@pytest.mark.parametrize("sample", [4, ALL], ids=["some", "all"])
def test_while_a_version_is_made_for_the_upload(sample: int | None, recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "t"

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(recorded, root)

    def check() -> None:
        assert torch.equal(last_of(root), last_of(recorded))
        artifact = trajectory_version(root, "trajectory-a", final=True)
        assert len(artifact.manifest.entries) == len(Trajectory.open(root).manifest.entries) + 2

    faults(root, prepare, lambda: trajectory_version(root, "trajectory-a", final=True), check, sample)


@pytest.mark.slow
def test_while_a_run_is_synced(server: Server, recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "t"
    tie = Tie("dev", "project", "", "a run", offline=False, directory=str(tmp_path / "gone"))
    made: list[str] = []

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(recorded, root)
        made.append(f"run{len(made)}")
        write_tie(root, replace(tie, id=made[-1]))

    def act() -> None:
        sync(root, progress=False)

    def check() -> None:
        assert os.waitstatus_to_exitcode(os.waitpid(in_child(act), 0)[1]) == 0
        steps = [row["train/step"] for row in server.history(f"dev/project/{made[-1]}")]
        assert sorted(steps) == list(range(STEPS))
        assert len(Trajectory.open(f"wandb:dev/project/trajectory-{made[-1]}:final")) == STEPS

    faults(root, prepare, act, check, None)
