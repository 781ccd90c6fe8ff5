"""The W&B run that a training goes to: opening it, finding it, and its tie to a record on this disk."""

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.core import distributed
from explaind_track.errors import LoggingWarning
from explaind_track.record import history
from explaind_track.record.run_directory import POINTER, Tie, read_tie, write_tie

if TYPE_CHECKING:
    import wandb  # a second to import: only where a run is opened or a table sent

FINISH_SECONDS = 600.0
"""How long the end of a run waits for what W&B has not confirmed yet."""


def open_run(project: str, directory: str | os.PathLike[str] | None = None, **options: Any) -> "wandb.Run":
    """The active W&B run if there is one, else a new one.

    A new run is online where somebody is logged in and the server answers, else offline. Of several processes, only
    rank zero has one; the others get a run that does nothing.

    Args:
        project: The project's name at W&B.
        directory: Where W&B keeps the run on this disk, under `wandb/`; None: where `wandb.init` would.
        options: As `wandb.init` takes them.

    Raises:
        wandb.errors.Error: Whatever `wandb.init` raises, but for a server that does not answer.

    Example:
        >>> from explaind_track import open_run
        >>> run = open_run("grokking", mode="disabled")
        >>> open_run("grokking") is run
        True
        >>> run.finish()
    """
    import wandb

    if wandb.run is not None:
        return wandb.run
    if distributed.rank():
        return wandb.init(mode="disabled")

    where = None if directory is None else str(directory)
    if "WANDB_MODE" not in os.environ and "mode" not in options and not wandb.login(prompt=False, verify=False):
        options["mode"] = "offline"
    options.setdefault("settings", wandb.Settings(finish_timeout=FINISH_SECONDS))
    try:
        return wandb.init(project=project, dir=where, **options)
    except wandb.errors.CommError as error:
        warnings.warn(f"W&B's server does not answer ({error}); logging offline", LoggingWarning, stacklevel=2)
        return wandb.init(project=project, dir=where, **{**options, "mode": "offline"})


def where_to_look(run: "wandb.Run") -> str:
    """Where the run can be seen, in a sentence to print.

    Args:
        run: Online, offline or disabled.

    Example:
        >>> from explaind_track import open_run, where_to_look
        >>> run = open_run("grokking", mode="disabled")
        >>> where_to_look(run)
        'W&B is disabled: the run is shown nowhere'
        >>> run.finish()
    """
    if run.disabled:
        return "W&B is disabled: the run is shown nowhere"
    if not is_offline(run):
        return f"See the run at {run.url}"
    directory = Path(run.settings.sync_dir)
    return f"Look at the run with `wandb leet {directory}`, upload it with `wandb sync {directory}`"


def is_disabled(run: "wandb.Run") -> bool:
    """Whether the run goes nowhere at all, neither to W&B nor to this disk."""
    with suppress(Exception):  # a run that is broken is told of where it is used
        return run.disabled is True
    return False


def is_offline(run: "wandb.Run") -> bool:
    """Whether the run stays on this disk until it is synced. W&B's settings tell so by no public name."""
    return bool(run.settings._offline)


def define_metric(run: "wandb.Run", key: str) -> None:
    """Draws a metric over the training step. By its own name, and not by that of its section, in which the training
    loop may log metrics that have no training step."""
    run.define_metric(key, step_metric=history.AXIS)


def tie(directory: Path, run: "wandb.Run") -> None:
    """Notes which W&B run the trajectory in `directory` belongs to, and lets the run's own directory lead to it."""
    own_directory = Path(run.settings.sync_dir).absolute()
    made = Tie(
        entity=run.entity or "",
        project=run.project,
        id=run.id,
        name=run.name or run.id,
        offline=is_offline(run),
        directory=str(own_directory),
        config=json.loads(json.dumps(dict(run.config), default=str)),
    )
    write_tie(directory, made)
    with suppress(OSError):  # a file system without links only loses the short way
        (own_directory / POINTER).symlink_to(directory.absolute(), target_is_directory=True)


def is_tied(directory: Path, run: "wandb.Run") -> bool:
    """Whether the trajectory in `directory` belongs to this same W&B run already, which is gone on with then."""
    found = read_tie(directory)
    return found is not None and found.id == run.id
