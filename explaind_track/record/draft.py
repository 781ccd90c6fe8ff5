"""Steps that wait in memory until they are written as a segment; `schema` says what is in one."""

import hashlib
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.step import Batch
from explaind_track.core.tensors import Tensors
from explaind_track.record.batch_json import altered_json, as_bytes, as_json
from explaind_track.record.schema import Settings, StepRecord, outside_tensors

ONCE = ("index:", "weight:", "ids:")
"""How the names of tensors begin that many steps may refer to."""


@dataclass(frozen=True)
class StepDraft:
    """A step as a segment will hold it."""

    entry: Mapping[str, Any]
    """All that the header says of it but its settings."""
    settings: Settings
    tensors: Tensors
    size: int
    """In bytes, together with the steps before it."""


class SegmentDraft:
    """Steps that wait in memory to be written as one segment. Each is in it wholly or not at all."""

    def __init__(self, first: int, written: Collection[str]) -> None:
        """first: the number of the step that comes next. written: the names of indices and weights that the trajectory
        holds already."""
        self.first = first
        self._steps: list[StepDraft] = []
        self._written = written
        self._shared: dict[str, Tensor] = {}
        """Indices and weights by name."""
        self._tensors: dict[str, Tensor] = {}
        """Of the step that is being added."""
        self._bytes = 0

    @property
    def size(self) -> int:
        """Of the tensors, in bytes."""
        return self._steps[-1].size if self._steps else 0

    def add(self, number: int, record: StepRecord) -> None:
        """Adds a step, in the place of those from its number on. Of its tensors, only those that the training loop owns
        are copied: its batches'."""
        self._tensors, self._bytes = {}, 0
        for name, value in outside_tensors(number, record.outside).items():
            self._keep(name, value)
        for name, gradient in record.gradients.items():
            self._keep(f"gradient:{number}:{name}", gradient)
        for loss, gradients in record.auxiliary.items():
            for name, gradient in gradients.items():
                self._keep(f"auxiliary:{number}:{loss}:{name}", gradient)
        for name, buffer in record.buffers.items():
            self._keep(f"buffer:{number}:{name}", buffer)

        entry = {
            "auxiliary": list(record.auxiliary),
            "batches": [self._batch(f"batch:{number}:{place}", batch) for place, batch in enumerate(record.batches)],
        }
        if record.frozen:
            entry["frozen"] = list(record.frozen)
        if record.hashed is not None:
            entry["hashed"] = {"names": record.hashed.names, "sha256": record.hashed.sha256}

        del self._steps[number - self.first :]
        before = self._steps[-1].settings if self._steps else None
        settings = before if before == record.settings else record.settings  # held once for all steps that have them
        self._steps.append(StepDraft(entry, settings, self._tensors, self.size + self._bytes))

    def until(self, last: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a segment of the steps before `last`."""
        steps = self._steps[: last - self.first]
        tensors = {name: value for step in steps for name, value in step.tensors.items()}
        entries = [
            {"settings": None if place and step.settings is steps[place - 1].settings else step.settings, **step.entry}
            for place, step in enumerate(steps)
        ]
        return tensors, {"steps": entries}

    def rest(self, first: int, written: Collection[str]) -> "SegmentDraft":
        """The draft without the steps before `first`, which are written."""
        draft = SegmentDraft(first, written)
        gone, kept = self._steps[: first - self.first], self._steps[first - self.first :]
        draft._steps = [replace(step, size=step.size - gone[-1].size) for step in kept]
        return draft

    def _batch(self, name: str, batch: Batch) -> dict[str, Any]:
        numbers = itertools.count(1)

        def put(tensor: Tensor) -> dict[str, str]:
            key = f"{name}:{next(numbers)}"
            self._keep(key, tensor.detach().clone())
            return {"tensor": key}

        for device, state in batch.random_state.items():
            self._keep(f"{name}:random:{device}", state)
        return {
            "size": batch.size,
            "weight": self._weight(batch.weight),
            "index": None if batch.index is None else self._once("index", batch.index),
            **({} if batch.ids is None else {"ids": self._once("ids", as_bytes(batch.ids))}),
            **({} if batch.altered is None else {"altered": altered_json(batch.altered, self._weight)}),
            "data": as_json(batch.data, put) if batch.index is None else None,
            "clipped": batch.clipped,
            "random": {device: f"{name}:random:{device}" for device in batch.random_state},
        }

    def _weight(self, weight: Tensor | float) -> str | float:
        return self._once("weight", weight) if isinstance(weight, Tensor) else weight

    def _once(self, kind: str, tensor: Tensor) -> str:
        """Keeps a tensor unless the trajectory has it already; returns its name, the hash of all that it is."""
        content = tensor.detach().cpu().contiguous()
        described = f"{content.dtype} {tuple(content.shape)}:".encode()
        bits = content.reshape(-1).view(torch.uint8).numpy().tobytes()
        name = f"{kind}:{hashlib.sha256(described + bits).hexdigest()[:32]}"
        if name not in self._written:
            if name in self._shared:
                self._tensors[name] = self._shared[name]
            else:
                self._shared[name] = content.clone()
                self._keep(name, self._shared[name])
        return name

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor
        self._bytes += tensor.numel() * tensor.element_size()
