"""A thread that uploads a trajectory while it grows."""

import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from explaind_track.errors import LoggingWarning
from explaind_track.record.manifest import MANIFEST, Entry, Manifest, last_step
from explaind_track.wandb_io.artifacts import add_offline, trajectory_version
from explaind_track.wandb_io.run import FINISH_SECONDS, is_offline

if TYPE_CHECKING:
    import wandb

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
        """Sends the rest, and waits for it, at most `FINISH_SECONDS`.

        Warns, naming what is missing and the command that completes it, instead of raising. Returns the MB that copies
        of the trajectory take on this disk.
        """
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

            # as often as time allows, each time after a longer pause
            pause = 0.5
            while not self._attempt(final=True) and time.monotonic() + pause < self._deadline:
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
        except Exception as error:
            self._failure = error

    def _entries(self) -> tuple[Entry, ...]:
        return Manifest.read(self._directory, missing_ok=True).entries

    def _due(self) -> bool:
        """Whether enough is new, or old enough; the manifest is only read where it has changed."""
        path = self._directory / MANIFEST
        changed = path.stat().st_mtime_ns if path.is_file() else 0
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
        """Waits until the version is confirmed, however long that takes while training goes on. Raises what W&B
        raises."""
        from wandb.sdk.artifacts.exceptions import WaitTimeoutError

        while True:
            try:
                artifact.wait(2)
                return
            except WaitTimeoutError:
                if time.monotonic() > self._deadline:
                    raise
