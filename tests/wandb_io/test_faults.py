"""What becomes of a run when W&B fails or the process dies: in the end nothing is missing, and nothing there twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import wandb
from jobs import child_environment, make_job
from servers import Server

from explaind_track import Trajectory, open_run
from explaind_track.errors import LoggingWarning, TrajectoryError
from explaind_track.record.history import read_rows
from explaind_track.record.media import from_json
from explaind_track.record.run_directory import is_running
from explaind_track.wandb_io.panels import Panels
from explaind_track.wandb_io.sync import sync

pytestmark = pytest.mark.usefixtures("closing_wandb")


def steps_at(server: Server, run: str) -> list[int]:
    return [row["train/step"] for row in server.history(run)]


def path_of(run: Any) -> str:
    return f"dev/project/{run.id}"


@pytest.mark.parametrize(("rows", "outages"), [(60, (0.5,)), pytest.param(1000, (5.0, 5.0), marks=pytest.mark.slow)])
def test_rows_arrive_once_and_in_order_through_failures_and_outages(
    rows: int, outages: tuple[float, ...], server: Server, tmp_path: Path
) -> None:
    retries = wandb.Settings(x_file_stream_retry_wait_min_seconds=0.2, x_file_transfer_retry_wait_min_seconds=0.2)
    job, run = make_job(), open_run("project", tmp_path, settings=retries)
    server.faults(fail_rate=0.3)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    longest = 0.0
    for number in range(rows):
        if any(number == (place + 1) * rows // 3 for place in range(len(outages))):
            seconds = outages[number * len(outages) // rows]
            server.faults(down=True)
            threading.Timer(seconds, lambda: server.faults(down=False)).start()
        started = time.monotonic()
        job.run(tracker, 1)
        longest = max(longest, time.monotonic() - started)
        time.sleep(15 * (len(outages) > 1) / rows)
    tracker.finish()
    run.finish()
    found = server.history(path_of(run))
    assert [row["train/step"] for row in found] == list(range(rows))
    for arrived, kept in zip(found, read_rows(tmp_path / "t"), strict=True):
        assert {name: arrived[name] for name in kept} == kept
    if max(outages) >= 5:  # a step that waited for its end would show
        assert longest < 4
    assert int(server.ask("stats")["faults"]["injected"]) > 0


def test_an_outage_at_the_end_is_repaired(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explaind_track.wandb_io.upload.FINISH_SECONDS", 1.0)
    job, run = make_job(), open_run("project", tmp_path, settings=wandb.Settings(finish_timeout=2))
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    job.run(tracker, 5)
    time.sleep(2)
    server.faults(down=True)
    job.run(tracker, 5)
    with pytest.warns(LoggingWarning, match="explaind-track sync"):
        tracker.finish()
    run.finish()
    wandb.teardown()

    server.faults(down=False)
    assert len(steps_at(server, path_of(run))) < 10

    done = sync(tmp_path / "t", progress=False)
    assert steps_at(server, path_of(run)) == list(range(10))
    assert (done.rows, done.artifact_sent) == (10, True)
    assert len(Trajectory.open(f"wandb:dev/project/trajectory-{run.id}:final")) == 10

    again = sync(tmp_path / "t", progress=False)
    assert (again.rows_sent, again.artifact_sent) == (0, False)
    assert steps_at(server, path_of(run)) == list(range(10))


def test_a_key_that_expires_on_the_way_is_repaired(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explaind_track.wandb_io.upload.FINISH_SECONDS", 1.0)
    job, run = make_job(), open_run("project", tmp_path, settings=wandb.Settings(finish_timeout=2))
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    job.run(tracker, 5)
    time.sleep(2)
    server.faults(fail_rate=1.0, fail_status=401)
    started = time.monotonic()
    job.run(tracker, 5)
    assert time.monotonic() - started < 5  # training has not waited
    with pytest.warns(LoggingWarning, match="explaind-track sync"):
        tracker.finish()
    run.finish()
    wandb.teardown()
    server.faults(fail_rate=0.0)
    sync(tmp_path / "t", progress=False)
    assert steps_at(server, path_of(run)) == list(range(10))


def test_a_server_that_is_down_at_the_start_gets_the_run_afterwards(server: Server, tmp_path: Path) -> None:
    server.faults(down=True)
    with pytest.warns(LoggingWarning, match="logging offline"):
        run = open_run("project", tmp_path, settings=wandb.Settings(init_timeout=2), config={"lr": 0.1})
    job = make_job()
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", samples_every=3)
    job.run(tracker, 7)
    tracker.finish()
    run.finish()
    wandb.teardown()

    server.faults(down=False)
    assert sync(tmp_path / "t", progress=False).rows == 7

    found = server.history(path_of(run))
    assert [row["train/step"] for row in found] == list(range(7))
    assert ["samples/most_influential" in row for row in found] == [number % 3 == 0 for number in range(7)]
    assert wandb.Api().run(path_of(run)).config["lr"] == 0.1


def test_rows_that_the_sdk_refused_are_told_of_and_sent_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = make_job(), open_run("project", tmp_path)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    log = run.log

    def failing(row: dict[str, Any]) -> None:
        if row["train/step"] in (2, 3):
            raise OSError("no space left on device")
        log(row)

    monkeypatch.setattr(run, "log", failing)
    with (
        pytest.warns(LoggingWarning, match="no space left"),
        pytest.warns(LoggingWarning, match=r"2 rows .*explaind-track sync"),
    ):
        job.run(tracker, 6)
        tracker.finish()
    run.finish()
    assert steps_at(server, path_of(run)) == [0, 1, 4, 5]
    assert sync(tmp_path / "t", progress=False).rows_sent == 2
    assert sorted(steps_at(server, path_of(run))) == list(range(6))


@pytest.mark.slow
def test_a_picture_that_is_lost_is_named_and_holds_up_nothing_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = make_job(), open_run("project", tmp_path)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", samples_every=2, map_queries=1)
    monkeypatch.setattr(run, "log", lambda row: (_ for _ in ()).throw(ConnectionError))
    with pytest.warns(LoggingWarning):
        job.run(tracker, 4)
        tracker.finish()
    run.finish()

    lost = tmp_path / "t" / read_rows(tmp_path / "t")[2]["samples/map"]["picture"]
    lost.write_bytes(b"another")
    for _ in range(2):
        with pytest.raises(TrajectoryError, match=r"lacks 1 .*samples/map of step 2"):
            sync(tmp_path / "t", progress=False)

    found = server.history(path_of(run))
    assert [row["train/step"] for row in found] == list(range(4))
    assert ["samples/map" in row for row in found] == [True, False, False, False]
    assert ["samples/most_influential" in row for row in found] == [True, False, True, False]
    assert server.media_lacking(path_of(run)) == []


STAGING_FULL = """
import os, sys
from contextlib import suppress
from pathlib import Path
import wandb
from jobs import make_job
from explaind_track import open_run
from explaind_track.wandb_io import upload
upload.FINISH_SECONDS = 2.0
staging, record, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
job, run = make_job(), open_run("project", staging, mode=mode, settings=wandb.Settings(finish_timeout=2))
tracker = job.tracker(run=run, trajectory=record, samples_every=10, map_queries=1, keyframe_every=20)
job.run(tracker, 30)
with (staging / "filler").open("wb", buffering=0) as file, suppress(OSError):
    while True:
        file.write(bytes(4096))
