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
from explaind_track.record.validation import file_below
from explaind_track.wandb_io.media import for_wandb
from explaind_track.wandb_io.run import FINISH_SECONDS

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True)
class Shown:
    """A table or a picture that a row at W&B shows."""

    step: int
    key: str
    kept: Any
    """As our record has it."""
    reference: Mapping[str, Any]
    """As W&B's row has it."""


def send_lost_media(run: "wandb.Run", api_run: Any, directory: Path, tie: Tie) -> int:
    """Sends what rows at W&B show and W&B lacks, under the names that they have for it; returns how much that was.

    run: open, of the same id as `api_run`, the run as W&B's API has it. Files are taken from where W&B's SDK has put
    them on this disk; what is not there any more stays missing, and `check_media` names it.
    """
    shown = list(_shown(api_run, directory))

    sent = 0
    for medium in _without_file(api_run, shown):
        if (root := _files_of(tie, medium.reference)) is not None:
            api_run.upload_file(str(root / medium.reference["path"]), root=str(root))
            sent += 1

    logged = [run.log_artifact(artifact) for artifact in _without_artifact(api_run, shown, directory)]
    for artifact in logged:
        artifact.wait(int(FINISH_SECONDS))
    return sent + len(logged)


def check_media(api_run: Any, directory: Path) -> None:
    """Raises TrajectoryError, naming them, where W&B lacks tables and pictures of our record, or files of them."""
    shown = list(_shown(api_run, directory))
    present = {(medium.step, medium.key) for medium in shown}
    lost = [f"{key} of step {step}" for step, key in _kept(directory) if (step, key) not in present]
    lost += [medium.reference["path"] for medium in _without_file(api_run, shown)]
    lost += [artifact.name for artifact in _without_artifact(api_run, shown, directory)]

    if lost:
        raise TrajectoryError(
            f"W&B lacks {len(lost)} tables, pictures or files of them that rows of {'/'.join(api_run.path)} show: "
            f"{', '.join(lost[:10])}{' and others' if len(lost) > 10 else ''}. Run the same command again, where the "
            f"run's W&B directory is; what is left of them is in {directory}"
        )


def _kept(directory: Path) -> dict[tuple[int, str], Any]:
    """The tables and pictures of our record, by step and key."""
    rows = read_rows(directory)
    return {(int(row[AXIS]), key): value for row in rows for key, value in row.items() if isinstance(value, dict)}


def _shown(api_run: Any, directory: Path) -> Iterator[Shown]:
    """What rows of both our record and W&B show."""
    kept = _kept(directory)
    for key in sorted({key for _, key in kept}):
        for row in api_run.scan_history(keys=[AXIS, key]):
            if (step := int(row[AXIS]), key) in kept:
                yield Shown(step, key, kept[step, key], row[key])


def _without_file(api_run: Any, shown: list[Shown]) -> list[Shown]:
    """Those of which W&B lacks the file, or has another one."""
    sizes = {file.name: file.size for file in api_run.files()} if shown else {}
    return [medium for medium in shown if sizes.get(medium.reference["path"]) != medium.reference["size"]]


def _without_artifact(api_run: Any, shown: list[Shown], directory: Path) -> Iterator["wandb.Artifact"]:
    """The artifacts that tables at W&B lead to and that are not there, as the SDK had made them."""
    from wandb.sdk.artifacts._internal_artifact import InternalArtifact

    tables = [medium for medium in shown if "artifact_path" in medium.reference]
    present = {artifact.digest for artifact in api_run.logged_artifacts()} if tables else set()
    for table in tables:
        row = from_json({table.key: table.kept}, directory, damaged="leave out")
        if table.key not in row:
            continue  # it cannot be told any more what was in it

        artifact = InternalArtifact(f"run-{api_run.id}-{table.key}", "run_table")
        artifact.add(for_wandb(row)[table.key], table.key)
        if artifact.digest not in present:
            artifact._client_id = table.reference["artifact_path"].split("/")[2]  # which the row names it by
            yield artifact


def _files_of(tie: Tie, reference: Mapping[str, Any]) -> Path | None:
    """The directory of the run's files that holds the file; there are several if the run was gone on with."""
    for root in Path(tie.directory).parent.glob(f"*run-*-{tie.id}/files"):
        path = file_below(root, reference["path"])  # a name that W&B has said
        if path.is_file() and file_sha256(path) == reference["sha256"]:
            return root
    return None
