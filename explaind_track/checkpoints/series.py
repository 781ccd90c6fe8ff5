"""A series of checkpoints: a folder of them, in the order of their steps."""

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from explaind_track.checkpoints.check import BatchLoss, SeriesCheck, check_series
from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.formats import FORMATS, checkpoints_in
from explaind_track.checkpoints.hub import PREFIX, hub_checkpoints
from explaind_track.checkpoints.settings import Settings, require_settings
from explaind_track.checkpoints.step_number import step_by_name
from explaind_track.core.checks import first_few, shown
from explaind_track.errors import CheckpointError

Source = str | PathLike[str]


class CheckpointSeries:
    """The checkpoints of one run, in the order of their steps.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from explaind_track import CheckpointSeries
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for step in (200, 100):
        ...         folder = Path(directory) / f"checkpoint-{step}"
        ...         folder.mkdir()
        ...         save_file({"weight": torch.full((1, 2), step / 100)}, folder / "model.safetensors")
        ...     series = CheckpointSeries.open(directory)
        ...     for checkpoint in series:
        ...         checkpoint.step, checkpoint.format, checkpoint.weights()["weight"].tolist()
        (100, 'weights alone', [[1.0, 1.0]])
        (200, 'weights alone', [[2.0, 2.0]])
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Use `open`, which finds them.

        Args:
            checkpoints: In any order, each of another step.

        Raises:
            CheckpointError: There are none, or two are of the same step.
        """
        self.checkpoints = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
        if not self.checkpoints:
            raise CheckpointError("a series has at least one checkpoint")
        for first, second in zip(self.checkpoints, self.checkpoints[1:], strict=False):
            if first.step == second.step:
                raise CheckpointError(
                    f"{first.path} and {second.path} are both of step {first.step}: pass a list with one of them"
                )

    @classmethod
    def open(cls, source: Source | Iterable[Source], settings: Settings | None = None) -> "CheckpointSeries":
        """Finds the checkpoints, their formats and steps; reads no weights.

        Args:
            source: A folder of checkpoints, or one checkpoint; a list of checkpoints' folders; or `hf:owner/name`, a
                repository of the hub whose branches are checkpoints (`step1000`), each fetched when it is first needed
                (`hf:owner/name@step1000` is one of them).
            settings: Settings of the optimizer that the files do not tell, by name; each a value, or a function of the
                step: `{"lr": lambda step: 6e-4 * min(1, step / 1000)}`, the rate of the step that comes next.

        Raises:
            CheckpointError: A folder holds no checkpoint that can be read, or parts of one only.

        Example:
            >>> import tempfile
            >>> from explaind_track import CheckpointSeries
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     CheckpointSeries.open(directory)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            explaind_track.errors.CheckpointError: ... holds no checkpoint: expected folders ...
        """
        if not isinstance(source, str | PathLike | Iterable):
            raise TypeError(f"a series is opened from a folder or a list of folders, not {shown(source)}")
        told = require_settings(settings)
        folders = [source] if isinstance(source, str | PathLike) else source
        series = cls(checkpoint for folder in folders for checkpoint in _found(folder))
        for checkpoint in series:
            checkpoint.settings = told
        return series

    def check(self, model: nn.Module, batch: Any = None, loss: BatchLoss | None = None) -> SeriesCheck:
        """Tells, before any work, what is there and what is missing, whether it fits, and what explaining it will cost.

        Every checkpoint's names, shapes and types are compared with the model's, its rates and decay are read, and what
        its reader is not sure of is noted. With a batch, the gradient tells whether the optimizer's states belong to
        their parameters: where `v` is large, so is `g²`. The model has its own weights again afterwards.

        Args:
            model: Of the checkpoints' architecture.
            batch: A batch of the training mixture, as `loss` takes it; the larger, the surer.
            loss: `(model, batch)` → the losses of its samples (N,), or their mean.

        Returns:
            The findings by checkpoint. `print` gives a table, `as_dict()` what JSON takes, and `require()` raises
            where something cannot be explained.

        Raises:
            ValueError: Only one of `batch` and `loss` is given.

        Example:
            >>> import tempfile, torch
            >>> from pathlib import Path
            >>> from safetensors.torch import save_file
            >>> from explaind_track import CheckpointSeries
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     folder = Path(directory) / "step100"
            ...     folder.mkdir()
            ...     save_file({"weight": torch.ones(1, 2)}, folder / "model.safetensors")
            ...     check = CheckpointSeries.open(directory).check(torch.nn.Linear(3, 1))
            >>> check.findings[0].problems  # doctest: +ELLIPSIS
            ['... of this Linear. other shapes: weight (file (1, 2), model (1, 3)); the file lacks: bias']
        """
        return check_series(self.checkpoints, model, batch, loss)

    @property
    def steps(self) -> list[int]:
        """How many steps were taken before each checkpoint, in order."""
        return [checkpoint.step for checkpoint in self.checkpoints]

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __getitem__(self, place: int) -> Checkpoint:
        """The checkpoint at a place of the order: 0 for the earliest, −1 for the last."""
        return self.checkpoints[place]

    def __repr__(self) -> str:
        first, last = self.checkpoints[0], self.checkpoints[-1]
        return f"<CheckpointSeries of {len(self)}, steps {first.step} to {last.step}: {first.format}>"


def _found(source: Source) -> Sequence[Checkpoint]:
    """The checkpoints that a folder is, or holds in folders, or that a repository of the hub has."""
    if str(source).startswith(PREFIX):
        return hub_checkpoints(str(source))
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"there is no {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: pass the folder of the checkpoint, with all of its files")
    itself = checkpoints_in(path)
    if itself and step_by_name(path) is not None:
        return itself

    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    found = {folder: checkpoints_in(folder) for folder in folders if step_by_name(folder) is not None}
    unread = [folder.name for folder, checkpoints in found.items() if not checkpoints]
    if unread:
        raise CheckpointError(
            f"{path} holds folders that are named as checkpoints, but are none that can be read: {first_few(unread)}. "
            "Pass a list of the others, or see which formats there are: "
            f"{', '.join(format_.format for format_ in FORMATS)}"
        )
    within = [checkpoint for checkpoints in found.values() for checkpoint in checkpoints]
    if not (itself or within):
        raise CheckpointError(
            f"{path} holds no checkpoint: expected folders such as checkpoint-500 or step1000, each of one of "
            f"{', '.join(format_.format for format_ in FORMATS)}"
        )
    return within or itself