job.run(tracker, 60)
tracker.finish()
run.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_full_disk_of_wandb_stops_nothing_and_loses_nothing(
    mode: str, server: Server, small_disk: Path, tmp_path: Path
) -> None:
    """W&B's directory, its staging of artifacts and its cache are on a disk that fills up; our record is on another."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "TMPDIR", "HOME")
    places = [str(small_disk), str(tmp_path / "t")]
    command = [sys.executable, "-c", STAGING_FULL, *places, mode]
    environment = child_environment(**dict.fromkeys(names, str(small_disk)))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "training goes on" in done.stderr
    assert "explaind-track sync" in done.stderr

    kept = list(range(90))
    assert [row["train/step"] for row in read_rows(tmp_path / "t")] == kept

    (small_disk / "filler").unlink()
    made = sync(tmp_path / "t", progress=False)
    assert sorted(steps_at(server, made.run)) == kept
    assert server.media_lacking(made.run) == []
    assert sum("samples/map" in row for row in server.history(made.run)) == 9
    assert (
        len(Trajectory.open(f"wandb:{made.run.rsplit('/', 1)[0]}/trajectory-{made.run.rsplit('/', 1)[1]}:final")) == 90
    )


KILLED = """
import os, sys
import numpy as np
from pathlib import Path
from jobs import make_job
from explaind_track import open_run
out = Path(sys.argv[1])
modes = sys.argv[2:]
children = []
for number, mode in enumerate(modes):
    if os.fork() == 0:
        job = make_job()
        run = open_run("project", out / str(number), mode=mode)
        tracker = job.tracker(
            run=run, trajectory=out / str(number) / "t", keyframe_every=100, samples_every=50, map_queries=2,
            render=lambda index: np.full((2, 2), index * 10, dtype=np.uint8),
        )
        (out / f"{number}.pid").write_text(str(os.getpid()))
        job.run(tracker, 10**6)
for _ in modes:
    os.wait()
