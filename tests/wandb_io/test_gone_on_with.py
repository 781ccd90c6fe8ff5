"""W&B runs that are gone on with, and W&B that is switched off: no row lacks without a word."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from jobs import child_environment, make_job
from servers import Server

from explaind_track import open_run
from explaind_track.errors import LoggingWarning, TrajectoryError
from explaind_track.record.history import read_rows
from explaind_track.wandb_io import rows_at_wandb
from explaind_track.wandb_io.sync import sync

pytestmark = pytest.mark.usefixtures("closing_wandb")

KILLED_IN_AN_OUTAGE = """
import sys, time
from pathlib import Path
from jobs import make_job
from explaind_track import open_run
out = Path(sys.argv[1])
job, run = make_job(), open_run("project", out, id="again", resume="allow", mode=sys.argv[2])
tracker = job.tracker(run=run, trajectory=out / "t", keyframe_every=5, samples_every=10)
job.run(tracker, 4)
time.sleep(0.5)
(out / "four").touch()
while not (out / "go").exists():
    time.sleep(0.01)
job.run(tracker, 14)
(out / "dead").touch()
time.sleep(60)
"""


def killed_in_an_outage(out: Path, server: Server, mode: str) -> None:
    """Four steps are taken, W&B is down from then on, 14 more are taken, 15 are recorded, and the process is killed."""
    command = [sys.executable, "-c", KILLED_IN_AN_OUTAGE, str(out), mode]
    with subprocess.Popen(command, env=child_environment()) as child:
        _wait_for(out / "four")
        server.faults(down=True)
        (out / "go").touch()
        _wait_for(out / "dead")
        os.kill(child.pid, signal.SIGKILL)
    server.faults(down=False)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.filterwarnings("ignore::explaind_track.errors.ResumeWarning")
def test_a_run_that_was_killed_in_an_outage_gets_its_rows_when_it_goes_on(server: Server, tmp_path: Path) -> None:
    killed_in_an_outage(tmp_path, server, "online")
    assert len(server.history("dev/project/again")) < 18

    job, run = make_job(), open_run("project", tmp_path, id="again", resume="must")
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=5, samples_every=10, resume=True)
    assert tracker.number == 15
    job.run(tracker, 5)
    tracker.finish()
    run.finish()
    found = server.history("dev/project/again")
    assert sorted(row["train/step"] for row in found) == list(range(20))
    assert sorted(row["train/step"] for row in found if "samples/most_influential" in row) == [0, 10]
    kept = {row["train/step"]: row["residual/query"] for row in read_rows(tmp_path / "t")}
    assert {row["train/step"]: row["residual/query"] for row in found} == kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::explaind_track.errors.ResumeWarning")
def test_where_wandb_does_not_say_what_it_has_the_command_that_completes_it_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_an_outage(tmp_path, server, "online")

    def refuse(_: str) -> None:
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(rows_at_wandb, "find_run", refuse)
        job, run = make_job(), open_run("project", tmp_path, id="again", resume="must")
        with (
            pytest.warns(LoggingWarning, match="could not ask W&B which rows it has"),
            pytest.warns(LoggingWarning, match=r"15 rows .*explaind-track sync"),
        ):
            tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=5, resume=True)
            job.run(tracker, 1)
            tracker.finish()
        run.finish()
    sync(tmp_path / "t", progress=False)
    assert sorted(row["train/step"] for row in server.history("dev/project/again")) == list(range(16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::explaind_track.errors.ResumeWarning")
def test_an_offline_run_that_goes_on_says_where_its_earlier_rows_are(server: Server, tmp_path: Path) -> None:
    killed_in_an_outage(tmp_path, server, "offline")
    job, run = make_job(), open_run("project", tmp_path, id="again", resume="allow", mode="offline")
    with pytest.warns(LoggingWarning, match=r"no rows of the steps before 15.*explaind-track sync"):
        tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=5, resume=True)
    job.run(tracker, 1)
    tracker.finish()
    run.finish()
    wandb.teardown()
    sync(tmp_path / "t", progress=False)
    assert sorted(row["train/step"] for row in server.history("dev/project/again")) == list(range(16))


def test_a_disabled_run_is_not_waited_for_and_creates_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    job, run = make_job(), open_run("project", tmp_path)
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = job.tracker(run=run, trajectory=tmp_path / "t")
        job.run(tracker, 3)
        tracker.finish()
        run.finish()
    assert time.monotonic() - started < 30
    assert [row["train/step"] for row in read_rows(tmp_path / "t")] == [0, 1, 2]

    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(TrajectoryError, match="belongs to no W&B run"):
        sync(tmp_path / "t")
    assert server.ask("state")["runs"] == {}


NUMBERS: dict[str, Any] = {
    "float32": np.float32(0.5),
    "float64": np.float64(0.5),
    "float16": np.float16(0.5),
    "int8": np.int8(3),
    "bool": np.bool_(True),
    "array": np.array(0.5),
    "array of one": np.array([0.5]),
    "tensor": torch.tensor(0.5),
    "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
    "tensor of one": torch.tensor([[0.5]]),
    "whole": torch.tensor(3),
    "graph": torch.tensor(0.5, requires_grad=True) * 2,
    "large": 10**30,
    "word": "done",
}


def test_every_scalar_is_in_the_record_and_nothing_is_dropped(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    tracker.log({f"own/{name}": value for name, value in NUMBERS.items()})
    job.run(tracker, 1)
    refused: dict[str, Any] = {"none": None, "two": np.zeros(2), "complex": 1j, "list": [1.0], "picture": object()}
    for name, value in refused.items():
        with pytest.raises(TypeError, match=f"own/{name}.*run.log"):
            tracker.log({f"own/{name}": value})
    with pytest.raises(ValueError, match="train/step"):
        tracker.log({"train/step": 3})
    tracker.finish()

    (row,) = read_rows(tmp_path / "t")
    found = {name: row[f"own/{name}"] for name in NUMBERS}
    words = {name: value for name, value in NUMBERS.items() if isinstance(value, str)}
    values = {name: torch.as_tensor(value).item() for name, value in NUMBERS.items() if name not in {*words, "large"}}
    assert found == {**values, **words, "large": 1e30}
