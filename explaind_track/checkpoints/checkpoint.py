"""A checkpoint of a run that nobody watched: the model's weights, and the optimizer as it would take the next step."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from explaind_track.checkpoints.conversions import in_the_models_names
from explaind_track.checkpoints.optimizer_state import SavedOptimizer, build_optimizer
from explaind_track.checkpoints.settings import Settings, complete
from explaind_track.checkpoints.weights import put_into
from explaind_track.core.tensors import low_precision
from explaind_track.errors import CheckpointWarning

NO_MASTER = (
    "its weights are {} and there is no float32 copy of them: training's own step rounded to that, and left many "
    "parameters where they were. What is explained is the same step in float32"
)


class Checkpoint(ABC):
    """One state of a run on disk; each format is a subclass that reads its files, and is listed in `formats`.

    Nothing is read before it is asked for, nothing is unpickled, and nothing is ever written to the folder.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from explaind_track import CheckpointSeries
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     folder = Path(directory) / "step100"
        ...     folder.mkdir()
        ...     save_file({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, folder / "model.safetensors")
        ...     (checkpoint,) = CheckpointSeries.open(directory)
        ...     checkpoint.load(model)
        ...     checkpoint.step, model.weight.tolist(), checkpoint.optimizer(model)
        (100, [[1.0, 1.0]], None)
    """

    format: ClassVar[str]
    """What wrote such files, in words."""

    def __init__(self, path: Path, step: int) -> None:
        """Use `CheckpointSeries.open`, which finds out the format.

        Args:
            path: The folder or file.
            step: The number of optimizer steps that were taken before it was written.
        """
        self.path = path
        self.step = step
        self.settings: Settings = {}
        """What the user says of the optimizer, where the files do not."""

    @classmethod
    @abstractmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        """The checkpoints of this format that a folder is; none where it is of another.

        Args:
            path: The folder.
            step: The number of steps, where something else than its files and its name tells it.

        Raises:
            CheckpointError: It is of this format, but something is missing of it.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """The model's tensors by the names in the files, each read when it is asked for."""

    def weights_for(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The model's tensors by the names in the model, where they are others than those in the files."""
        return in_the_models_names(self.weights(), model, self.path)

    @abstractmethod
    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        """The optimizer's settings as of the next step and its state, by the parameters' names; None if there is none.

        Args:
            model: Of the checkpoint's architecture: formats without names go by the order of its parameters.

        Raises:
            CheckpointError: The files are torn, of another kind, or do not fit the model.
        """

    def load(self, model: nn.Module) -> None:
        """Writes the checkpoint's weights and buffers into the model, in place; tied weights once.

        Args:
            model: Of the checkpoint's architecture, in a type that holds the file's numbers exactly: bfloat16 weights
                go into a float32 model, float32 weights into a float32 or float64 one.

        Raises:
            CheckpointError: The files are torn, or hold other names, shapes or types than the model; all are named
                and nothing is written.
        """
        put_into(model, self.weights_for(model), self.path)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """The optimizer over the model's parameters, with the checkpoint's state and the settings of its next step.

        The state is mapped from the file, not copied, where it is in the parameters' type: it takes the memory that
        training takes for it, and writing to it does not reach the file.

        Args:
            model: Of the checkpoint's architecture; its weights need not be loaded.

        Returns:
            The optimizer; None where the checkpoint holds weights alone.

        Raises:
            CheckpointError: The state is torn, does not fit the model's parameters, or the optimizer is unknown.
        """
        saved = self.complete_optimizer(model)
        if saved is None:
            return None
        for told in saved.warnings:
            warnings.warn(f"{self.path}: {told}", CheckpointWarning, stacklevel=2)
        return build_optimizer(saved, model, self.path)

    def complete_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        """What is saved of the optimizer, completed by the settings that the user has told.

        Args:
            model: Of the checkpoint's architecture.

        Raises:
            CheckpointError: As `saved_optimizer` raises it; or settings are missing, or contradict the files.
        """
        saved = self.saved_optimizer(model)
        if saved is None:
            return None
        groups = complete(saved, self.settings, self.step, self.path)
        low = low_precision(self.weights())
        told = [] if low is None else [NO_MASTER.format(str(low).removeprefix("torch."))]
        return replace(saved, groups=groups, warnings=[*saved.warnings, *told])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at step {self.step}: {self.path}>"
