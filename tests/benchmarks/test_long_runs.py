"""Long runs: memory, open files and the time of a step stay where they are, and the record is opened and gone on with
in seconds.

    STEPS=100000 pytest -m slow tests/benchmarks/test_long_runs.py -s
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pytest
import torch
from torch import nn

from explaind_track import Query, Tracker, Trajectory
from explaind_track.record.history import read_rows

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("STEPS", "20000"))


class Run:
    """A tiny model with two groups and one query, on random batches."""

    def __init__(self, directory: Path, resume: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.x, self.y = torch.randn(64, 4), torch.randint(0, 3, (64,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        queries = {"test": Query.outputs(self.x[:5], self.y[:5])}
        self.tracker = Tracker(self.model, self.optimizer, queries=queries, trajectory=directory, resume=resume)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            index = torch.randint(0, 64, (8,))
            with self.tracker.step():
                self.optimizer.zero_grad()
                self.tracker.batch((self.x[index], self.y[index]), index=index)
                nn.functional.cross_entropy(self.model(self.x[index]), self.y[index]).backward()
                self.optimizer.step()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def timed(what: str, action: Callable[[], Any]) -> Any:
    begun, begun_here = perf_counter(), process_time()
    found = action()
    print(f"{what}: {perf_counter() - begun:.2f} s, {process_time() - begun_here:.2f} s of them at work")
    return found


def test_a_long_run_is_flat(tmp_path: Path) -> None:
    run = Run(tmp_path / "t")
    print(f"\n{'steps':>9} {'MB resident':>12} {'open files':>11} {'ms a step':>10}")
    memory, files = [], []
    for _ in range(10):
        begun = process_time()
        run.train(STEPS // 10)
        memory.append(resident_mb())
        files.append(len(os.listdir("/proc/self/fd")))
        each = 1e3 * (process_time() - begun) / (STEPS // 10)
        print(f"{run.tracker.number:>9} {memory[-1]:>12.1f} {files[-1]:>11} {each:>10.3f}", flush=True)
    assert memory[-1] < memory[1] + 20  # MB, of the index of files and what the allocator keeps
    assert files[-1] == files[1]

    run.tracker.finish()
    trajectory = timed("opening", lambda: Trajectory.open(tmp_path / "t"))
    rows = timed("reading the rows", lambda: read_rows(tmp_path / "t"))
    assert len(rows) == len(trajectory) == STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = timed("going on", lambda: Run(tmp_path / "t", resume=True))
    assert again.tracker.number == STEPS
    again.train(10)
    again.tracker.finish()
