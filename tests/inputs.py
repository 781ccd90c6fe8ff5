"""Batches of the kinds that people have: tokenizers' encodings, dataclasses, mappings, with words in them."""

from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoding(UserDict):  # type: ignore[type-arg]
    """Had by key and by attribute, as tokenizers give them."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


@dataclass(frozen=True)
class Example:
    """With things that are no tensors: words, one for each sample, and what is the same for all."""

    x: Tensor
    y: Tensor
    text: list[str]
    source: str = "web"
    note: None = None


class Columns(Mapping[str, Any]):
    """A mapping that cannot be written to, as data sets give rows."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def inputs(self) -> Tensor:
        found: Tensor = self._columns["x"]
        return found


def encoding(x: Tensor, y: Tensor) -> Encoding:
    return Encoding({"x": x, "y": y, "kind": "train"})


def columns(x: Tensor, y: Tensor) -> Columns:
    return Columns({"x": x, "y": y})


def example(x: Tensor, y: Tensor) -> Example:
    return Example(x, y, ["a" * (1 + int(label)) for label in y])


def of_encoding(model: nn.Module, batch: Encoding) -> Tensor:
    assert batch["kind"] == batch.kind == "train"
    return F.cross_entropy(model(batch.x), batch["y"], reduction="none")


def of_columns(model: nn.Module, batch: Columns) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch["y"], reduction="none")


def of_example(model: nn.Module, batch: Example) -> Tensor:
    """Weighted by the lengths of the words, which are the samples' own."""
    assert (batch.source, batch.note) == ("web", None)
    lengths = torch.tensor([len(word) for word in batch.text], dtype=batch.x.dtype)
    assert len(lengths) == len(batch.x)
    return F.cross_entropy(model(batch.x), batch.y, reduction="none") * lengths
