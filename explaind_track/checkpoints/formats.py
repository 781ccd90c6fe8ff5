"""Every format of checkpoints that can be read; the first whose `find` finds any has the folder."""

from collections.abc import Sequence
from pathlib import Path

from explaind_track.checkpoints.accelerate import AccelerateCheckpoint
from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.deepspeed import DeepSpeedCheckpoint
from explaind_track.checkpoints.distributed import DistributedCheckpoint
from explaind_track.checkpoints.olmo import OlmoCheckpoint
from explaind_track.checkpoints.trainer import TrainerCheckpoint
from explaind_track.checkpoints.trajectory import TrajectoryCheckpoint
from explaind_track.checkpoints.weights_alone import WeightsAlone

FORMATS: tuple[type[Checkpoint], ...] = (
    TrajectoryCheckpoint,
    DeepSpeedCheckpoint,
    DistributedCheckpoint,
    OlmoCheckpoint,
    AccelerateCheckpoint,
    TrainerCheckpoint,
    WeightsAlone,
)


def checkpoints_in(path: Path, step: int | None = None) -> Sequence[Checkpoint]:
    """The checkpoints that a folder is; none where no format is recognised. step: if it is known."""
    for format_ in FORMATS:
        found = format_.find(path, step)
        if found:
            return found
    return ()
