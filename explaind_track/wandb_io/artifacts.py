"""The artifacts that W&B keeps: the trajectory, and what is made from it."""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.record.history import HISTORY
from explaind_track.record.manifest import MANIFEST, Manifest
from explaind_track.record.media import media_of
from explaind_track.record.remote import PREFIX
from explaind_track.record.run_directory import POINTER, is_finished, read_tie
from explaind_track.record.validation import file_below
from explaind_track.wandb_io.run import FINISH_SECONDS, is_offline

if TYPE_CHECKING:
    import wandb

    from explaind_track.record.trajectory import Trajectory
    from explaind_track.what_if.rerun import Rerun


def trajectory_version(
    directory: Path, name: str, base: "wandb.Artifact | None" = None, final: bool = False
) -> "wandb.Artifact":
    """The trajectory as it is on disk now, as an artifact that is not logged yet.

    base:  a version that W&B has, whose files are neither read nor sent again.
    final: with the rows of the panels and their pictures.
    """
    import wandb

    manifest = Manifest.read(directory)
    artifact = wandb.Artifact(name, type="trajectory") if base is None else base.new_draft()
    artifact.metadata = _metadata(directory, manifest)

    # the files, but for those that the base has
    kept = dict(artifact.manifest.entries)
    for stale in kept.keys() - {entry.path for entry in manifest.entries}:
        artifact.remove(stale)
    new = [entry for entry in manifest.entries if entry.path not in kept]
    for entry in new:
        entry.verify_size(directory)
    for path in (*(entry.path for entry in new), *(media_of(directory) if final else ())):
        artifact.add_file(str(file_below(directory.absolute(), path)), path, skip_cache=True, policy="immutable")

    # the manifest as it was read, though more may be on disk by now
    with artifact.new_file(MANIFEST, mode="wb", policy="immutable") as file:
        file.write(manifest.to_bytes())
    rows = file_below(directory, HISTORY)
    if final and rows.is_file():
        with artifact.new_file(HISTORY, "wb", policy="immutable") as file, rows.open("rb") as history:
            shutil.copyfileobj(history, file)
    return artifact


def add_offline(run: "wandb.Run", directory: Path) -> float:
    """Adds the trajectory to what `wandb sync` sends of an offline run.

    The files have to last until then, whatever becomes of `directory`: they get a second name inside of the run's own
    directory, which costs no space. On another file system they are copied; returns the MB of the copies.
    """
    import wandb

    target = Path(run.settings.sync_dir).absolute() / POINTER
    if target.is_symlink():
        target.unlink()  # it led to `directory`
    manifest = Manifest.read(directory)
    artifact = wandb.Artifact(f"trajectory-{run.id}", type="trajectory", metadata=_metadata(directory, manifest))
    names = [*(entry.path for entry in manifest.entries), *media_of(directory)]

    copied = 0
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        source = file_below(directory, name)
        (target / name).unlink(missing_ok=True)  # of a call that was interrupted
        try:
            os.link(source, target / name)
        except OSError:
            shutil.copyfile(source, target / name)
            copied += (target / name).stat().st_size
    manifest.write(target)
    if (rows := file_below(directory, HISTORY)).is_file():
        shutil.copyfile(rows, target / HISTORY)
        names.append(HISTORY)

    for name in (*names, MANIFEST):
        artifact.add_file(str(target / name), name, skip_cache=True, policy="immutable")
    run.log_artifact(artifact, aliases=["latest", f"step-{manifest.steps}", "final"])
    return copied / 1e6


def log_result(
    run: "wandb.Run", path: str | os.PathLike[str], kind: str, uses: "Trajectory | str | None" = None
) -> None:
    """Logs a file made from a trajectory (an influence, a mask, a figure) as an artifact.

    The artifact is called `<kind>-<run id>`, and says the file's sha256 and what it was made from. Online, this waits
    until W&B has confirmed it.

    Args:
        run: The W&B run that it goes to.
        path: The file.
        kind: The artifact's type, such as "influence".
        uses: What the file was made from: a trajectory opened from W&B, or the name of any artifact there. The run is
            then shown to descend from it.

    Raises:
        wandb.errors.Error: Whatever W&B raises.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from explaind_track import log_result, open_run
        >>> run = open_run("grokking", mode="disabled")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "mask.txt"
        ...     _ = path.write_text("0 1 1 0")
        ...     log_result(run, path, kind="mask", uses="me/grokking/trajectory-1a2b:final")
        >>> run.finish()
    """
    import wandb

    source = uses if isinstance(uses, str) else getattr(uses, "artifact", None)
    content = Path(path).read_bytes()
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    artifact.metadata = {"file": Path(path).name, "sha256": hashlib.sha256(content).hexdigest(), "made_from": source}
    artifact.add_file(str(Path(path).absolute()), Path(path).name, skip_cache=True)

    if is_offline(run):
        run.log_artifact(artifact)
        return
    if source is not None:
        run.use_artifact(source)
    run.log_artifact(artifact).wait(int(FINISH_SECONDS))


