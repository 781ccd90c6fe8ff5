"""Folders with a model and no optimizer, as most are published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.model_files import has_model, read_model
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.step_number import require_step


class WeightsAlone(Checkpoint):
    """A model without its optimizer's state: its next step can be estimated only."""

    format = "weights alone"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        return (cls(path, require_step(path, step)),) if has_model(path) else ()

    def weights(self) -> Mapping[str, Tensor]:
        return read_model(self.path)

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        return None
