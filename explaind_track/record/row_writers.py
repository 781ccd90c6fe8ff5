"""Rows for other places than W&B: an interface of one method, and the writers for CSV and TensorBoard."""

import io
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from explaind_track.core.checks import require_package
from explaind_track.record.history import AXIS, numbers_in


@runtime_checkable
class RowWriter(Protocol):
    """Whatever takes rows: an object with this method can be given as one of `Tracker(writers=[…])`.

    Example:
        >>> import torch
        >>> from explaind_track import Query, Tracker
        >>> class Printer:
        ...     def write(self, step, row):
        ...         print(step, sorted(key for key in row if key.startswith("kernel/")))
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> queries = {"test": Query.outputs(torch.ones(2, 4))}
        >>> tracker = Tracker(model, optimizer, queries=queries, writers=[Printer()])
        >>> with tracker.step():
        ...     model(torch.ones(5, 4)).square().mean().backward()
        ...     optimizer.step()
        0 ['kernel/bias', 'kernel/total', 'kernel/weight']
    """

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Takes a row as it is complete.

        Args:
            step: The number of the training step.
            row: Finite numbers by key (see `record.history`); pictures are PNGs, as bytes or as the path of the file;
                tables are `record.media.Table`.
        """


class CSVWriter:
    """Writes numbers as lines `step,key,value`: one for each, since rows have different keys.

    `pandas.read_csv(path).pivot(index="step", columns="key", values="value")` makes columns of them.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from explaind_track import CSVWriter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     CSVWriter(f"{directory}/rows.csv").write(3, {"kernel/head": 0.5})
        ...     print(Path(directory, "rows.csv").read_text())
        step,key,value
        3,kernel/head,0.5
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """path: the file, which is gone on with if it is there."""
        self.path = Path(path)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """See `RowWriter.write`.

        Args:
            step: The number of the training step.
            row: Of which the numbers are written.
        """
        import csv

        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        if not self.path.exists():
            lines.writerow(("step", "key", "value"))
        lines.writerows((step, key, repr(value)) for key, value in numbers_in(row).items() if key != AXIS)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())


class TensorBoardWriter:
    """Writes numbers and pictures for TensorBoard. Needs the extra `tensorboard`.

    Example:
        >>> import tempfile
        >>> from explaind_track import TensorBoardWriter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     TensorBoardWriter(directory).write(3, {"kernel/head": 0.5})
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        """directory: of the event files, as `tensorboard --logdir` takes it.

        Raises:
            ModuleNotFoundError: TensorBoard is not installed.
        """
        require_package("tensorboard", "tensorboard", "a writer for TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """See `RowWriter.write`.

        Args:
            step: The number of the training step.
            row: Of which numbers and pictures are written.
        """
        for key, value in row.items():
            if isinstance(value, bytes | Path):
                self._writer.add_image(key, _pixels(value), step, dataformats="HWC")
            elif isinstance(value, int | float) and key != AXIS:
                self._writer.add_scalar(key, value, step)
        self._writer.flush()


def _pixels(picture: bytes | Path) -> Any:
    import numpy as np
    import PIL.Image

    source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    return np.asarray(PIL.Image.open(source).convert("RGB"))
