"""Panels and artifacts against the real W&B SDK: online with a server on this machine, offline, and when it fails."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from conftest import make_job

from explaind_track import Trajectory, how_to_look, open_run
from explaind_track.panels import LoggingWarning, Panels


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a W&B server of our own on loopback, which the SDK is pointed at."""
    state = tmp_path / "server"
    script = Path(__file__).with_name("wandb_standin.py")
    process = subprocess.Popen([sys.executable, str(script), "--dir", str(state)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (state / "port").is_file():
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.05)
    address = f"http://127.0.0.1:{(state / 'port').read_text().strip()}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield address
    wandb.teardown()
    process.terminate()
    process.wait()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def history(server: str, run: Any) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server}/_ctl/history/{run.entity}/{run.project}/{run.id}") as answer:
        content = answer.read().decode()
    rows = json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]
    return [json.loads(row) if isinstance(row, str) else row for row in rows]


def test_every_row_arrives_online_once_and_in_order(server: str, tmp_path: Path) -> None:
    job = make_job()
    run = open_run("project", tmp_path)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", samples_every=4)
    job.run(tracker, 12, per_sample=True)
    tracker.finish()
    run.finish()
    rows = history(server, run)
    own = [json.loads(line) for line in (tmp_path / "t" / "history.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows] == list(range(12))
    for arrived, kept in zip(rows, own, strict=True):
        assert {name: arrived[name] for name in kept} == kept
    assert ["samples/most_influential" in row for row in rows] == [number % 4 == 0 for number in range(12)]


def test_the_trajectory_comes_back_from_its_artifact(server: str, tmp_path: Path) -> None:
    job = make_job()
    run = open_run("project", tmp_path)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=4)
    job.run(tracker, 6)
    tracker.finish()
    run.finish()
    assert tracker.staging_mb == 0
    artifact = wandb.Api().artifact(f"{run.entity}/project/trajectory-{run.id}:latest")
    fetched = Path(artifact.download(str(tmp_path / "fetched")))
    for path in (tmp_path / "t").rglob("*.*"):
        assert (fetched / path.relative_to(tmp_path / "t")).read_bytes() == path.read_bytes()
    steps = zip(Trajectory.open(fetched).steps(), Trajectory.open(tmp_path / "t").steps(), strict=True)
    assert all(torch.equal(a.after.parameters["0.weight"], b.after.parameters["0.weight"]) for a, b in steps)


def test_nobody_logged_in_means_offline_and_how_to_go_on(tmp_path: Path) -> None:
    job = make_job()
    run = open_run("project", tmp_path)
    assert open_run("another") is run
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    job.run(tracker, 3)
    tracker.finish()
    assert Path(run.settings.sync_dir).is_relative_to(tmp_path)
    assert tracker.staging_mb > 0
    assert f"wandb leet {run.settings.sync_dir}" in how_to_look(run)
    assert f"wandb sync {run.settings.sync_dir}" in how_to_look(run)


class Broken:
    """A run that fails at everything."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("no W&B today")


def test_a_failing_wandb_is_told_of_and_stops_nothing(tmp_path: Path) -> None:
    job, alone = make_job(), make_job()
    alone.run(alone.tracker(), 5)
    with pytest.warns(LoggingWarning, match="no W&B today") as told:
        tracker = job.tracker(run=Broken(), trajectory=tmp_path / "t")
        job.run(tracker, 5)
        tracker.finish()
    assert len(told) == 3  # the axis, the rows, the artifact: each once
    assert len((tmp_path / "t" / "history.jsonl").read_text().splitlines()) == 5
    assert len(Trajectory.open(tmp_path / "t")) == 5
    assert all(torch.equal(a, b) for a, b in zip(job.model.parameters(), alone.model.parameters(), strict=True))


def test_numbers_that_are_none_are_left_out_and_counted(tmp_path: Path) -> None:
    Panels(None, tmp_path / "h", []).log({"train/step": 1, "a": float("nan"), "b": float("inf"), "c": 2.0})
    assert json.loads((tmp_path / "h").read_text()) == {"train/step": 1, "c": 2.0, "residual/nonfinite": 2}


def test_a_server_that_does_not_answer_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with pytest.warns(LoggingWarning, match="does not answer"):
        run = open_run("project", tmp_path, settings=wandb.Settings(init_timeout=2))
    assert run.settings._offline
