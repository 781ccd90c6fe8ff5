"""Folders of transformers' Trainer: `checkpoint-500` with model, `optimizer.pt` and `scheduler.pt`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.model_files import read_model
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.state_dict import saved_by_state_dict
from explaind_track.checkpoints.step_number import TRAINER_STATE, require_step, step_by_trainer
from explaind_track.checkpoints.torch_files import read_torch
from explaind_track.errors import CheckpointError


class TrainerCheckpoint(Checkpoint):
    """A folder that transformers' Trainer has saved. Its scheduler has been stepped: the groups' rate is the next
    step's."""

    format = "transformers' Trainer"
    optimizer_file: ClassVar[str] = "optimizer.pt"
    scheduler_file: ClassVar[str] = "scheduler.pt"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        if not any((path / name).is_file() for name in (cls.optimizer_file, TRAINER_STATE)):
            return ()
        return (cls(path, require_step(path, step, step_by_trainer(path))),)

    def weights(self) -> Mapping[str, Tensor]:
        return read_model(self.path)

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        file, scheduler = self.path / self.optimizer_file, self.path / self.scheduler_file
        if not file.is_file() and not scheduler.is_file():
            return None  # save_only_model=True
        saved = saved_by_state_dict(read_torch(file), model, file)
        if not scheduler.is_file():
            told = f"there is no {scheduler.name}: the rate is {file.name}'s, nothing confirms it as the next step's"
            return replace(saved, warnings=[*saved.warnings, told])
        require_rates(saved, scheduler)
        return saved


def require_rates(saved: SavedOptimizer, scheduler: Path) -> None:
    """The groups' rates are those that the scheduler has set last. Raises CheckpointError if not."""
    schedule = read_torch(scheduler)
    if not isinstance(schedule, Mapping) or "_last_lr" not in schedule:
        raise CheckpointError(f"{scheduler} is no scheduler's state_dict(): it has no '_last_lr'")
    of_optimizer = [float(group["lr"]) for group in saved.groups]
    of_schedule = [float(rate) for rate in schedule["_last_lr"]]
    if not all(any(math.isclose(rate, other, rel_tol=1e-6) for other in of_schedule) for rate in of_optimizer):
        raise CheckpointError(
            f"{scheduler.parent}: the rates of the optimizer ({_listed(of_optimizer)}) are not those that "
            f"{scheduler.name} has set for the next step ({_listed(of_schedule)}): the files are of different "
            "steps, or were changed"
        )


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.6g}" for rate in rates)
