"""Brings a W&B run up to what our own record holds: every row and every file, each once."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import Lock
from explaind_track.record.history import AXIS, numbers_in, read_rows
from explaind_track.record.layer_types import without_cells
from explaind_track.record.manifest import MANIFEST, Manifest
from explaind_track.record.media import from_json
from explaind_track.record.run_directory import Tie, read_tie, trajectory_directory
from explaind_track.wandb_io.artifacts import trajectory_version
from explaind_track.wandb_io.media import for_wandb
from explaind_track.wandb_io.media_sync import check_media, send_lost_media
from explaind_track.wandb_io.rows_at_wandb import find_run, missing_rows, steps_at_wandb
from explaind_track.wandb_io.run import FINISH_SECONDS, define_metric
from explaind_track.wandb_io.summary import RunSummary

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True)
class Synced:
    """What a sync has found and done."""

    run: str
    url: str
    rows: int
    """In our record, and now at W&B."""
    rows_sent: int
    """Of these, the ones that it lacked."""
    media_sent: int
    """Files of tables and pictures whose rows W&B had already."""
    artifact_sent: bool


def sync(given: str | PathLike[str], progress: bool = True) -> Synced:
    """Sends to the run's W&B run whatever our record holds and W&B does not.

    Rows are told apart by their training step. An offline run that W&B has not seen is first sent as it is, with its
    tables and console output; what a killed process left out of it is then added from our record.

    Raises TrajectoryError if there is no record, if it belongs to no W&B run or is still being written; and at the end,
    naming it, for what W&B does not confirm. Other errors of W&B come as they are.
    """
    directory = trajectory_directory(given)
    tie = read_tie(directory)
    if tie is None:
        raise TrajectoryError(f"{directory} belongs to no W&B run: it was recorded by a Tracker without run=")
    lock = Lock(directory)
    try:
        return _sync(directory, tie, progress)
    finally:
        lock.release()


def _sync(directory: Path, tie: Tie, progress: bool) -> Synced:
    import wandb

    entity = tie.entity or wandb.Api().default_entity
    path = f"{entity}/{tie.project}/{tie.id}"
    had_run = has_run = find_run(path) is not None
    if not has_run and tie.offline and Path(tie.directory).is_dir():
        _send_offline_run(Path(tie.directory), tie, entity)
        has_run = find_run(path) is not None

    # what W&B lacks goes through the SDK, as if the run went on
    new: dict[str, Any] = {} if has_run else {"config": dict(tie.config), "name": tie.name}
    run = wandb.init(
        entity=entity,
        project=tie.project,
        id=tie.id,
        resume="allow",
        mode="online",
        dir=_work_directory(tie),
        settings=wandb.Settings(console="off", silent=not progress),
        reinit="create_new",
        **new,
    )
    try:
        rows = read_rows(directory)
        lacking = missing_rows(rows, steps_at_wandb(path, run.starting_step) if has_run else Counter())
        media_sent = send_lost_media(run, find_run(path), directory, tie) if has_run else 0
        for key in dict.fromkeys(key for row in lacking for key in without_cells(numbers_in(row)) if key != AXIS):
            define_metric(run, key)
        for row in tqdm(lacking, "rows", unit="row", disable=not progress or not lacking):
            run.log(for_wandb(from_json(row, directory, damaged="leave out")))
        summary = RunSummary()
        for row in rows:
            summary.add(row)
        run.summary.update(summary.numbers())
        artifact_sent = _send_trajectory(run, directory, f"{entity}/{tie.project}/{tie.artifact}")
        expected, url = run.starting_step + len(lacking), run.url or path
    finally:
        run.finish()

    # what counts is what W&B shows
    if lost := missing_rows(rows, steps_at_wandb(path, expected)):
        raise TrajectoryError(f"W&B has not taken {len(lost)} rows of {path}; run the same command again")
    check_media(find_run(path), directory)
    if had_run:
        return Synced(path, url, len(rows), len(lacking), media_sent, artifact_sent)
    # an offline run's own log has sent some of it
    return Synced(path, url, len(rows), len(rows), media_sent, artifact_sent=(directory / MANIFEST).is_file())


def _send_offline_run(directory: Path, tie: Tie, entity: str | None) -> None:
    """Sends the run's own log with `wandb sync`; a log torn by a killed process is sent as far as it goes."""
    where = ["-e", entity] if entity else []
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *where, "-p", tie.project, str(directory)]
    subprocess.run(command, check=False, capture_output=True, env={**os.environ, "WANDB_SILENT": "true"})


def _work_directory(tie: Tie) -> str | None:
    """The directory that W&B has put the run's own into, beside all others of that place; None where it is gone."""
    place = Path(tie.directory).parent
    return str(place.parent) if place.name == "wandb" and place.is_dir() else None


def _send_trajectory(run: "wandb.Run", directory: Path, name: str) -> bool:
    """Logs the trajectory unless W&B has it as it is here. Returns whether it had to."""
    import wandb

    if not (directory / MANIFEST).is_file():
        return False  # killed before its first checkpoint

    digest = Manifest.read(directory).digest
    with suppress(wandb.errors.Error, ValueError):
        if wandb.Api().artifact(f"{name}:final").metadata.get("digest") == digest:
            return False

    artifact = trajectory_version(directory, name.rsplit("/", 1)[1], final=True)
    run.log_artifact(artifact, aliases=["latest", f"step-{artifact.metadata['steps']}", "final"])
    artifact.wait(int(FINISH_SECONDS))
    return True
