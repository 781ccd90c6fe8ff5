"""The panels: every row of a run goes to its W&B run and to a file of our own."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.errors import LoggingWarning
from explaind_track.record.history import AXIS, NONFINITE, append_row, in_words, numbers_in, read_rows
from explaind_track.record.layer_types import without_cells
from explaind_track.record.row_writers import RowWriter
from explaind_track.wandb_io.media import for_wandb
from explaind_track.wandb_io.run import FINISH_SECONDS, define_metric
from explaind_track.wandb_io.sender import Sender
from explaind_track.wandb_io.summary import RunSummary

if TYPE_CHECKING:
    import wandb

ALERT_SECONDS = 3600


class Panels:
    """Sends rows to a W&B run and to a file of our own. Whatever fails there is told of once and stops nothing."""

    def __init__(
        self,
        run: "wandb.Run | None",
        directory: Path | None,
        config: Mapping[str, Any] | None = None,
        writers: Sequence[RowWriter] = (),
    ) -> None:
        """directory: of the record, whose history gets every row.
        config:    what the run's configuration says of the tracking, as `explaind_track`.
        writers:   what else gets every row.
        """
        self._run, self._directory, self._writers = run, directory, writers
        self._goes_on = False
        self._at_wandb: Collection[int] = ()
        """The steps of which the W&B run has rows already: taken again after a resume, they only go to the history."""
        self._unwritten: list[dict[str, Any]] = []
        """The rows that wait to be written to the history: none, unless the disk is full."""
        self._warned: set[str] = set()
        self._defined: set[str] = set()
        self._summary = RunSummary()
        self._asked = self._taken = 0
        if run is not None:
            self._sender = Sender()
            self.attempt("define the panels' axis", lambda: run.define_metric(AXIS, hidden=True))
            if config is not None:
                about = {"explaind_track": dict(config)}
                self.attempt("tell W&B the configuration", lambda: run.config.update(about, allow_val_change=True))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends one row to all that take it, without numbers that are not finite, which `residual/nonfinite` counts."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        clean = {name: value for name, value in row.items() if name not in bad}
        if bad:
            clean[NONFINITE] = len(bad)
        if self._directory is not None:
            self._unwritten.append(clean)
            self.attempt("write the history", self._write)

        self._summary.add(clean)
        for writer in self._writers:
            self.attempt(f"write to {type(writer).__name__}", partial(writer.write, clean.get(AXIS, 0), clean))

        if clean.get(NONFINITE):
            named = f": {', '.join(bad[:10])}" if bad else " among the gradients"
            self.alert("Numbers that are not finite", f"step {row.get(AXIS)} has some{named}")

        self._put(clean)

    def _write(self) -> None:
        """Writes the rows that wait, the oldest first. From there on, a row's pictures are in files."""
        assert self._directory is not None  # else none waits
        while self._unwritten:
            row = self._unwritten[0]
            try:
                row.update(append_row(self._directory, row))
            except (TypeError, ValueError):  # of what no row can hold: that would hold up all that come after
                del self._unwritten[0]
                raise
            del self._unwritten[0]

    def _put(self, row: dict[str, Any]) -> None:
        """Lets W&B have a row, unless it has it already."""
        if self._run is not None:
            self._asked += 1
            self._sender.put(lambda: self._send(row))

    def go_on(self, rows: Sequence[Mapping[str, Any]], steps_there: Callable[[], Collection[int]]) -> None:
        """For a W&B run that is gone on with: sends those of the record's rows that it lacks.

        steps_there: asks W&B, which may take a while, of which steps it has rows.
        """

        def ask() -> None:
            self._at_wandb = steps_there()

        def begin() -> None:
            if not self.attempt("ask W&B which rows it has", ask):
                self._at_wandb = {row[AXIS] for row in rows}
                self._asked += len(self._at_wandb)  # of which nobody knows

        if self._run is not None:
            self._goes_on = True
            self._sender.put(begin)
            for row in rows:
                self._put(dict(row))

    def alert(self, title: str, text: str) -> None:
        """Sends an alert, at most one of a kind in `ALERT_SECONDS`."""
        if self._run is not None:
            run, every = self._run, ALERT_SECONDS
            self._sender.put(
                lambda: self.attempt("send an alert", lambda: run.alert(title, text, level="WARN", wait_duration=every))
            )

    def close(self) -> int:
        """Waits until W&B's SDK has all rows, at most `FINISH_SECONDS`; returns how many it has not taken.

        Warns of rows that could not be written to the history.
        """
        if self._unwritten and not self.attempt("write the history", self._write):
            lost = in_words(row[AXIS] for row in self._unwritten)
            warnings.warn(f"{self._directory} lacks the rows of the steps {lost}", LoggingWarning, stacklevel=4)
        if self._run is not None:
            self._sender.put(lambda: self.attempt("sum up at W&B", self._sum_up))
            self._sender.close(FINISH_SECONDS)
        return self._asked - self._taken

    def _send(self, row: Mapping[str, Any]) -> None:
        assert self._run is not None  # asked for only where there is one
        run = self._run
        if row.get(AXIS) in self._at_wandb:
            self._taken += 1
            return
        for key in without_cells(numbers_in(row)).keys() - self._defined - {AXIS}:
            self._defined.add(key)
            self.attempt("define the panels' axis", partial(define_metric, run, key))
        self._taken += self.attempt("log to W&B", lambda: run.log(for_wandb(row)))

    def _sum_up(self) -> None:
        """The run's numbers in its summary: of all its rows, those of a process before this one included."""
        assert self._run is not None  # asked for only where there is one
        summary = self._summary
        if self._directory is not None and self._goes_on:
            summary = RunSummary()
            for row in read_rows(self._directory):
                summary.add(row)
        self._run.summary.update(summary.numbers())

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Does something of which a failure is warned of, once for each `what`, instead of raised. Returns whether it
        went well."""
        try:
            action()
            return True
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(f"could not {what}: {error!r}; training goes on", LoggingWarning, stacklevel=4)
            return False
