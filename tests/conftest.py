"""What several tests share: a small training job, and one short run of the main recipe."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn

from explaind_track import Query, Tracker

torch.set_num_threads(1)

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@dataclass
class Job:
    """An MLP on three classes in float64, trained on mini-batches of a data set of 24 samples."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    schedule: Any
    seed: int = 0

    @property
    def queries(self) -> dict[str, Query]:
        return {
            "query": Query.outputs(self.x[:5], self.y[:5]),
            "loss": Query.loss(self.x[5:9], self.y[5:9]).mean(),
        }

    def tracker(self, **options: Any) -> Tracker:
        options = {"queries": self.queries, "sample_loss": sample_loss, **options}
        return Tracker(self.model, self.optimizer, **options)

    def run(self, tracker: Tracker, steps: int, per_sample: bool = False) -> None:
        """Trains on with ragged batches: of 8, 8 and 5 samples."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            size = 5 if tracker.number % 3 == 2 else 8
            index = torch.randperm(24, generator=generator)[:size]
            batch = (self.x[index], self.y[index])
            with tracker.step():
                self.optimizer.zero_grad()
                tracker.batch(batch, index=index)
                if per_sample:
                    tracker.backward()
                else:
                    sample_loss(self.model, batch).mean().backward()
                self.optimizer.step()
            self.schedule.step()


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "maximize": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, maximize=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
}


def make_job(optimizer: str = "adamw", dtype: torch.dtype = torch.float64) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(24, 4, dtype=dtype)
    y = torch.randint(0, 3, (24,))
    made = OPTIMIZERS[optimizer](model.parameters())
    return Job(model, made, x, y, torch.optim.lr_scheduler.StepLR(made, 2, 0.8))


def in_ranks(script: str, directory: Path, count: int) -> None:
    """Runs `script RANK DIRECTORY` in so many processes at once; what one of them raises is shown."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{TESTS}:{TESTS / 'explanation'}:{TESTS / 'engine'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error::UserWarning", script]
    with ExitStack() as stack:
        running = []
        for rank in range(count):
            errors = stack.enter_context((directory / f"{rank}.txt").open("w"))
            running.append(subprocess.Popen([*command, str(rank), str(directory)], stderr=errors, env=environment))
            stack.callback(running[-1].wait)
            stack.callback(running[-1].kill)
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break
            time.sleep(0.05)
        for rank, process in enumerate(running):
            assert process.poll() in (0, None), (directory / f"{rank}.txt").read_text()[-3000:]


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """W&B writes nothing outside of the test's own directory."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class Server:
    """A W&B server of our own on loopback, which the real SDK is pointed at."""

    def __init__(self, state: Path) -> None:
        self.state = state
        script = TESTS / "wandb_standin.py"
        self._process = subprocess.Popen([sys.executable, str(script), "--dir", str(state)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (state / "port").is_file():
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        self.address = f"http://127.0.0.1:{(state / 'port').read_text().strip()}"

    def ask(self, what: str, **content: Any) -> Any:
        request = urllib.request.Request(f"{self.address}/_ctl/{what}", json.dumps(content).encode() or None)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def faults(self, **faults: Any) -> None:
        """`down`, `fail_rate`, `fail_status`, `fail_graphql`, `fail_downloads`, `latency_ms`, …"""
        self.ask("faults", **faults)

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows of `entity/project/id`."""
        rows = self.ask(f"history/{run}")
        return [json.loads(row) if isinstance(row, str) else row for row in rows]

    def media_lacking(self, run: str) -> list[str]:
        """What the rows of `entity/project/id` show and is not there, to the byte: files, and the artifacts of
        tables."""
        lacking, files = [], self.state / "runs" / run.replace("/", "__") / "files"
        state = self.ask("state")
        known = {name for name, made in state["clients"].items() if state["artifacts"][made]["state"] == "COMMITTED"}
        for row in self.history(run):
            for shown in (value for value in row.values() if isinstance(value, dict) and "path" in value):
                path = files / shown["path"]
                if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shown["sha256"]:
                    lacking.append(shown["path"])
                client = shown.get("artifact_path", "").split("/")[2:3]
                lacking += [name for name in client if name not in known]
        return lacking

    def requests(self, kind: str) -> list[str]:
        """The requests of one kind ("PUT blob", "GQL UseArtifact") that were answered, without their time."""
        lines = (line.split(" ", 1)[1] for line in (self.state / "requests.log").read_text().splitlines())
        return [line for line in lines if line.startswith(kind)]

    def downloads(self) -> int:
        return int(self.ask("stats")["ops"].get("GET", 0))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(tmp_path / "server")
    monkeypatch.setenv("WANDB_BASE_URL", made.address)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield made
    made.faults(down=False, fail_rate=0, fail_graphql=0, fail_downloads=0, fail_uploads=0, latency_ms=0)
    close_wandb()
    made.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def close_wandb() -> None:
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


@pytest.fixture
def closing_wandb() -> Iterator[None]:
    yield
    close_wandb()


@dataclass(frozen=True)
class MainJob:
    """A finished run of `recipes.modulo_addition`, too short to learn anything."""

    out: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    """From its command line, as a user would start it."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "recipes.modulo_addition", "preset=smoke", f"out={out}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return MainJob(out, done.stdout, done.stderr)
