"""How long a step waits when W&B fails: `pytest -m slow tests/benchmarks/test_waits.py -s`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from jobs import make_job
from servers import Server, close_wandb

from explaind_track import open_run
from explaind_track.wandb_io.sync import sync

STEPS = 90
"""A third of them before it fails, a third while it fails, a third after."""

FINISH_SECONDS = 3.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("closing_wandb"),
    pytest.mark.filterwarnings("ignore::explaind_track.errors.LoggingWarning"),
]


@dataclass
class Place:
    """Where things fail."""

    server: Server
    disk: Path
    run: Any


def by_server(**faults: Any) -> Callable[[Place], Any]:
    healthy = {"down": False, "fail_rate": 0, "fail_graphql": 0, "fail_status": 500, "latency_ms": 0}

    @contextmanager
    def failing(place: Place) -> Iterator[None]:
        place.server.faults(**faults)
        yield
        place.server.faults(**{name: healthy[name] for name in faults})

    return failing


@contextmanager
def full_disk(place: Place) -> Iterator[None]:
    with (place.disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    (place.disk / "filler").unlink()


@contextmanager
def raising(place: Place) -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no W&B today")

    log, place.run.log = place.run.log, fail
    yield
    place.run.log = log


@contextmanager
def nothing(place: Place) -> Iterator[None]:
    yield


FAULTS: dict[str, Callable[[Place], Any]] = {
    "nothing": nothing,
    "server down": by_server(down=True),
    "3 s for each request": by_server(latency_ms=3000),
    "HTTP 500": by_server(fail_rate=1.0, fail_graphql=1.0, fail_status=500),
    "HTTP 429": by_server(fail_rate=1.0, fail_graphql=1.0, fail_status=429),
    "HTTP 401, an expired key": by_server(fail_rate=1.0, fail_graphql=1.0, fail_status=401),
    "run.log raises": raising,
    "the SDK's disk is full": full_disk,
}


@pytest.mark.parametrize("until", ["middle", "end"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_longest_step(
    fault: str, until: str, server: Server, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explaind_track.wandb_io.upload.POLL_SECONDS", 0.05)
    monkeypatch.setattr("explaind_track.wandb_io.upload.BATCH_BYTES", 1)
    for module in ("upload", "panels"):
        monkeypatch.setattr(f"explaind_track.wandb_io.{module}.FINISH_SECONDS", FINISH_SECONDS)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(small_disk))
    job, run = make_job(), open_run("project", small_disk, settings=wandb.Settings(finish_timeout=FINISH_SECONDS))
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=10, samples_every=10)
    longest: list[float] = []

    def train() -> None:
        spent = []
        for _ in range(STEPS // 3):
            started = time.monotonic()
            job.run(tracker, 1)
            spent.append(time.monotonic() - started)
            time.sleep(0.03)
        longest.append(max(spent))

    train()
    with FAULTS[fault](Place(server, small_disk, run)):
        train()
        if until == "end":
            train()
            started = time.monotonic()
            tracker.finish()
            run.finish()
    if until == "middle":
        train()
        started = time.monotonic()
        tracker.finish()
        run.finish()
    finish = time.monotonic() - started
    close_wandb()
    at_once = len(server.history(f"dev/project/{run.id}"))
    done = sync(tmp_path / "t", progress=False)
    assert sorted(row["train/step"] for row in server.history(done.run)) == list(range(STEPS))
    assert server.media_lacking(done.run) == []
    words = ", ".join(f"{seconds:.2f}" for seconds in longest)
    print(f"\n{fault}, until the {until}: longest step before, during, after {words} s; the end took {finish:.1f} s; ")
    print(f"{at_once} of {STEPS} rows at W&B, and {STEPS} after sync", end="")
