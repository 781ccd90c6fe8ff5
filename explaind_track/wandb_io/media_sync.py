"""The tables and pictures that rows at W&B show: which of their files W&B lacks, and how it gets them.

A row can be at W&B before what it shows: beside the rows, W&B's SDK sends a file for each, and for a table also an
artifact that holds its pictures. Where the process is killed on the way, the row leads nowhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256
from explaind_track.record.history import AXIS, read_rows
from explaind_track.record.media import from_json
from explaind_track.record.run_directory import Tie
from explaind_track.wandb_io.media import for_wandb
from explaind_track.wandb_io.run import FINISH_SECONDS

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True)
class Shown:
    """What a row at W&B shows."""

    step: int
    key: str
    kept: Any
    """As our record has it."""
    reference: Mapping[str, Any]
    """As W&B's row has it."""


def send_lost_media(run: "wandb.Run", there: Any, directory: Path, tie: Tie) -> int:
    """Sends what rows at W&B show and W&B lacks, under the names that they have for it; returns how much that was.

    run: open, of the same id as `there`, the run as W&B's API has it. Files are taken from where W&B's SDK has put them
    on this disk; what is not there any more stays missing, and `check_media` names it.
    """
    shown = list(_shown(there, directory))
    sent = 0
    for one in _without_file(there, shown):
        if (root := _files_of(tie, one.reference)) is not None:
            there.upload_file(str(root / one.reference["path"]), root=str(root))
            sent += 1
    logged = [run.log_artifact(artifact) for artifact in _without_artifact(there, shown, directory)]
    for artifact in logged:
        artifact.wait(int(FINISH_SECONDS))
    return sent + len(logged)


def check_media(there: Any, directory: Path) -> None:
    """Raises TrajectoryError, naming them, where W&B lacks tables and pictures of our record, or files of them."""
    shown = list(_shown(there, directory))
    present = {(one.step, one.key) for one in shown}
    lost = [f"{key} of step {step}" for step, key in _kept(directory) if (step, key) not in present]
    lost += [one.reference["path"] for one in _without_file(there, shown)]
    lost += [artifact.name for artifact in _without_artifact(there, shown, directory)]
    if lost:
        raise TrajectoryError(
            f"W&B lacks {len(lost)} tables, pictures or files of them that rows of {'/'.join(there.path)} show: "
            f"{', '.join(lost[:10])}{' and others' if len(lost) > 10 else ''}. Run the same command again, where the "
            f"run's W&B directory is; what is left of them is in {directory}"
        )


def _kept(directory: Path) -> dict[tuple[int, str], Any]:
    """The tables and pictures of our record, by step and key."""
    rows = read_rows(directory)
    return {(int(row[AXIS]), key): one for row in rows for key, one in row.items() if isinstance(one, dict)}


def _shown(there: Any, directory: Path) -> Iterator[Shown]:
    kept = _kept(directory)
    for key in sorted({key for _, key in kept}):
        for row in there.scan_history(keys=[AXIS, key]):
            if (step := int(row[AXIS]), key) in kept:
                yield Shown(step, key, kept[step, key], row[key])


def _without_file(there: Any, shown: list[Shown]) -> list[Shown]:
    sizes = {file.name: file.size for file in there.files()} if shown else {}
    return [one for one in shown if sizes.get(one.reference["path"]) != one.reference["size"]]


def _without_artifact(there: Any, shown: list[Shown], directory: Path) -> Iterator["wandb.Artifact"]:
    """The artifacts that tables at W&B lead to and that are not there, as the SDK had made them."""
    from wandb.sdk.artifacts._internal_artifact import InternalArtifact

    tables = [one for one in shown if "artifact_path" in one.reference]
    present = {artifact.digest for artifact in there.logged_artifacts()} if tables else set()
    for one in tables:
        row = from_json({one.key: one.kept}, directory, damaged="leave out")
        if one.key not in row:
            continue  # it cannot be told any more what was in it
        artifact = InternalArtifact(f"run-{there.id}-{one.key}", "run_table")
        artifact.add(for_wandb(row)[one.key], one.key)
        if artifact.digest not in present:
            artifact._client_id = one.reference["artifact_path"].split("/")[2]  # which the row names it by
            yield artifact


def _files_of(tie: Tie, reference: Mapping[str, Any]) -> Path | None:
    """Which directory of the run's files, of several if it was gone on with, holds the file."""
    for root in Path(tie.directory).parent.glob(f"*run-*-{tie.id}/files"):
        path = root / reference["path"]
        if path.is_file() and file_sha256(path) == reference["sha256"]:
            return root
    return None
