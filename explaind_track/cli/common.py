"""What the commands share: their arguments, what they print, and how they fail."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from explaind_track.errors import TrajectoryError
from explaind_track.record import files
from explaind_track.record.files import MANIFEST
from explaind_track.record.history import HISTORY
from explaind_track.record.remote import PREFIX
from explaind_track.record.run_directory import POINTER, trajectory_directory
from explaind_track.record.writer import FORMAT

RUN = click.argument("run", type=str)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What is wrong with a run or with W&B becomes a sentence and exit code 1; misuse has 2 (click's own)."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except ModuleNotFoundError as error:
            if error.name in ("rich", "plotly", "wandb_workspaces"):
                extra = "workspace" if error.name == "wandb_workspaces" else "cli"
                raise click.ClickException(f"this needs {error.name}: pip install 'explaind_track[{extra}]'") from None
            raise
        except (TrajectoryError, ValueError, TypeError, OSError, _wandb_error()) as error:
            raise click.ClickException(str(error)) from None

    return run


def _wandb_error() -> type[Exception]:
    """W&B takes a second to import: its errors cannot come from where it was not."""
    return sys.modules["wandb"].errors.Error if "wandb" in sys.modules else TrajectoryError


def tell(as_json: bool, content: Any, words: str) -> None:
    click.echo(json.dumps(content, indent=1) if as_json else words)


def local_run(run: str) -> Path:
    if run.startswith(PREFIX):
        raise TrajectoryError(f"this needs a run on this disk; `explaind-track pull {run} DIRECTORY` fetches it")
    directory = trajectory_directory(run)
    if not any((directory / name).is_file() for name in (MANIFEST, HISTORY)):
        raise TrajectoryError(f"{run} holds no run: there is no {MANIFEST} and no {HISTORY} in it or in {POINTER}/")
    return directory


def entries_of(directory: Path) -> tuple[dict[str, Any], list[files.Entry]]:
    return files.read_manifest(directory, FORMAT) if (directory / MANIFEST).is_file() else ({}, [])