"""


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_is_repaired_without_gaps_or_doubles(count: int, server: Server, tmp_path: Path) -> None:
    """Processes are killed at random moments, most of them online, some offline; four at a time."""
    generator = random.Random(count)
    for first in range(0, count, 4):
        modes = ["offline" if number % 3 == 1 else "online" for number in range(first, min(first + 4, count))]
        out = tmp_path / f"from{first}"
        for number in range(len(modes)):
            (out / str(number)).mkdir(parents=True)
        command = [sys.executable, "-c", KILLED, str(out), *modes]
        driver = subprocess.Popen(command, env=child_environment())

        waiting = {number: generator.uniform(0, 1.5) for number in range(len(modes))}
        started: dict[int, float] = {}
        while waiting:
            for number, seconds in list(waiting.items()):
                pid = out / f"{number}.pid"
                if pid.is_file() and pid.read_text():
                    started.setdefault(number, time.monotonic())
                    if time.monotonic() - started[number] > seconds:
                        os.kill(int(pid.read_text()), signal.SIGKILL)
                        del waiting[number]
            time.sleep(0.01)
        driver.wait()

        for number in range(len(modes)):
            record = out / str(number) / "t"
            assert not is_running(record)
            kept = [row["train/step"] for row in read_rows(record)]
            assert kept == list(range(len(kept)))
            done = sync(record, progress=False)
            assert steps_at(server, done.run) == kept
            shown = [row["train/step"] for row in server.history(done.run) if "samples/map" in row]
            assert shown == [step for step in kept if step % 50 == 0]
            assert server.media_lacking(done.run) == []
            if (record / "manifest.json").is_file():
                name = f"wandb:dev/project/trajectory-{done.run.rsplit('/', 1)[1]}:final"
                assert len(Trajectory.open(name)) == len(Trajectory.open(record))


@pytest.mark.slow
def test_media_that_were_on_their_way_at_a_kill_arrive(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are at W&B, and lead to files that are not."""
    server.faults(fail_uploads=1.0)
    (tmp_path / "0").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path), "online"]
    driver = subprocess.Popen(command, env=child_environment())
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while not found and time.monotonic() < deadline:
        time.sleep(0.2)
        runs = server.ask("state")["runs"]
        found = [row for name in runs for row in server.history(name) if "samples/map" in row]
    os.kill(int((tmp_path / "0.pid").read_text()), signal.SIGKILL)
    driver.wait()
    server.faults(fail_uploads=0.0)
    (run,) = server.ask("state")["runs"]
    lacking = server.media_lacking(run)
    assert len(lacking) >= 4  # a table, its artifact and two pictures, at least
    record = tmp_path / "0" / "t"
    away = next((tmp_path / "0" / "wandb").rglob("samples/map_0_*.png"))
    away.rename(tmp_path / "away")
    with pytest.raises(TrajectoryError, match=r"lacks 1 .*samples/map_0_"):
        sync(record, progress=False)
    (tmp_path / "away").rename(away)
    assert sync(record, progress=False).media_sent == 1
    assert server.media_lacking(run) == []
    monkeypatch.chdir(tmp_path)  # where the SDK puts what it fetches
    table = next(one for one in wandb.Api().run(run).logged_artifacts() if one.type == "run_table")
    images = [row[-1] for row in table.get("samples/most_influential").data]
    assert all(isinstance(image, wandb.Image) for image in images)
    assert sync(record, progress=False).media_sent == 0


def test_what_cannot_be_synced_is_refused(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 2)
    assert is_running(tmp_path / "t")
    with pytest.raises(TrajectoryError, match="belongs to no W&B run"):
        sync(tmp_path / "t")
    tracker.finish()
    assert not is_running(tmp_path / "t")
    run = open_run("project", tmp_path, mode="offline")
    tracker = job.tracker(run=run, trajectory=tmp_path / "u")
    with pytest.raises(TrajectoryError, match="process is writing to"):
        sync(tmp_path / "u")
    tracker.finish()


def test_our_own_full_disk_tears_no_row(small_disk: Path) -> None:
    panels = Panels(None, small_disk)
    panels.log({"train/step": 0, "a": "x" * 4000})
    with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))

    with pytest.warns(LoggingWarning, match="could not write the history"):
        for step in range(1, 40):
            panels.log({"train/step": step, "a": "x" * 1000, "b": b"a picture"})

    (small_disk / "filler").unlink()
    panels.log({"train/step": 40, "b": b"a picture"})
    rows = read_rows(small_disk)
    assert [row["train/step"] for row in rows] == list(range(41))  # what had no room has waited
    assert len((small_disk / "history.jsonl").read_text().splitlines()) == 41
    assert from_json(rows[-1], small_disk)["b"].read_bytes() == b"a picture"

    next((small_disk / "media").iterdir()).write_bytes(b"another")
    with pytest.raises(TrajectoryError, match="was altered"):
        from_json(rows[-1], small_disk)


def test_a_row_that_was_torn_is_left_out(tmp_path: Path) -> None:
    panels = Panels(None, tmp_path)
    for step in range(3):
        panels.log({"train/step": step, "a": 1.5})
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text()[:-4])
    assert [row["train/step"] for row in read_rows(tmp_path)] == [0, 1]
