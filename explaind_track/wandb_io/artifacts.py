"""What Weights & Biases keeps: the trajectory, uploaded while it grows, and what is made from it."""

import hashlib
import math
import os
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.errors import LoggingWarning
from explaind_track.record.history import HISTORY
from explaind_track.record.manifest import MANIFEST, Entry, Manifest, last_step
from explaind_track.record.run_directory import POINTER, is_finished, pictures
from explaind_track.wandb_io.run import FINISH_SECONDS, is_offline

if TYPE_CHECKING:
    import wandb

    from explaind_track.record.trajectory import Trajectory

POLL_SECONDS = 1.0
BATCH_BYTES = 2**28
BATCH_SECONDS = 300.0
"""A version of the artifact is made of what has been recorded since the last one, once it is this large or this old."""


class TrajectoryUpload:
    """Uploads a growing trajectory in the background: one artifact, a version for each batch of new files.

    Every version holds the whole trajectory up to then, but takes over what the version before it has, so that each
    file is read and sent once. It is made from the manifest on disk, which names a whole trajectory at any moment; so
    recording and uploading need not know of each other. A version counts once W&B has confirmed it. One that fails is
    made again along with what came after it; what is missing in the end is told of, with the command that sends it.
    Offline nothing can be sent: the end of the run adds the whole trajectory to what `wandb sync` will send.
    """

    def __init__(self, run: "wandb.Run", directory: Path) -> None:
        self._run, self._directory = run, directory
        self._confirmed: wandb.Artifact | None = None
        self._sent: set[Entry] = set()
        self._last = time.monotonic()
        self._seen = 0
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._failure: Exception | None = None
        self._copied_mb = 0.0
        self._thread = threading.Thread(target=self._work, name="trajectory-upload", daemon=True)
        self._thread.start()

    def finish(self) -> float:
        """Sends the rest, and waits for it, at most `FINISH_SECONDS`. Warns, naming what is missing and the command
        that completes it, instead of raising. Returns the MB that copies of the trajectory take on this disk."""
        self._deadline = time.monotonic() + FINISH_SECONDS
        self._closing.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive() or self._failure is not None:
            reason = (
                f"W&B has not confirmed it within {FINISH_SECONDS:.0f} s" if self._failure is None else self._failure
            )
            have, made = last_step(self._sent), last_step(self._entries())
            warnings.warn(
                f"of the {made} recorded steps, {have} are at W&B ({reason!r}). The whole trajectory is in "
                f"{self._directory}; complete the upload with `explaind-track sync {self._directory}`",
                LoggingWarning,
                stacklevel=3,
            )
        return self._copied_mb

    def _work(self) -> None:
        try:
            offline = is_offline(self._run)
            while not self._closing.wait(POLL_SECONDS):
                if not offline and self._due():
                    self._attempt(final=False)
            if offline:
                self._copied_mb = add_offline(self._run, self._directory)
                return
            pause = 0.5
            while not self._attempt(final=True) and time.monotonic() + pause < self._deadline:
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
        except Exception as error:
            self._failure = error

    def _entries(self) -> tuple[Entry, ...]:
        return Manifest.read(self._directory, missing_ok=True).entries

    def _due(self) -> bool:
        changed = (self._directory / MANIFEST).stat().st_mtime_ns if (self._directory / MANIFEST).is_file() else 0
        aged = time.monotonic() - self._last >= BATCH_SECONDS
        if changed == self._seen and not aged:
            return False
        self._seen = changed
        new = [entry for entry in self._entries() if entry not in self._sent]
        return bool(new) and (aged or sum(entry.size for entry in new) >= BATCH_BYTES)

    def _attempt(self, final: bool) -> bool:
        """Makes a version, and tells whether it was confirmed."""
        self._last = time.monotonic()
        try:
            artifact = trajectory_version(self._directory, f"trajectory-{self._run.id}", self._confirmed, final)
            steps = artifact.metadata["steps"]
            self._run.log_artifact(artifact, aliases=["latest", f"step-{steps}", *(["final"] if final else [])])
            self._wait(artifact)
        except Exception as error:
            self._failure = error
            return False
        self._failure, self._confirmed = None, artifact
        self._sent = {entry for entry in self._entries() if entry.path in artifact.manifest.entries}
        return True

    def _wait(self, artifact: "wandb.Artifact") -> None:
        """Until the version is confirmed, however long that takes while training goes on. Raises what W&B raises."""
        from wandb.sdk.artifacts.exceptions import WaitTimeoutError

        while True:
            try:
                artifact.wait(2)
                return
            except WaitTimeoutError:
                if time.monotonic() > self._deadline:
                    raise


