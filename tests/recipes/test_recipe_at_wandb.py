"""The main recipe at W&B, from its command line: 1,000 steps through failures and outages, and offline first."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from jobs import ROOT, child_environment
from servers import Server

from explaind_track import Influence, Quadrature, Trajectory, explain
from explaind_track.record.history import read_rows
from explaind_track.record.run_directory import read_tie
from explaind_track.wandb_io.sync import sync
from recipes.modulo_addition import task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("closing_wandb")]

STEPS = 1000
ROWS = list(range(STEPS + 1))
"""What is measured behind the last step has a row of its own."""


def begin(out: Path, **environment: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "recipes.modulo_addition", "preset=smoke", f"steps={STEPS}", "samples_every=50"]
    return subprocess.Popen(
        [*command, f"out={out}"],
        cwd=ROOT,
        env=child_environment(**environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def check(server: Server, out: Path, fetched: Path) -> None:
    """Rows, media and artifact are there; and what the artifact gives is what was shown live."""
    tie = read_tie(out / "trajectory")
    assert tie is not None
    path = f"dev/{tie.project}/{tie.id}"
    rows = server.history(path)
    assert [row["train/step"] for row in rows] == ROWS
    for arrived, kept in zip(rows, read_rows(out / "trajectory"), strict=True):
        numbers = {name: value for name, value in kept.items() if not isinstance(value, dict)}
        assert {name: arrived[name] for name in numbers} == numbers
    assert sum("samples/most_influential" in row for row in rows) == STEPS // 50
    assert server.media_lacking(path) == []
    name = f"dev/{tie.project}/trajectory-{tie.id}:final"
    wandb.Api().artifact(name).download(str(fetched))
    files = [path.relative_to(fetched) for path in fetched.rglob("*") if path.is_file()]
    assert len(files) > STEPS // 5  # this preset has a checkpoint for every five steps
    assert all((fetched / file).read_bytes() == (out / "trajectory" / file).read_bytes() for file in files)
    live = Influence.load(out / "influence.safetensors")
    parts = tuple(live.data["part"].values.tolist())
    rule = Quadrature.fixed(1)
    job, trajectory = task(str(out)), Trajectory.open(f"wandb:{name}")
    found = explain(trajectory, job.model, job.query, groups=job.groups, parts=parts, quadrature=rule, progress=False)
    for quantity in ("influence", "importance"):
        one, other = found.data[quantity].values, live.data[quantity].values
        assert float(np.abs(one - other).max() / np.abs(other).max()) < 1e-6


def test_a_thousand_steps_arrive_through_failures_and_outages(server: Server, tmp_path: Path) -> None:
    """30% of the requests fail, and twice the server is away for 5 s."""
    server.faults(fail_rate=0.3)
    retry = {f"WANDB_X_FILE_{what}_RETRY_WAIT_MIN_SECONDS": "0.2" for what in ("STREAM", "TRANSFER")}

    process = begin(tmp_path / "out", **retry)
    for fraction in (3, 1.5):
        wait(process, lambda wanted=STEPS / fraction: recorded(tmp_path / "out") >= wanted)
        server.faults(down=True)
        time.sleep(5)
        server.faults(down=False)
    assert process.wait(300) == 0

    check(server, tmp_path / "out", tmp_path / "fetched")

    faults: dict[str, Any] = server.ask("stats")["faults"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    print(
        f"\n{faults['injected']} requests failed, {faults['refused']} were refused; {summary['seconds_total']} s in all"
    )
    assert faults["injected"] > 20
    assert faults["refused"] > 2
    assert sync(tmp_path / "out", progress=False).rows_sent == 0


def test_a_thousand_steps_offline_are_sent_afterwards(server: Server, tmp_path: Path) -> None:
    assert begin(tmp_path / "out", WANDB_MODE="offline").wait(300) == 0
    done = sync(tmp_path / "out", progress=False)
    assert (done.rows, done.rows_sent, done.media_sent) == (STEPS + 1, STEPS + 1, 0)
    check(server, tmp_path / "out", tmp_path / "fetched")


def recorded(out: Path) -> int:
    history = out / "trajectory" / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.is_file() else 0


def wait(process: "subprocess.Popen[bytes]", reached: Any) -> None:
    while not reached():
        assert process.poll() is None, "the recipe has ended"
        time.sleep(0.05)
