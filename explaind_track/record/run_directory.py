"""A run on this disk: its trajectory, its rows, the W&B run it belongs to, and whether it still goes on.

In its directory are

manifest.json, keyframes/, steps/   the trajectory
history.jsonl                       every row of the panels, flushed as it is logged (see `history`)
media/                              the pictures that rows show
run.json                            the W&B run that the rows and the trajectory go to
finished.json                       the step at which the run was ended

While a process trains, it holds the lock of the directory.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import Lock, write_atomic
from explaind_track.record.history import HISTORY
from explaind_track.record.manifest import MANIFEST
from explaind_track.record.validation import Count, checked, read_json

TIE = "run.json"
FINISHED = "finished.json"
POINTER = "trajectory"
"""A run's own directory, W&B's or a recipe's, has its trajectory under this name."""


Name = Annotated[str, Meta(max_length=256, pattern=r"^[^/\\#?%:\x00-\x1f]*\Z")]
"""Of an entity or a project at W&B."""
Identity = Annotated[str, Meta(max_length=128, pattern=r"^[^./\\#?%:;,'*\[\]\x00-\x1f][^/\\#?%:;,'*\[\]\x00-\x1f]*\Z")]
"""Of a run at W&B: it is also a part of files' names."""


@dataclass(frozen=True)
class Tie:
    """The W&B run of a trajectory."""

    entity: Name
    """Empty for an offline run of somebody who is not logged in: W&B's default when it is sent."""
    project: Name
    id: Identity
    name: str
    offline: bool
    directory: Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00]*\Z")]
    """Where W&B keeps the run on this disk."""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The run as W&B's API names it."""
        return "/".join(part for part in (self.entity, self.project, self.id) if part)

    @property
    def artifact(self) -> str:
        """The name of the trajectory's artifact."""
        return f"trajectory-{self.id}"


def write_tie(directory: Path, tie: Tie) -> None:
    """Notes which W&B run the trajectory belongs to."""
    write_atomic(directory / TIE, json.dumps(asdict(tie), indent=1).encode())


def read_tie(directory: Path) -> Tie | None:
    """The W&B run of the trajectory, if it has one. Raises TrajectoryError where that is not said as we say it."""
    path = directory / TIE
    if not path.is_file():
        return None
    try:
        tie: Tie = checked(read_json(path), Tie, path)
    except TrajectoryError as error:
        raise TrajectoryError(f"{error}. It does not say which W&B run this is; remove it to go on") from None
    return tie


def trajectory_directory(given: str | PathLike[str]) -> Path:
    """The trajectory of a directory: the directory itself, or `trajectory` in it (a recipe's results; a run of W&B)."""
    root = Path(given)
    inner = root / POINTER
    return inner if not _holds_run(root) and _holds_run(inner) else root


def _holds_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (MANIFEST, HISTORY))


def find_runs(root: Path) -> list[Path]:
    """The directories under `root` that hold a trajectory, each once; what an offline run of W&B has of a trajectory
    that is there itself is not another one."""
    # what vanishes meanwhile, or may not be looked into, is passed over
    found = {Path(folder).resolve() for folder, _, files in os.walk(root) if MANIFEST in files or HISTORY in files}
    copies = set()
    for path in found:
        with suppress(TrajectoryError):  # it is told of where it is described
            if (tie := read_tie(path)) is not None:
                copies.add(Path(tie.directory).resolve() / POINTER)
    return sorted(found - copies)


def mark_finished(directory: Path, steps: int) -> None:
    """Notes that the run has been ended, with so many steps."""
    write_atomic(directory / FINISHED, json.dumps({"steps": steps}).encode())


def is_finished(directory: Path, steps: int) -> bool:
    """Whether the run was ended, and not gone on with since: it still has the steps that it had then."""
    path = directory / FINISHED
    with suppress(TrajectoryError):  # a damaged file says nothing
        return path.is_file() and bool(checked(read_json(path), dict[str, Count], path).get("steps") == steps)
    return False


def is_running(directory: Path) -> bool:
    """Whether a process goes on writing the run."""
    try:
        Lock(directory).release()
    except TrajectoryError:
        return True
    return False
