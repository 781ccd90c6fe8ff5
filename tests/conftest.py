"""Fixtures: a quiet W&B and a stand-in for its server, a small disk, and one short run of the main recipe."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, MainJob, child_environment
from servers import Server, close_wandb


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """W&B writes nothing outside of the test's own directory."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    close_wandb()  # whatever an earlier test has begun knows another address
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


@pytest.fixture
def closing_wandb() -> Iterator[None]:
    yield
    close_wandb()


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    """From its command line, as a user would start it."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "recipes.modulo_addition", "preset=smoke", f"out={out}"],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return MainJob(out, done.stdout, done.stderr)
