"""The rows of an influence that keeps the step, one for each step; where these are many, in a file."""

import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Row = dict[str, Tensor]
"""The variables of an `Influence` by name, for one step or for the sum of all."""


class Block(NamedTuple):
    """Rows of steps that follow on each other, with the same parts."""

    parts: tuple[str, ...]
    steps: np.ndarray[Any, Any]
    """Their numbers, (N,)."""
    nodes: np.ndarray[Any, Any]
    """The quadrature nodes they took, (N,)."""
    values: Row
    """Their variables, (N, …)."""


@dataclass(frozen=True)
class _Run:
    """Rows that lie end to end in the file."""

    parts: tuple[str, ...]
    layout: np.dtype[Any]
    begin: int
    """The place of the first, in bytes."""
    count: int

    @property
    def end(self) -> int:
        return self.begin + self.count * self.layout.itemsize


class FiledRows:
    """Blocks of rows in a file without a name, which is gone with the process: memory stays flat over any number of
    steps. Goes through them in their order."""

    def __init__(self) -> None:
        """The file is where temporary ones go (`TMPDIR`)."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the rows are wanted
        weakref.finalize(self, self._file.close)
        self._runs: list[_Run] = []

    def append(self, block: Block) -> None:
        """Adds rows, all of them or, whatever interrupts it, none. Raises OSError where there is no room."""
        arrays = {name: value.numpy() for name, value in block.values.items()}
        fields = [(name, value.dtype, value.shape[1:]) for name, value in arrays.items()]
        layout = np.dtype([("step", np.int64), ("nodes", np.int64), *fields])
        records = np.zeros(len(block.steps), layout)
        for name, value in {"step": block.steps, "nodes": block.nodes, **arrays}.items():
            records[name] = value

        last = self._runs[-1] if self._runs else _Run((), layout, 0, 0)
        self._write(records, last.end)
        if (last.parts, last.layout) == (block.parts, layout):
            self._runs[-1] = replace(last, count=last.count + len(records))
        else:
            self._runs.append(_Run(block.parts, layout, last.end, len(records)))

    def _write(self, records: np.ndarray[Any, Any], place: int) -> None:
        content = records.tobytes()
        if os.pwrite(self._file.fileno(), content, place) != len(content):
            raise OSError("no room for the influences of a step in the directory of temporary files")

    def __iter__(self) -> Iterator[Block]:
        for run in self._runs:
            content = os.pread(self._file.fileno(), run.end - run.begin, run.begin)
            rows = np.frombuffer(bytearray(content), run.layout)
            names = [name for name in run.layout.names or () if name not in ("step", "nodes")]
            # copies: a column's strides are the rows' length, which torch takes in whole numbers alone
            values = {name: torch.from_numpy(np.array(rows[name], order="C")) for name in names}
            yield Block(run.parts, rows["step"].copy(), rows["nodes"].copy(), values)
