"""The axis of training samples: which of them are asked for, where they lie along it, and how to get at them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_track.core.checks import require_names, whole_numbers, words
from explaind_track.core.step import Batch, Step, number_of_id
from explaind_track.core.tensors import cuts, tree_map, tree_rows, tree_take
from explaind_track.engine.batch_losses import SampleLoss, upcast_batch
from explaind_track.explanation.digests import Digest
from explaind_track.explanation.step_source import RepeatableSteps

SAMPLE_AXES = ("step", "seen", "group", "query", "output", "sample")
"""The axes of sample influences in their order. `step`: at which the influence acts; `seen`: whose batch the sample was
in, through whose gradient it acts then and later."""

DATA_PIECE = 256
"""The samples whose data are hashed at once."""

Array = np.ndarray[Any, Any]

Data = Callable[[Any], Any]
"""`data(index)` → the batch of the training samples of these indices, (N,) int64, as `sample_loss` takes it; where the
loop has named samples by words, `index` is the list of their names."""


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
    """The step's batches, each with its samples on the device of the parameters, and in float32 where the step is."""
    device = next(iter(step.before.parameters.values())).device
    for batch in step.batches:
        found = with_data(batch, data, device)
        yield found if step.precision is None else upcast_batch(found)


def with_data(batch: Batch, data: Data | None, device: torch.device) -> Batch:
    """The batch with its samples, on this device."""
    samples = batch.data
    if samples is None and data is not None:
        samples = data(batch.index if batch.ids is None else list(batch.ids))
    samples = tree_map(lambda tensor: tensor.to(device), samples)
    if tree_rows(samples) != batch.size:
        raise ValueError(f"data(index) gave {tree_rows(samples)} samples for {batch.size} indices")
    return replace(batch, data=samples)


def chosen_rows(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen samples of a batch, (N,) true or false."""
    where = chosen.nonzero()[:, 0]
    assert batch.index is not None  # looked at before work started
    weight = batch.weight[where.to(batch.weight.device)] if isinstance(batch.weight, Tensor) else batch.weight
    data = tree_take(batch.data, where)
    return Batch(len(where), weight, batch.index[where.to(batch.index.device)], data, batch.random_state)


def choose_samples(
    source: RepeatableSteps,
    loss: SampleLoss,
    data: Data | None,
    samples: Iterable[int | str] | None,
    partition: Any = None,
) -> SampleAxis:
    """The sample axis: every training index of the steps before the window's end, or those asked for, or a partition's
    labels.

    Raises ValueError for what the record lacks, with the remedy.
    """
    names = choose_indices(source, data, samples)
    if partition is None:
        return SampleAxis(loss, data, list(names.values()), {index: place for place, index in enumerate(names)})

    label = {index: _label_of(partition, name) for index, name in names.items()}
    labels = sorted(set(label.values()), key=lambda value: (str(type(value)), value))
    place = {value: place for place, value in enumerate(labels)}
    return SampleAxis(loss, data, labels, {index: place[value] for index, value in label.items()}, partition=True)


def choose_indices(source: RepeatableSteps, data: Data | None, samples: Iterable[int | str] | None) -> dict[int, Any]:
    """The training samples that the steps before the window's end saw, sorted; or those of `samples`, as they come. By
    index, their names: words, where the loop has named them so, or the index.

    Raises ValueError for batches without indices or data, and for samples that no step saw.
    """
    seen: dict[int, Any] = {}
    for number, batch in source.batches():
        _require_samples(number, batch, data)
        assert batch.index is not None  # has just been looked at
        index = batch.index.tolist()
        seen.update(zip(index, index if batch.ids is None else batch.ids, strict=True))
    if not seen:
        raise ValueError(
            "the run has no record of its batches; in training, call tracker.batch(batch, index=…) for each"
        )

    if samples is None:
        return dict(sorted(seen.items(), key=lambda item: (isinstance(item[1], str), item[1])))

    named, wanted = words("samples=", samples), dict[int, Any]()
    if named is None:
        wanted = {index: seen.get(index) for index in whole_numbers("samples=", samples)}
    else:
        wanted = {number_of_id(name): name for name in require_names("samples=", named, "sample")}
    lacking = [index if name is None else name for index, name in wanted.items() if index not in seen]
    if lacking:
        of_all = sorted(seen.values(), key=lambda name: (isinstance(name, str), name))
        raise ValueError(
            f"no step before {source.last} saw the samples {lacking[:10]}; those of {len(seen)} "
            f"indices, {of_all[0]!r} to {of_all[-1]!r}, were seen"
        )
    return wanted


def data_digest(source: RepeatableSteps, data: Data | None) -> Digest:
    """Of the samples that `data` gives for all that the steps before the window's end saw, whatever gives them."""
    digest, names = Digest(), dict[int, Any]()
    if data is None:
        return digest  # the record has them

    for _, batch in source.batches():
        assert batch.index is not None  # looked at before work started
        index = batch.index.tolist()
        names.update(zip(index, index if batch.ids is None else batch.ids, strict=True))

    wanted = sorted(names.items())
    numbers, ids = ([name for _, name in wanted if isinstance(name, str) is word] for word in (False, True))
    for some in (*map(torch.tensor, _pieces(numbers)), *_pieces(ids)):
        piece = Digest().add(data(some), "data(…)")  # one by one: a Digest holds on to what it has seen
        digest.add(piece.hex, "data(…)").unknown.extend(piece.unknown)
    return digest


def _pieces(names: Sequence[Any]) -> list[Sequence[Any]]:
    return [names[part] for part in cuts(0, len(names), DATA_PIECE)]


def labels_of(names: Sequence[Any]) -> Array:
    """The labels along the axis: whole numbers, or whatever else the samples or their parts are called."""
    numeric = all(isinstance(name, int | np.integer) for name in names)
    return np.array(names, dtype=np.int64 if numeric else object)


def _require_samples(number: int, batch: Batch, data: Data | None) -> None:
    """Raises ValueError unless the batch's samples have names and can be had, and their sum is the step's gradient."""
    if batch.clipped:
        raise ValueError(
            f"the gradient of step {number} was clipped by value, or changed in a part of it alone, and what is left "
            "is no sum over samples; clip all of it by its norm, or explain groups and steps only"
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


def _label_of(partition: Any, name: int | str) -> Any:
    try:
        value = partition[name]
    except (LookupError, TypeError):
        raise ValueError(f"partition= has no label for the training sample {name}, partition[{name!r}]") from None
    return value.item() if isinstance(value, Tensor | np.generic) else value
