"""Folders of Accelerate's `save_state`: a model, `optimizer.bin` and `scheduler.bin`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from explaind_track.checkpoints.state_dict import steps_taken
from explaind_track.checkpoints.step_number import require_step
from explaind_track.checkpoints.torch_files import read_torch
from explaind_track.checkpoints.trainer import TrainerCheckpoint
from explaind_track.errors import CheckpointError


class AccelerateCheckpoint(TrainerCheckpoint):
    """A folder that `Accelerator.save_state` has written. It numbers folders by how many it has written: the step is
    the optimizer's, where that counts."""

    format = "Accelerate"
    optimizer_file, scheduler_file = "optimizer.bin", "scheduler.bin"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        file = path / cls.optimizer_file
        if not file.is_file():
            return ()
        if (path / "optimizer_1.bin").is_file():
            raise CheckpointError(
                f"{path} holds the states of several optimizers: only a run with one can be explained"
            )
        return (cls(path, require_step(path, step, steps_taken(read_torch(file)))),)
