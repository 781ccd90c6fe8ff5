"""What Weights & Biases keeps: the trajectory as an artifact."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb

UPLOAD_SECONDS = 600


def log_trajectory(run: "wandb.Run", directory: Path) -> float:
    """Logs the trajectory's directory as an artifact and waits for its upload; returns the MB left in staging.

    W&B copies an artifact's files before it uploads them. Online the copy goes as soon as it has served. Offline it
    has to stay until `wandb sync`, so it is put inside the run's own directory, to be removed along with it.
    Raises whatever W&B raises; the trajectory itself is never touched.
    """
    import wandb

    staging = Path(run.settings.sync_dir) / "staging"
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(staging.absolute())
    try:
        artifact = wandb.Artifact(f"trajectory-{run.id}", type="trajectory")
        artifact.add_dir(str(directory.absolute()), skip_cache=True, policy="mutable")
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before
    logged = run.log_artifact(artifact)
    if not run.settings._offline:
        logged.wait(UPLOAD_SECONDS)
        shutil.rmtree(staging, ignore_errors=True)
    return directory_mb(staging)


def directory_mb(directory: Path) -> float:
    """The size of all files under the directory, in MB (10⁶ bytes); 0 if there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6
