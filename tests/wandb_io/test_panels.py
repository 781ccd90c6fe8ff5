"""Panels and artifacts against the real W&B SDK: online with a server on this machine, offline, and when it fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from jobs import child_environment, make_job
from servers import Server

from explaind_track import Quadrature, Trajectory, open_run, where_to_look
from explaind_track.errors import LoggingWarning, ResumeWarning
from explaind_track.record.history import read_rows
from explaind_track.tracking import sample_panels
from explaind_track.wandb_io.panels import Panels
from explaind_track.wandb_io.run import is_offline

pytestmark = pytest.mark.usefixtures("closing_wandb")


def test_every_row_arrives_online_once_and_in_order(server: Server, tmp_path: Path) -> None:
    job = make_job()
    run = open_run("project", tmp_path)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", samples_every=4)
    job.run(tracker, 12)
    tracker.finish()
    run.finish()
    rows = server.history(f"{run.entity}/{run.project}/{run.id}")
    own = [json.loads(line) for line in (tmp_path / "t" / "history.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows] == list(range(12))
    for arrived, kept in zip(rows, own, strict=True):
        assert {name: arrived[name] for name in kept if name != "samples/most_influential"} == {
            name: value for name, value in kept.items() if name != "samples/most_influential"
        }
    assert ["samples/most_influential" in row for row in rows] == [number % 4 == 0 for number in range(12)]


def test_nobody_logged_in_means_offline_and_how_to_go_on(tmp_path: Path) -> None:
    job = make_job()
    run = open_run("project", tmp_path)
    assert open_run("another") is run
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    job.run(tracker, 3)
    tracker.finish()
    assert Path(run.settings.sync_dir).is_relative_to(tmp_path)
    assert tracker.staging_mb == 0
    assert f"wandb leet {run.settings.sync_dir}" in where_to_look(run)
    assert f"wandb sync {run.settings.sync_dir}" in where_to_look(run)


class Broken:
    """A run that fails at everything."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("no W&B today")


def test_a_failing_wandb_is_told_of_and_stops_nothing(tmp_path: Path) -> None:
    job, alone = make_job(), make_job()
    alone.run(alone.tracker(), 5)
    with pytest.warns(LoggingWarning, match="no W&B today|5 rows") as told:
        tracker = job.tracker(run=Broken(), trajectory=tmp_path / "t")
        job.run(tracker, 5)
        tracker.finish()
    assert len(told) == 6  # axis, configuration, rows, summary, artifact, and how many rows are missing: each once
    assert len((tmp_path / "t" / "history.jsonl").read_text().splitlines()) == 5
    assert len(Trajectory.open(tmp_path / "t")) == 5
    assert all(torch.equal(a, b) for a, b in zip(job.model.parameters(), alone.model.parameters(), strict=True))


def test_numbers_that_are_none_are_left_out_and_counted(tmp_path: Path) -> None:
    Panels(None, tmp_path).log({"train/step": 1, "a": float("nan"), "b": float("inf"), "c": 2.0})
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"train/step": 1, "c": 2.0, "residual/nonfinite": 2}


