"""The axis of training samples: which of them are asked for, where they lie along it, and how to get at them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_track.core.checks import whole_numbers
from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import tree_map, tree_rows
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.explanation.step_source import RepeatableSteps

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
    partition: bool = False
    """Whether the labels are those of a partition's parts, each the sum of its samples."""
    alone: bool | None = None
    """Whether a sample's loss depends on that sample alone; None: to be found out."""

    def batches(self, step: Step) -> Iterator[tuple[Batch, Tensor, Tensor | float]]:
        """The step's batches with their data; the place of each sample along the axis (−1: nowhere); and what each
        counts in the step's gradient, beside its weight."""
        for batch in batches_with_data(step, self.data):
            assert batch.index is not None  # looked at before work started
            places = torch.tensor([self.place.get(index, -1) for index in batch.index.tolist()])
            yield batch, places, 1.0


def batches_with_data(step: Step, data: Data | None) -> Iterator[Batch]:
    """The step's batches, each with its samples on the device of the parameters."""
    device = next(iter(step.before.parameters.values())).device
    for batch in step.batches:
        assert batch.index is not None  # looked at before work started
        samples = data(batch.index) if batch.data is None and data is not None else batch.data
        samples = tree_map(lambda tensor: tensor.to(device), samples)
        if tree_rows(samples) != batch.size:
            raise ValueError(f"data(index) gave {tree_rows(samples)} samples for {batch.size} indices")
        yield replace(batch, data=samples)


def choose_samples(
    source: RepeatableSteps,
    loss: SampleLoss,
    data: Data | None,
    samples: Iterable[int] | None,
    partition: Any = None,
) -> SampleAxis:
    """The sample axis: every training index of the steps before the window's end, or those asked for, or a partition's
    labels.

    Raises ValueError for what the record lacks, with the remedy.
    """
    chosen = choose_indices(source, data, samples)
    if partition is None:
        return SampleAxis(loss, data, chosen, {index: place for place, index in enumerate(chosen)})

    label = {index: _label_of(partition, index) for index in chosen}
    labels = sorted(set(label.values()), key=lambda value: (str(type(value)), value))
    place = {value: place for place, value in enumerate(labels)}
    return SampleAxis(loss, data, labels, {index: place[value] for index, value in label.items()}, partition=True)


def choose_indices(source: RepeatableSteps, data: Data | None, samples: Iterable[int] | None) -> list[int]:
    """The training indices that the steps before the window's end saw, sorted; or those of `samples`, as they come.

    Raises ValueError for batches without indices or data, and for samples that no step saw.
    """
    seen: set[int] = set()
    for number, batch in source.batches():
        _require_samples(number, batch, data)
        assert batch.index is not None  # has just been looked at
        seen |= set(batch.index.tolist())
    if not seen:
        raise ValueError(
            "the run has no record of its batches; in training, call tracker.batch(batch, index=…) for each"
        )

    if samples is None:
        return sorted(seen)

    wanted = whole_numbers("samples=", samples)
    if set(wanted) - seen:
        raise ValueError(
            f"no step before {source.last} saw the samples {sorted(set(wanted) - seen)[:10]}; those of {len(seen)} "
            f"indices, {min(seen)} to {max(seen)}, were seen"
        )
    return wanted


def _require_samples(number: int, batch: Batch, data: Data | None) -> None:
    """Raises ValueError unless the batch's samples have names and can be had, and their sum is the step's gradient."""
    if batch.clipped:
        raise ValueError(
            f"the gradient of step {number} was clipped by value, and what is left of it is no sum over samples; "
            "clip it by its norm, or explain groups and steps only"
        )

    if batch.index is None:
        raise ValueError(
            f"a batch of step {number} has no index, so its samples have no names; in training, pass index= to "
            "tracker.batch"
        )

    if batch.data is None and data is None:
        raise ValueError(
            f"the record holds the indices of step {number}'s samples but not the samples; pass data=, a function "
            "from an index tensor (N,) to the batch of sample_loss, such as lambda index: (x[index], y[index])"
        )


def _label_of(partition: Any, index: int) -> Any:
    try:
        value = partition[index]
    except LookupError:
        raise ValueError(f"partition= has no label for the training sample {index}, partition[{index}]") from None
    return value.item() if isinstance(value, Tensor | np.generic) else value
