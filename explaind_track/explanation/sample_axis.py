"""Influences of single training samples, by reverse replay: Ψ_S(Θ_g, x_k, x)_j for any of its axes (§4, Thm. 3.1)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import tree_map, tree_rows
from explaind_track.engine.functional import SampleLoss

SAMPLE_AXES = ("step", "seen", "group", "query", "output", "sample")
"""The axes of sample influences in their order. `step`: at which the influence acts; `seen`: whose batch the sample was
in, through whose gradient it acts then and later."""


Array = np.ndarray[Any, Any]

Data = Callable[[Tensor], Any]
"""`data(index)` → the batch of the training samples of these indices, as `sample_loss` takes it."""


@dataclass(frozen=True)
class SampleAxis:
    """Which training samples are asked for, and how to get at them."""

    loss: SampleLoss
    data: Data | None
    labels: Sequence[Any]
    """Along the sample axis."""
    place: Mapping[int, int]
    """Where each training index lies along it; those that nobody asked for lie nowhere."""
    partition: bool
    """Whether the labels are those of a partition's parts, each the sum of its samples."""
    alone: bool | None = None
    """Whether a sample's loss depends on that sample alone; None: to be found out."""

    def batches(self, step: Step) -> Iterator[tuple[Batch, Tensor, Tensor | float]]:
        """The step's batches with their data; the place of each sample along the axis (−1: nowhere); and what each
        counts in the step's gradient, beside its weight."""
        device = next(iter(step.before.parameters.values())).device
        for batch in step.batches:
            assert batch.index is not None  # looked at before work started
            places = torch.tensor([self.place.get(index, -1) for index in batch.index.tolist()])
            data = self.data(batch.index) if batch.data is None and self.data is not None else batch.data
            data = tree_map(lambda tensor: tensor.to(device), data)
            if tree_rows(data) != batch.size:
                raise ValueError(f"data(index) gave {tree_rows(data)} samples for {batch.size} indices")
            yield replace(batch, data=data), places, 1.0