def test_the_run_says_how_it_was_tracked_and_sums_up_its_metrics(server: Server, tmp_path: Path) -> None:
    job = make_job()
    run = open_run("project", tmp_path, config={"lr": 0.1})
    tracker = job.tracker(run=run, groups={"first": "0.*", "last": "2.*"}, trajectory=tmp_path / "t")
    job.run(tracker, 6)
    tracker.finish()
    run.finish()
    kept = wandb.Api().run(f"dev/project/{run.id}")
    about = kept.config["explaind_track"]
    assert about["groups"] == {"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}
    assert about["optimizer"]["class"] == "AdamW"
    assert kept.config["lr"] == 0.1
    values = [row["residual/query"] for row in server.history(f"dev/project/{run.id}")]
    assert kept.summary["residual/query_max"] == pytest.approx(max(values))
    assert kept.summary["residual/query_mean"] == pytest.approx(sum(values) / 6)


class Listening:
    """A run that only listens."""

    def __init__(self) -> None:
        self.alerts: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.config, self.summary = wandb.Config(), dict[str, float]()

    def alert(self, title: str, text: str, **_: Any) -> None:
        self.alerts.append(f"{title}: {text}")

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.mark.filterwarnings("ignore:W&B does not tell")
def test_large_residuals_and_numbers_that_are_none_raise_an_alert() -> None:
    job, run = make_job(), Listening()
    tracker = job.tracker(run=run, quadrature=Quadrature(tolerance=1e-13, max_nodes=1))
    job.run(tracker, 1)
    tracker.log({"own": float("nan")})
    job.run(tracker, 1)
    tracker.finish()
    assert "Large residual: step 0: the split of 'query' leaves" in run.alerts[0]
    assert any("not finite: step 1 has some: own" in alert for alert in run.alerts)
    calm = Listening()
    job = make_job()
    tracker = job.tracker(run=calm)
    job.run(tracker, 3)
    tracker.finish()
    assert calm.alerts == []


def test_samples_are_shown_with_images_and_a_map(server: Server, tmp_path: Path) -> None:
    job, run = make_job(), open_run("project", tmp_path)
    tracker = job.tracker(
        run=run, samples_every=2, map_queries=3, render=lambda index: np.full((2, 2), index * 10, dtype=np.uint8)
    )
    maps: list[tuple[torch.Tensor, torch.Tensor]] = []
    draw = sample_panels.sample_map
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_panels, "sample_map", lambda rows, index: maps.append((rows, index)) or draw(rows, index))
        job.run(tracker, 3)
    tracker.finish()
    run.finish()

    rows = server.history(f"{run.entity}/project/{run.id}")
    for name in ("samples/map", "samples/query_cosines"):
        assert [row.get(name, {}).get("_type") for row in rows] == ["image-file", None, "image-file"]
    columns = json.loads(next((tmp_path / "wandb").rglob("*.table.json")).read_text())["columns"]
    assert columns[-1] == "image"

    assert [tuple(values.shape) for values, _ in maps] == [(3, 8), (3, 5)]
    assert all(len(set(names)) == len(names) for _, names in maps)


def test_the_map_is_of_single_queries() -> None:
    """Over all queries, the map's rows add up to the table's column."""
    job, run = make_job(), Listening()
    found: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_panels, "sample_map", lambda rows, _: found.update(map=rows))
        patch.setattr(sample_panels, "sample_table", lambda samples, *_: found.update(table=samples.influence))
        job.run(job.tracker(run=run, samples_every=1, map_queries=99), 1)
    order = found["table"].abs().argsort(descending=True)
    assert torch.allclose(found["map"].mean(0), -found["table"][order], rtol=1e-9, atol=1e-15)


STOPPED = """
import os, sys, time
from jobs import make_job
from explaind_track import open_run
job, run = make_job(), open_run("project", sys.argv[1], id="again")
job.run(job.tracker(run=run, trajectory=sys.argv[1] + "/t", keyframe_every=4), 6)
while run.step < 6:
    time.sleep(0.01)
run.finish()
os._exit(9)
"""


def test_steps_that_are_taken_again_are_not_logged_twice(server: Server, tmp_path: Path) -> None:
    """A process is gone when W&B has the rows of six steps, and the record only those before its keyframe, four."""
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    assert subprocess.run(command, env=child_environment(), check=False).returncode == 9

    job = make_job()
    run = open_run("project", tmp_path, id="again", resume="must")
    with pytest.warns(ResumeWarning):
        tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=4, resume=True)
    assert tracker.number == 4
    job.run(tracker, 4)
    tracker.finish()
    run.finish()
    assert [row["train/step"] for row in server.history(f"{run.entity}/project/again")] == list(range(8))
    assert [row["train/step"] for row in read_rows(tmp_path / "t")] == list(range(8))


def test_a_server_that_does_not_answer_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with pytest.warns(LoggingWarning, match="does not answer"):
        run = open_run("project", tmp_path, settings=wandb.Settings(init_timeout=2))
    assert is_offline(run)
