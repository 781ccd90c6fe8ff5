"""The ground that the commands share: their arguments, what they print, how they fail, and the run they are about."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import click

from explaind_track.core.tables import inert
from explaind_track.errors import CheckpointError, TrajectoryError
from explaind_track.record.history import HISTORY
from explaind_track.record.manifest import MANIFEST, Manifest
from explaind_track.record.remote import PREFIX
from explaind_track.record.run_directory import POINTER, is_finished, is_running, trajectory_directory
from explaind_track.record.trajectory import Trajectory

RUN = click.argument("run", type=click.Path())
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what is wrong with a run or with W&B into a sentence and exit code 1; misuse has 2 (click's own)."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except ModuleNotFoundError as error:
            if "pip install" not in str(error):  # as `missing_package` says what to do
                raise
            raise click.ClickException(inert(str(error))) from None
        except (CheckpointError, TrajectoryError, ValueError, TypeError, OSError, _wandb_error()) as error:
            raise click.ClickException(inert(str(error))) from None

    return run


def _wandb_error() -> type[Exception]:
    """The base of W&B's errors. Importing it takes a second, and none can come from where nobody did."""
    return sys.modules["wandb"].errors.Error if "wandb" in sys.modules else TrajectoryError


def tell(as_json: bool, content: Any, words: str) -> None:
    """Prints a command's result: the content for programs, or the words for people."""
    click.echo(json.dumps(content, indent=1) if as_json else inert(words))


def local_run(run: str) -> Path:
    """The directory of a run on this disk. Raises TrajectoryError where there is none."""
    if run.startswith(PREFIX):
        raise TrajectoryError(f"this needs a run on this disk; `explaind-track pull {run} DIRECTORY` fetches it")
    directory = trajectory_directory(run)
    if not any((directory / name).is_file() for name in (MANIFEST, HISTORY)):
        raise TrajectoryError(
            f"{run} holds no run: there is no {MANIFEST} and no {HISTORY} in it or in {POINTER}/; `explaind-track runs "
            "DIRECTORY` lists those under a directory"
        )
    return directory


def open_trajectory(run: str) -> Trajectory:
    """The record of a run on this disk or at W&B."""
    return Trajectory.open(run if run.startswith(PREFIX) else local_run(run))


def state_of(directory: Path) -> str:
    """Says of a run that it is `running`, `finished`, or `stopped` before its record was ended."""
    if is_running(directory):
        return "running"
    steps = Manifest.read(directory, missing_ok=True).steps
    return "finished" if is_finished(directory, steps) else "stopped"


def latest_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of every key: not every row has all."""
    values: dict[str, Any] = {}
    for row in rows:
        values |= row
    return values
