"""The rows of a run, one a training step: their keys, and `history.jsonl`, which keeps every row.

    train/step                                 the number of the step
    [<query>/]<part>/<group>                   importance Ψ̄ of a part of the step (kernel, reg, past, …) through a group
    [<query>/]outside/<group>                  the same of what else changed the weights since the step before
    [<query>/]D/<group>                        relative regularization influence: signed kernel minus regularization
    <loss>/<part>/<group>, <loss>/change       how much each changed a query's loss; <loss>: `loss`, or the query's name
    <loss>/share/<part>                        what each part's size is of all, by their changes of the loss
    <query>/loss, <query>/accuracy             what the query's predictions are worth after the step
    residual/<query>                           what the split leaves over, relative to the change of the predictions
    residual/nodes, residual/nonfinite         quadrature nodes; numbers of the step that were not finite
    cost/seconds_training, …_influence         wall time of the step
    samples/…                                  tables and pictures of training samples
    maps/…                                     pictures by layer and type, and tables of tokens, of several steps

`total` stands in the place of a group for all groups together. The first query has no `<query>/` in front of its
importances, the first loss query is `loss`. Beside them stand the metrics that the training loop logs, `train/loss`
and whatever it likes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from explaind_track.record.files import write_atomic
from explaind_track.record.media import Table, refuse_other, to_json, with_files
from explaind_track.record.validation import Count, Finite, Integer, checked, file_below

HISTORY = "history.jsonl"

AXIS = "train/step"
"""The metric that all others are drawn over: the number of the training step."""

FIRST = re.compile(rb'\{"train/step": ([0-9]{1,15})\b')
"""How the line of a row begins."""

KERNEL = "kernel"
REGULARIZATION = "reg"
PAST = "past"
OUTSIDE = "outside"
MOMENTUM = "momentum"
SHARE = "share"
DIFFERENCE = "D"
LOSS = "loss"
RESIDUAL = "residual"
COST = "cost"
TRAIN = "train"

SECTIONS = (KERNEL, REGULARIZATION, PAST, OUTSIDE, DIFFERENCE, RESIDUAL, LOSS, COST, TRAIN)
"""The first parts of the keys of numbers; those of a query's own numbers begin with its name."""

TRACKERS_SECTIONS = frozenset((KERNEL, REGULARIZATION, PAST, OUTSIDE, DIFFERENCE, RESIDUAL, COST))
"""Those that hold nothing but numbers of a Tracker, each as it is over all steps."""

TOTAL = "total"
"""In the place of a group: all groups together."""

TRAIN_LOSS = f"{TRAIN}/loss"
NODES = f"{RESIDUAL}/nodes"
NONFINITE = f"{RESIDUAL}/nonfinite"
SECONDS = f"{COST}/seconds_"
SECONDS_TRAINING = f"{SECONDS}training"
SECONDS_INFLUENCE = f"{SECONDS}influence"
MAPS = "maps"
LAYER_TYPE_MAP = f"{MAPS}/layer_type"
DOMAIN_MAP = f"{MAPS}/domains"
MAP_STEPS = f"{MAPS}/steps"
"""Of how many explained steps maps and tables of tokens are, the last of which is the row's."""
TOKENS = f"{MAPS}/tokens"
"""In front of a query's name: the table of its tokens."""
SAMPLES = "samples/most_influential"
SAMPLE_MAP = "samples/map"
QUERY_COSINES = "samples/query_cosines"
SAMPLES_OWN_STEP = "samples/own_step"
"""How much the step's samples changed the first loss query through this step's gradient alone."""


def section_of_part(part: str) -> str:
    """The section that shows a part of a step; all but `regularization` keep their name."""
    return REGULARIZATION if part == "regularization" else part


def importance_key(section: str, group: str, query: str = "") -> str:
    """The key of a group's importance, or of its D. query: empty for the first."""
    return f"{query}/{section}/{group}" if query else f"{section}/{group}"


def change_key(section: str, group: str, loss: str = LOSS) -> str:
    """The key of a loss's change by a part through a group. loss: the query's name, for all but the first loss."""
    return f"{loss}/{section}/{group}"


def whole_change_key(loss: str = LOSS) -> str:
    """The key of a loss's change in the step, by all parts."""
    return f"{loss}/change"


def share_row(changes: Mapping[str, float], loss: str = LOSS) -> dict[str, float]:
    """The share of each part in all that a step did to a loss: its size over the sum of their sizes. changes: of the
    parts, which add up, by their section."""
    whole = sum(map(abs, changes.values()))
    return {f"{loss}/{SHARE}/{section}": abs(value) / whole for section, value in changes.items()} if whole else {}


