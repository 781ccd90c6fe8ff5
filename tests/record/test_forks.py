"""Processes that are forked from the training process: they write nothing of its record, and do not hold it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import in_child, make_job
from torch.utils.data import DataLoader, TensorDataset

from explaind_track import Tracker, Trajectory
from explaind_track.record.files import Lock

LEAVING: dict[str, Callable[[], object]] = {
    "exit": lambda: sys.exit(3),
    "_exit": lambda: os._exit(3),
    "exception": lambda: 1 / 0,
}


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("leave", LEAVING)
def test_a_forked_process_writes_nothing(leave: str, inside: bool, tmp_path: Path) -> None:
    """It unwinds the training loop, in which it began, and runs what is registered for the exit."""

    def fork(tracker: Tracker) -> None:
        before = files_in(tmp_path)
        child = os.fork()
        if not child:
            try:
                LEAVING[leave]()
            finally:
                tracker.finish()
        os.waitpid(child, 0)
        assert files_in(tmp_path) == before

    def train() -> None:
        job = make_job()
        tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)
        job.run(tracker, 6)
        if inside:
            with tracker.step():
                fork(tracker)
        else:
            fork(tracker)
        job.run(tracker, 3)
        tracker.finish()

    assert os.waitpid(in_child(train), 0)[1] == 0
    assert len(list(Trajectory.open(tmp_path / "t").steps())) == 9


def test_a_forked_process_cannot_go_on_with_the_run(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 2)
    child = os.fork()
    if not child:
        refused = 0
        for action in (lambda: job.run(tracker, 1), tracker.recorded, job.optimizer.step):
            try:
                action()
            except RuntimeError as error:
                refused += "was forked from" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_workers_that_outlive_a_killed_run_do_not_hold_its_record(tmp_path: Path) -> None:
    told, tell = os.pipe()

    def train() -> None:
        job = make_job()
        tracker = job.tracker(trajectory=tmp_path / "t")
        job.run(tracker, 2)
        loader = DataLoader(TensorDataset(torch.zeros(9)), num_workers=1)
        workers = iter(loader)
        next(workers)
        os.write(tell, f"{workers._workers[0].pid}\n".encode())  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)

    child = in_child(train)
    worker = int(os.read(told, 20))
    os.kill(worker, signal.SIGSTOP)  # it cannot notice that its parent is gone
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        Lock(tmp_path / "t").release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_let_go_of_once(tmp_path: Path) -> None:
    """The number of its descriptor is another file's afterwards."""
    lock = Lock(tmp_path)
    lock.release()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    lock.release()
    os.fstat(descriptor)
    os.close(descriptor)