def trajectory_version(
    directory: Path, name: str, base: "wandb.Artifact | None" = None, final: bool = False
) -> "wandb.Artifact":
    """The trajectory as it is on disk now, as an artifact that is not logged yet; `base`: a version that W&B has, whose
    files are neither read nor sent again. final: with the rows of the panels and their pictures."""
    import wandb

    manifest = Manifest.read(directory)
    artifact = wandb.Artifact(name, type="trajectory") if base is None else base.new_draft()
    artifact.metadata = _metadata(directory, manifest)
    kept = dict(artifact.manifest.entries)
    for stale in kept.keys() - {entry.path for entry in manifest.entries}:
        artifact.remove(stale)
    new = [entry for entry in manifest.entries if entry.path not in kept]
    for entry in new:
        entry.verify_size(directory)
    for name in (*(entry.path for entry in new), *(pictures(directory) if final else ())):
        artifact.add_file(str(directory.absolute() / name), name, skip_cache=True, policy="immutable")
    # what was read, though more may be on disk by now
    with artifact.new_file(MANIFEST, mode="wb", policy="immutable") as file:
        file.write(manifest.to_bytes())
    if final and (directory / HISTORY).is_file():
        with artifact.new_file(HISTORY, "wb", policy="immutable") as file, (directory / HISTORY).open("rb") as history:
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
        target.unlink()
    manifest = Manifest.read(directory)
    artifact = wandb.Artifact(f"trajectory-{run.id}", type="trajectory", metadata=_metadata(directory, manifest))
    names, copied = [*(entry.path for entry in manifest.entries), *pictures(directory)], 0
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(directory / name, target / name)
        except OSError:
            shutil.copyfile(directory / name, target / name)
            copied += (target / name).stat().st_size
    manifest.write(target)
    if (directory / HISTORY).is_file():
        shutil.copyfile(directory / HISTORY, target / HISTORY)
        names.append(HISTORY)
    for name in (*names, MANIFEST):
        artifact.add_file(str(target / name), name, skip_cache=True, policy="immutable")
    run.log_artifact(artifact, aliases=["latest", f"step-{manifest.steps}", "final"])
    return copied / 1e6


def log_result(
    run: "wandb.Run", path: str | os.PathLike[str], kind: str, uses: "Trajectory | str | None" = None
) -> None:
    """Logs a file made from a trajectory (an influence, a mask, a figure) as the artifact `<kind>-<run id>`.

    uses: what it was made from: a trajectory opened from W&B, or the name of any artifact there. The run is then shown
    to descend from it. Waits until W&B has confirmed it; raises what W&B raises.
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


def _metadata(directory: Path, manifest: Manifest) -> dict[str, Any]:
    head, steps = manifest.head, manifest.steps
    return {
        **{key: head[key] for key in ("format", "model", "optimizer", "packages") if key in head},
        "parameters": sum(math.prod(shape) for shape, _ in head["parameters"].values()),
        "steps": steps,
        "finished": is_finished(directory, steps),
        "digest": manifest.digest,
    }


def directory_mb(directory: Path) -> float:
    """The size of all files under the directory, in MB (10⁶ bytes); 0 if there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6
