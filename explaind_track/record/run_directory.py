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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import Lock, write_atomic
from explaind_track.record.history import HISTORY
from explaind_track.record.manifest import MANIFEST
from explaind_track.record.media import MEDIA

TIE = "run.json"
FINISHED = "finished.json"
POINTER = "trajectory"
"""A run's own directory, W&B's or a recipe's, has its trajectory under this name."""


@dataclass(frozen=True)
class Tie:
    """The W&B run of a trajectory."""

    entity: str
    """Empty for an offline run of somebody who is not logged in: W&B's default when it is sent."""
    project: str
    id: str
    name: str
    offline: bool
    directory: str
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
    """The W&B run of the trajectory, if it has one."""
    path = directory / TIE
    try:
        return Tie(**json.loads(path.read_bytes())) if path.is_file() else None
    except (ValueError, TypeError):
        raise TrajectoryError(f"{path} is damaged: it does not say which W&B run this is; remove it to go on") from None


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
    found = {path.parent.resolve() for name in (MANIFEST, HISTORY) for path in root.rglob(name)}
    ties = [tie for path in found if (tie := read_tie(path)) is not None]
    return sorted(found - {Path(tie.directory).resolve() / POINTER for tie in ties})


def pictures(directory: Path) -> list[str]:
    """The names of the files that rows of the panels show."""
    return sorted(f"{MEDIA}/{path.name}" for path in (directory / MEDIA).glob("*.png"))


def mark_finished(directory: Path, steps: int) -> None:
    """Notes that the run has been ended, with so many steps."""
    write_atomic(directory / FINISHED, json.dumps({"steps": steps}).encode())


def is_finished(directory: Path, steps: int) -> bool:
    """Whether the run was ended, and not gone on with since: it still has the steps that it had then."""
    path = directory / FINISHED
    with suppress(ValueError, KeyError, TypeError):  # a damaged file says nothing
        return path.is_file() and bool(json.loads(path.read_bytes())["steps"] == steps)
    return False


def is_running(directory: Path) -> bool:
    """Whether a process goes on writing the run."""
    try:
        Lock(directory).release()
    except TrajectoryError:
        return True
    return False
