"""The outputs of a Tracker: rows to the panels, steps to the record on this disk, the record to W&B."""

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from explaind_track.core.observer import StepObserver
from explaind_track.errors import LoggingWarning, ResumeWarning
from explaind_track.record.history import AXIS, in_words, read_rows
from explaind_track.record.media import from_json
from explaind_track.record.packing import require_packing
from explaind_track.record.resume import resume as resume_run
from explaind_track.record.row_writers import RowWriter
from explaind_track.record.run_directory import mark_finished
from explaind_track.record.trajectory import Trajectory
from explaind_track.record.writer import TrajectoryWriter
from explaind_track.tracking.ddp import Ranks
from explaind_track.wandb_io.panels import Panels
from explaind_track.wandb_io.rows_at_wandb import steps_at_wandb
from explaind_track.wandb_io.run import is_disabled, is_offline, is_tied, tie
from explaind_track.wandb_io.upload import TrajectoryUpload

if TYPE_CHECKING:
    import wandb

    from explaind_track.tracking.sharded_record import ShardedWriter


def begin_record(
    directory: str | PathLike[str] | None,
    resume: bool | int,
    keyframe_every: int,
    model: nn.Module,
    observer: StepObserver,
    gradients: bool,
    compress: bool,
    ranks: Ranks,
) -> tuple[Trajectory | None, "TrajectoryWriter | ShardedWriter | None", int]:
    """The record that is gone on with, None if the run begins; what writes it, on rank zero or, of parameters in
    pieces, everywhere; and the number of the step that comes next.

    Raises ValueError for a `resume` without a directory, and one that cannot be; and whatever `resume`, `take_up` and
    the writers raise.
    """
    if compress:
        require_packing()
    if directory is None and resume is not False:
        raise ValueError("resume= goes on with a recorded run; say which with trajectory=")
    if resume is True and ranks.count > 1 and ranks.shards is None:
        raise ValueError(
            "resume=True puts back the random state of rank zero alone; load your own checkpoint in every process, and "
            "pass the number of its step: resume=1500"
        )
    if directory is None:
        return None, None, 0

    path = Path(directory)
    if ranks.shards is not None:
        from explaind_track.tracking.sharded_record import ShardedWriter, take_up  # which takes a second to import

        begun, number = (None, 0) if resume is False else take_up(path, resume, model, observer, ranks)
        return None, ShardedWriter(path, model, observer, ranks, keyframe_every, begun), number

    def on_zero() -> tuple[Trajectory | None, TrajectoryWriter]:
        record = None if resume is False else resume_run(path, model, observer, resume, gradients)
        entries = None if record is None else record.manifest.entries
        return record, TrajectoryWriter(
            path, model, observer, keyframe_every, entries, gradients=gradients, compress=compress
        )

    recorded, writer = ranks.at_zero(on_zero) or (None, None)
    return recorded, writer, ranks.gather(0 if recorded is None else len(recorded))[0]


