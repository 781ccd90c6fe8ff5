"""How long a Tracker watches: as a context, and where a notebook's cell is run again."""

import os
from pathlib import Path
from typing import Any

import pytest
from jobs import make_job

from explaind_track import Tracker, Trajectory
from explaind_track.errors import StaleTrackerWarning, TrajectoryError


def test_a_context_finishes_after_an_exception_too(tmp_path: Path) -> None:
    job = make_job()
    with job.tracker(trajectory=tmp_path / "a") as tracker:
        job.run(tracker, 2)
    assert (tmp_path / "a" / "finished.json").is_file()
    with pytest.raises(RuntimeError, match="this Tracker is finished"):
        job.run(tracker, 1)

    job = make_job()
    with pytest.raises(ZeroDivisionError) as raised, job.tracker(trajectory=tmp_path / "b") as tracker:
        job.run(tracker, 2)
        with tracker.step():
            _ = 1 / 0
    assert not hasattr(raised.value, "__notes__")
    assert len(Trajectory.open(tmp_path / "b")) == 2
    assert (tmp_path / "b" / "finished.json").is_file()

    with job.tracker(trajectory=tmp_path / "c") as tracker:
        tracker.finish()  # and not once more


def test_what_cannot_be_finished_does_not_hide_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Tracker) -> None:
        raise OSError("no room")

    job = make_job()
    tracker = job.tracker()
    monkeypatch.setattr(Tracker, "finish", broken)
    with pytest.raises(ZeroDivisionError) as raised, tracker:
        _ = 1 / 0
    assert raised.value.__notes__ == ["and the Tracker could not be finished: OSError('no room')"]
    with pytest.raises(OSError, match="no room"), tracker:
        pass


def test_a_tracker_made_again_takes_over(tmp_path: Path) -> None:
    job = make_job()
    stale = job.tracker(trajectory=tmp_path / "a")
    job.run(stale, 2)
    with pytest.warns(StaleTrackerWarning, match=r"recorded in .*a, 2 steps so far\), which is finished now"):
        tracker = job.tracker(trajectory=tmp_path / "b")
    job.run(tracker, 3)
    assert (stale.number, tracker.number) == (2, 3)
    assert (tmp_path / "a" / "finished.json").is_file()
    assert len(stale.recorded()) == 2

    with pytest.warns(StaleTrackerWarning):  # the same directory is gone on with
        again = job.tracker(trajectory=tmp_path / "b", resume=True)
    job.run(again, 1)
    assert again.number == 4
    again.finish()
    job.tracker()  # nothing to take over


def test_not_in_the_midst_of_a_step() -> None:
    job = make_job()
    tracker = job.tracker()
    with tracker.step(), pytest.raises(RuntimeError, match=r"in the midst of a step .*call its finish\(\)"):
        job.tracker()
    job.run(tracker, 1)
    assert tracker.number == 1


def test_a_fork_lets_the_first_process_be() -> None:
    job = make_job()
    tracker = job.tracker()
    job.run(tracker, 1)
    child = os.fork()
    if not child:
        code = 1
        try:
            with pytest.warns(StaleTrackerWarning):
                own = job.tracker()
            job.run(own, 2)
            code = own.number - 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    job.run(tracker, 1)
    assert tracker.number == 2


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_a_directory_of_this_process_is_told_so(options: dict[str, Any], tmp_path: Path) -> None:
    job, other = make_job(), make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    with pytest.raises(
        TrajectoryError, match=r"this process .* already: call finish\(\) on the Tracker of Seq\w+ with"
    ):
        other.tracker(trajectory=tmp_path / "t", **options)
    tracker.finish()
