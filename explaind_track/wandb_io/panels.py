"""The panels: every row of a run goes to its W&B run and to a file of our own."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.errors import LoggingWarning
from explaind_track.record.history import AXIS, NONFINITE, append_row
from explaind_track.wandb_io.media import for_wandb
from explaind_track.wandb_io.run import FINISH_SECONDS, define_metrics
from explaind_track.wandb_io.sender import Sender

if TYPE_CHECKING:
    import wandb

ALERT_SECONDS = 3600


class Panels:
    """Sends rows to a W&B run and to a file of our own. Whatever fails there is told of once and stops nothing."""

    def __init__(
        self,
        run: "wandb.Run | None",
        directory: Path | None,
        sections: Sequence[str],
        config: Mapping[str, Any] | None = None,
        logged: Collection[int] = (),
    ) -> None:
        """directory: of the record, whose history gets every row.
        sections:  the first parts of the keys that are drawn over our axis.
        config:    what the run's configuration says of the tracking, as `explaind_track`.
        logged:    steps that the W&B run has rows of already: taken again after a resume, they only go to the history.
        """
        self._run, self._directory, self._logged = run, directory, logged
        self._warned: set[str] = set()
        self._asked = self._taken = 0
        if run is not None:
            self._sender = Sender()
            self.attempt("define the panels' axis", lambda: define_metrics(run, sections))
            if config is not None:
                about = {"explaind_track": dict(config)}
                self.attempt("tell W&B the configuration", lambda: run.config.update(about, allow_val_change=True))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends one row. Numbers that are not finite are left out, and `residual/nonfinite` counts them."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        clean = {name: value for name, value in row.items() if name not in bad}
        if bad:
            clean[NONFINITE] = len(bad)
        if (directory := self._directory) is not None:
            # from here on, the row's pictures are in files
            self.attempt("write the history", lambda: clean.update(append_row(directory, clean)))

        if clean.get(NONFINITE):
            named = f": {', '.join(bad[:10])}" if bad else " among the gradients"
            self.alert("Numbers that are not finite", f"step {row.get(AXIS)} has some{named}")

        if self._run is not None and row.get(AXIS) not in self._logged:
            self._asked += 1
            self._sender.put(lambda: self._send(clean))

    def alert(self, title: str, text: str) -> None:
        """Sends an alert, at most one of a kind in `ALERT_SECONDS`."""
        if self._run is not None:
            run, every = self._run, ALERT_SECONDS
            self._sender.put(
                lambda: self.attempt("send an alert", lambda: run.alert(title, text, level="WARN", wait_duration=every))
            )

    def close(self) -> int:
        """Waits until W&B's SDK has all rows, at most `FINISH_SECONDS`; returns how many it has not taken."""
        if self._run is not None:
            self._sender.close(FINISH_SECONDS)
        return self._asked - self._taken

    def _send(self, row: Mapping[str, Any]) -> None:
        assert self._run is not None  # asked for only where there is one
        run = self._run
        self._taken += self.attempt("log to W&B", lambda: run.log(for_wandb(row)))

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
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