def measure_key(query: str, measure: str) -> str:
    """The key of the `loss` or the `accuracy` of a query's predictions."""
    return f"{query}/{measure}"


def residual_key(query: str) -> str:
    return f"{RESIDUAL}/{query}"


def section_of(key: str) -> str | None:
    """The first part of a key; None for a key of one part, which is in no section."""
    section, slash, _ = key.partition("/")
    return section if slash else None


def is_residual(key: str) -> bool:
    """Whether the key is that of a query's residual; `residual/nodes` and `residual/nonfinite` are counts."""
    return section_of(key) == RESIDUAL and key not in (NODES, NONFINITE)


def is_measure(key: str) -> bool:
    """Whether the key is that of a loss or an accuracy, of a query or as the training loop logs them."""
    sections = key.split("/")[:-1]
    of_groups = {KERNEL, REGULARIZATION, PAST, OUTSIDE, DIFFERENCE, RESIDUAL}  # and a group may be called `loss`
    return key.endswith(("/loss", "/accuracy")) and of_groups.isdisjoint(sections)


def is_explained(row: Iterable[str]) -> bool:
    """Whether influences of the step were computed: not where its gradient was not finite, nor between every n-th."""
    return any(is_residual(key) for key in row)


def numbers_in(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a row, without words, tables and pictures."""
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def keys_by_group(keys: Iterable[str], section: str) -> dict[str, str]:
    """The keys of a section (`kernel`, `loss/reg`) by group, in their order; `TOTAL` is among the groups."""
    return {key.removeprefix(f"{section}/"): key for key in keys if key.startswith(f"{section}/")}


# ------------------------------------------------------------------------------------------------- history.jsonl


def append_row(directory: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a row whole or not at all, flushed: a killed process loses none but the last line, which may be torn.

    Returns the row as it was written, its pictures in files. Raises OSError or TrajectoryError where that fails.
    """
    written = {**row, **with_files(row, directory)}
    kept = {key: value for key, value in written.items() if isinstance(value, int | float | str | Table | Path)}
    line = json.dumps(kept, default=to_json).encode() + b"\n"
    path = file_below(directory, HISTORY)
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):
            line = b"\n" + line  # the row before was torn, and would tear this one
        if file.write(line) != len(line):
            file.truncate(end)  # half a row would spoil the next
            raise OSError(f"no room for a row in {path}")
    return written


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows in the order they were logged; a line that a killed process left torn is left out.

    Raises TrajectoryError for a line that is whole and yet no row, and for a link in the place of the file.
    """
    path = file_below(directory, HISTORY)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        rows = (row_in(line, f"line {number} of {path}") for number, line in enumerate(file, 1))
        return [row for row in rows if row is not None]


def row_in(line: bytes, name: str) -> dict[str, Any] | None:
    """The row that a line of the history holds; None for a torn line. Raises TrajectoryError, by its `name`, for a line
    that is JSON, but no row."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or AXIS not in row:
        return None  # a piece of one

    checked(row[AXIS], Count, f"{AXIS} in {name}")
    checked(row, dict[str, bool | Integer | Finite | str | dict[str, Any]], name)
    for key, value in row.items():
        if isinstance(value, dict):
            refuse_other(value, f"{key!r} in {name}")
    return row


def steps_logged(directory: Path) -> set[int]:
    """The numbers of the steps that have a row."""
    return {step for step in _steps_by_line(directory) if step is not None}


def in_words(steps: Iterable[int]) -> str:
    """Numbers of steps, for a message.

    Example:
        >>> from explaind_track.record.history import in_words
        >>> in_words([7, 3, 4, 5])
        '3 to 5, 7'
    """
    stretches: list[list[int]] = []
    for step in sorted(steps):
        if stretches and step == stretches[-1][-1] + 1:
            stretches[-1][1:] = [step]
        else:
            stretches.append([step])
    return ", ".join(" to ".join(map(str, stretch)) for stretch in stretches)


def cut_history(directory: Path, number: int) -> set[int]:
    """Drops the rows of step `number` and later, and torn lines. Returns the numbers of the steps that have a row."""
    found = _steps_by_line(directory)
    kept = {step for step in found if step is not None and step < number}
    if not kept.issuperset(found):
        path = directory / HISTORY
        with path.open("rb") as file:
            lines = file.readlines()
        write_atomic(path, b"".join(line for line, step in zip(lines, found, strict=True) if step in kept))
    return kept


def _steps_by_line(directory: Path) -> list[int | None]:
    """The number of each row's step, which is the first that a line says; None for a torn one. Reads no further."""
    path = file_below(directory, HISTORY)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        begun = ((FIRST.match(line), line.endswith(b"}\n")) for line in file)
        return [int(match[1]) if match and is_whole else None for match, is_whole in begun]