def log_rerun(run: "wandb.Run", rerun: "Rerun") -> str:
    """Logs the record of a rerun as an artifact, which says what was changed and from which step on.

    The artifact is called `rerun-<run id>`, each further one a version of it, and opens as any trajectory does. Where
    the original is at W&B (opened from there, or recorded by a run there), the run is shown to descend from it. Online,
    this waits until W&B has confirmed it; offline, the record's directory has to stay until `wandb sync` has sent it.

    Args:
        run: The W&B run that it goes to.
        rerun: What `rerun(…, out=DIRECTORY)` returned.

    Returns:
        What `Trajectory.open` takes, `wandb:entity/project/rerun-ID:step-N`.

    Raises:
        ValueError: The rerun has no record.
        wandb.errors.Error: Whatever W&B raises.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Tracker, Trajectory, log_rerun, open_run, rerun
        >>> model, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: model(batch).square().mean(1)
        >>> run = open_run("grokking", mode="disabled")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=f"{place}/run")
        ...     with tracker.step():
        ...         tracker.batch(x, index=range(4))
        ...         loss(model, x).mean().backward()
        ...         optimizer.step()
        ...     tracker.finish()
        ...     data, out = (lambda index: x[index]), f"{place}/again"
        ...     again = rerun(Trajectory.open(f"{place}/run"), model, loss, data, out=out, progress=False)
        ...     log_rerun(run, again)  # doctest: +ELLIPSIS
        'wandb:.../rerun-...:step-1'
        >>> run.finish()
    """
    if rerun.trajectory is None:
        raise ValueError("this rerun has no record, so there is nothing to log: pass out=DIRECTORY to rerun")
    name, source = f"rerun-{run.id}", _at_wandb(rerun.original)
    artifact = trajectory_version(rerun.trajectory.directory, name)
    lineage = rerun.trajectory.manifest.head["lineage"]
    artifact.metadata |= {"made_from": source, **{key: lineage[key] for key in ("run", "start", "changes")}}

    offline = is_offline(run)
    if source is not None and not offline:
        run.use_artifact(source)
    logged = run.log_artifact(artifact, aliases=["latest", f"step-{rerun.stop}"])
    if not offline:
        logged.wait(int(FINISH_SECONDS))
    return PREFIX + "/".join(filter(None, (run.entity, run.project, f"{name}:step-{rerun.stop}")))


def _at_wandb(trajectory: "Trajectory") -> str | None:
    """The artifact that a trajectory was opened from, or that the run which recorded it has at W&B."""
    tie = read_tie(trajectory.directory) if trajectory.artifact is None else None
    if tie is None or tie.offline:
        return trajectory.artifact
    return "/".join(filter(None, (tie.entity, tie.project, f"{tie.artifact}:latest")))


def log_references(run: "wandb.Run", kind: str, places: Mapping[str, Path]) -> str:
    """Logs where things lie on this disk, by their names, as an artifact `<kind>-<run id>`: none of them is read or
    sent. Returns the artifact's name, for `log_result(…, uses=…)`."""
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for name, place in places.items():
        artifact.add_reference(place.absolute().as_uri(), name, checksum=False)
    logged = run.log_artifact(artifact)
    if not is_offline(run):
        logged.wait(int(FINISH_SECONDS))
    return "/".join(filter(None, (run.entity, run.project, f"{kind}-{run.id}:latest")))


def _metadata(directory: Path, manifest: Manifest) -> dict[str, Any]:
    head, steps = manifest.head, manifest.steps
    return {
        **{key: head[key] for key in ("format", "model", "optimizer", "packages") if key in head},
        "parameters": sum(math.prod(shape) for shape, _ in head["parameters"].values()),
        "steps": steps,
        "finished": is_finished(directory, steps),
        "digest": manifest.digest,
    }