class Outputs:
    """Takes the rows of a run and ends its record; a run may have neither panels nor record."""

    def __init__(
        self,
        run: "wandb.Run | None",
        writer: "TrajectoryWriter | ShardedWriter | None",
        is_first: bool,
        configuration: Mapping[str, Any],
        row_writers: Sequence[RowWriter],
        number: int,
    ) -> None:
        """is_first: whether this is rank zero, which writes the rows. configuration, row_writers: see `Panels`. number:
        of the step that the run begins with, or goes on with."""
        run = None if run is None or is_disabled(run) else run
        self.writer = writer
        self._process = os.getpid()
        directory = writer.directory if writer is not None and is_first else None
        self.seen = run is not None or directory is not None or bool(row_writers)
        """Whether anybody will see what goes out."""
        self._directory = directory

        self.panels = Panels(run, directory, configuration, row_writers)
        if run is not None and directory is not None and is_tied(directory, run):
            self._go_on(run, directory, number)
        sends = isinstance(writer, TrajectoryWriter)  # keyframes of parameters in pieces stay on this disk
        self._upload = None if run is None or directory is None else _begin_upload(run, directory, sends)
        self._unsent = 0
        self.call_off_exit = before_exit(self._leave) if self.seen else lambda: None
        """Calls off what is done where the process goes before the end of the run."""

    def _go_on(self, run: "wandb.Run", directory: Path, number: int) -> None:
        """Completes the rows of a W&B run that was tied to the record before, as an outage or a kill has left them."""
        rows = [row for row in read_rows(directory) if row[AXIS] < number]
        if not is_offline(run):
            path, expected = f"{run.entity}/{run.project}/{run.id}", run.starting_step
            shown = [from_json(row, directory, damaged="leave out") for row in rows]
            self.panels.go_on(shown, lambda: steps_at_wandb(path, expected))
            return
        self.panels.go_on([], tuple)
        if rows:
            warnings.warn(
                f"the offline run of W&B that begins here has no rows of the steps before {number}, which are in an "
                f"earlier one: send all with `explaind-track sync {directory}`, rather than with `wandb sync`",
                LoggingWarning,
                stacklevel=4,
            )

    @property
    def is_forked(self) -> bool:
        """Whether this is another process, forked from that of the Tracker, to which run and record belong."""
        return os.getpid() != self._process

    def refuse_fork(self) -> None:
        """Raises RuntimeError in a forked process."""
        if self.is_forked:
            raise RuntimeError(
                f"this process was forked from {self._process}, whose Tracker this is and who goes on with it: train "
                "there, or make a Tracker with another trajectory= here"
            )

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """One row of the panels; none in a forked process."""
        if not self.is_forked:
            self.panels.log({AXIS: step, **row})

    def tell_of_lost_rows(self, steps: Sequence[int]) -> None:
        """Warns of those steps of a run that is gone on with whose rows had not been written."""
        if steps:
            warnings.warn(
                f"the rows of the steps {in_words(steps)} were not written before the run ended: their influences are "
                "computed again, but not what the loop itself had logged, nor tables of samples",
                ResumeWarning,
                stacklevel=5,
            )

    def end_rows(self) -> None:
        """Waits until W&B has the rows, or gives up; `send` tells of it."""
        self._unsent = self.panels.close()

    def end_record(self, steps: int, astray: bool) -> None:
        """The record is complete, with so many steps. astray: a step that is not in the record may have changed the
        model behind the last of them, so that it is not what the record ends with."""
        if self.writer is None:
            return
        if astray:
            self.writer.leave()
            self.writer.release()
        else:
            self.writer.close(steps)
        if self._directory is not None:
            mark_finished(self._directory, steps)

    def send(self) -> float:
        """Waits until W&B has the record. Warns, with the command that completes them, of rows and files that it does
        not take. Returns the MB that W&B's copies of the record take on this disk."""
        staging_mb = 0.0 if self._upload is None else self._upload.finish()
        if self._unsent and self.writer is not None:
            warnings.warn(
                f"W&B did not take {self._unsent} rows of the panels; they are all in our record: send them "
                f"with `explaind-track sync {self.writer.directory}`",
                LoggingWarning,
                stacklevel=3,
            )
        return staging_mb

    def _leave(self) -> None:
        """Saves what can be saved as the process goes."""
        if self.is_forked:
            return
        if self.writer is not None:
            self.writer.leave()
        self.panels.close()


def before_exit(action: Callable[[], None]) -> Callable[[], None]:
    """Runs `action` as the process ends, after an exception, on Ctrl-C and on SIGTERM too; returns how to call it off.

    SIGTERM, which would end the process at once, is turned into an ordinary exit if nobody else handles it.
    """
    atexit.register(action)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return lambda: atexit.unregister(action)


def _begin_upload(run: "wandb.Run", directory: Path, sends: bool) -> TrajectoryUpload | None:
    """Ties the record to the run; the upload of its files, if it `sends` them."""
    try:
        tie(directory, run)
        return TrajectoryUpload(run, directory) if sends else None
    except Exception as error:
        warnings.warn(
            f"W&B does not tell of its run ({error!r}); the trajectory stays in {directory} alone",
            LoggingWarning,
            stacklevel=4,
        )
        return None
