"""Where steps come from, forwards and backwards: a trajectory, or steps in memory; and which samples they have seen."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind_track.core.step import Batch, Step
from explaind_track.engine.functional import SampleLoss
from explaind_track.explanation.sample_axis import Data, SampleAxis
from explaind_track.record.trajectory import Trajectory


class StepList:
    """Steps in memory, as a trajectory gives them. They have to last (`Trajectory.steps(lasting=True)`)."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = list(steps)
        for one, other in zip(self._steps, self._steps[1:], strict=False):
            if any(other.before.parameters[name] is value for name, value in one.before.parameters.items()):
                raise ValueError(
                    "samples are explained from the last step back, so all steps have to last: take them from "
                    "trajectory.steps(lasting=True), or pass the trajectory itself"
                )

    fingerprint = "steps in memory"

    def __len__(self) -> int:
        return self._steps[-1].number + 1 if self._steps else 0

    def steps_back(self, first: int, last: int, memory: int) -> Iterator[Step]:
        return (step for step in reversed(self._steps) if first <= step.number < last)

    def steps(self, first: int, last: int) -> Iterator[Step]:
        return (step for step in self._steps if first <= step.number < last)

    def indices(self, last: int) -> Iterator[tuple[int, Batch]]:
        return ((step.number, batch) for step in self._steps if step.number < last for batch in step.batches)


class StepStream:
    """Steps that pass by once, each valid until the next."""

    fingerprint = "steps in memory"

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = steps

    def __len__(self) -> int:
        """0 where nobody knows."""
        return len(self._steps) if isinstance(self._steps, Sized) else 0

    def steps(self, first: int, last: int) -> Iterable[Step]:
        """All of them."""
        return self._steps


Source = Trajectory | StepList


def source_of(steps: Trajectory | Iterable[Step], model: nn.Module, window: tuple[int, int] | None) -> Source:
    """Raises ValueError for a model that does not fit, and for a window outside of the run."""
    if isinstance(steps, Trajectory):
        steps.check_model(model)
    source = steps if isinstance(steps, Trajectory) else StepList(steps)
    first, last = window or (0, len(source))
    if not 0 <= first < last <= len(source):
        raise ValueError(
            f"window=({first}, {last}) is not within the run: a window (first, last) holds the steps first ≤ s < last, "
            f"and the run has {len(source)} steps, so that 0 ≤ first < last ≤ {len(source)}"
        )
    return source


def reach(source: Source, first: int, last: int, memory: int) -> int:
    """The first step whose gradient, carried on by momentum, can be told from 0 in the steps first ≤ s < last."""
    decay: dict[str, float] = {}
    for step in source.steps_back(0, last, memory):
        for name, update in step.updates.items():
            if update.rule.buffer is None:
                continue
            if step.number >= first:
                decay[name] = abs(update.rule.beta)
            elif name in decay:
                decay[name] *= abs(update.rule.beta)
        smallest = torch.finfo(next(iter(step.before.parameters.values())).dtype).eps
        if step.number <= first and all(value < smallest for value in decay.values()):
            return step.number
    return 0


def choose_samples(
    source: Source,
    last: int,
    loss: SampleLoss | None,
    data: Data | None,
    samples: Iterable[int] | None,
    partition: Any,
) -> SampleAxis:
    """The sample axis: every training index of the steps before `last`, or those asked for, or a partition's labels.

    Raises ValueError for what the record lacks, with the remedy.
    """
    if loss is None:
        raise ValueError("influences of samples need sample_loss=: (model, batch) → unreduced losses (N,)")
    found: set[int] = set()
    for number, batch in source.indices(last):
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
        found |= set(batch.index.tolist())
    if not found:
        raise ValueError(
            "the run has no record of its batches; in training, call tracker.batch(batch, index=…) for each"
        )
    if samples is not None:
        wanted = [int(index) for index in samples]
        if set(wanted) - found:
            raise ValueError(
                f"no step before {last} saw the samples {sorted(set(wanted) - found)[:10]}; those of {len(found)} "
                f"indices, {min(found)} to {max(found)}, were seen"
            )
        if len(set(wanted)) < len(wanted):
            raise ValueError("samples= names some training indices twice")
    else:
        wanted = sorted(found)
    if partition is None:
        return SampleAxis(loss, data, wanted, {index: place for place, index in enumerate(wanted)}, False)
    label = {index: _label_of(partition, index) for index in wanted}
    labels = sorted(set(label.values()), key=lambda value: (str(type(value)), value))
    return SampleAxis(loss, data, labels, {index: labels.index(own) for index, own in label.items()}, True)


def _label_of(partition: Any, index: int) -> Any:
    try:
        value = partition[index]
    except LookupError:
        raise ValueError(f"partition= has no label for the training sample {index}, partition[{index}]") from None
    return value.item() if isinstance(value, Tensor | np.generic) else value
