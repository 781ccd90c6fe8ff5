"""The terminal view of a run on this disk, which follows it while it trains."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.cli.common import latest_values, state_of
from explaind_track.core.summary import curve
from explaind_track.core.tables import inert
from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    HISTORY,
    KERNEL,
    OUTSIDE,
    REGULARIZATION,
    SECONDS,
    SECONDS_INFLUENCE,
    TOTAL,
    change_key,
    importance_key,
    is_explained,
    is_measure,
    is_residual,
    keys_by_group,
    numbers_in,
    row_in,
)
from explaind_track.record.run_directory import is_running
from explaind_track.record.validation import file_below

if TYPE_CHECKING:
    from rich.console import Console, Group

Rows = Sequence[Mapping[str, Any]]

RECENT = 200
"""The number of last rows that the curves and the speed are taken from."""

TAIL_BYTES = 2**22
"""The end of a long record that is read: more than its recent rows."""


class Follower:
    """The last rows of a record that may still grow, read piece by piece."""

    def __init__(self, directory: Path) -> None:
        self._path = file_below(directory, HISTORY)
        size = self._path.stat().st_size if self._path.is_file() else 0
        self._offset = max(0, size - TAIL_BYTES)
        self._in_mid_line = self._offset > 0
        self.rows: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def read(self) -> bool:
        """Takes in the rows that were written since; returns whether there are any."""
        if not self._path.is_file():
            return False
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()

        # the last line may still be written; the first one may have begun before the offset
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        if lines and self._in_mid_line:
            del lines[0]
            self._in_mid_line = False

        rows = (row_in(line, f"a line of {self._path}") for line in lines)
        self.rows.extend(row for row in rows if row is not None)
        return bool(lines)


def follow(directory: Path, console: "Console", seconds: float = 0.5) -> None:
    """Shows the run, and as long as a process writes it, what becomes of it."""
    from rich.live import Live

    follower = Follower(directory)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            running = is_running(directory)  # before the rows are read: what is written last is shown
            follower.read()
            live.update(view(directory, list(follower.rows), state_of(directory)), refresh=True)
            if not running:
                return
            time.sleep(seconds)


def view(directory: Path, rows: Rows, state: str) -> "Group":
    """The last step by group: importances, D and the change of the loss, with their curves; residual and speed."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [numbers_in(row) for row in rows]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("group", "kernel Ψ̄", "", "decay Ψ̄", "D", "", "change of loss"):
        table.add_column(name, justify="left" if name in ("group", "") else "right", no_wrap=True)

    explained = [row for row in rows if is_explained(row)]
    last = explained[-1] if explained else {}
    for group in keys_by_group(last, KERNEL) or keys_by_group(last, OUTSIDE):
        kernel = importance_key(KERNEL, group)
        decay, difference = importance_key(REGULARIZATION, group), importance_key(DIFFERENCE, group)
        keys = (change_key(section, group) for section in (KERNEL, REGULARIZATION, OUTSIDE))
        changes = [last[key] for key in keys if key in last]
        table.add_row(
            Text(inert(group)),  # a name is no markup
            _number(last.get(kernel)),
            _curve_of(explained, kernel),
            _number(last.get(decay)),
            _number(last.get(difference)),
            _curve_of(explained, difference),
            _number(sum(changes) if changes else None),
        )
    title = Text.assemble((inert(str(directory)), "bold"), f"  {state}")
    return Group(title, Text(inert(_headline(rows))), "", table)


def _headline(rows: Rows) -> str:
    """The number of the step, the speed, and the latest losses, accuracies and residuals."""
    if not rows:
        return "no step yet"

    parts = [f"step {rows[-1][AXIS]}"]
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith(SECONDS))
    explaining = sum(row.get(SECONDS_INFLUENCE, 0.0) for row in rows)
    if seconds > 0:
        parts.append(f"{len(rows) / seconds:.1f} steps/s, {100 * explaining / seconds:.0f}% of it explaining")
    outside = importance_key(OUTSIDE, TOTAL)
    for key, value in latest_values(rows).items():
        if is_residual(key) or is_measure(key) or key == outside:
            parts.append(f"{key} {_number(value)}")
    return "  ·  ".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _curve_of(rows: Rows, key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return curve(values) if values else ""
