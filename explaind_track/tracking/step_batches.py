"""The batches of the step at hand, as the training loop tells of them, and what they weigh in the step's gradient."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.alterations import Alteration, Alterations
from explaind_track.core.checks import as_tensor, plain_number, require_finite, require_number, require_one_of, words
from explaind_track.core.rng import random_state
from explaind_track.core.step import Batch, ids_of, number_of_id
from explaind_track.core.tensors import tree_map, tree_rows, tree_tensors
from explaind_track.tracking.ddp import Ranks


@dataclass(frozen=True)
class GradientChange:
    """Something that was done to a step's gradient as a whole."""

    how: Alteration
    factor: float
    batches: int
    """How many of the step's batches were in the gradient then."""
    seen: bool
    """Whether the Tracker has seen it by itself, and the loop has not told of it."""


@dataclass
class StepBatches:
    """The batches of a single step. Before the optimizer takes it, `exchange` brings together those of all ranks."""

    local: list[Batch] = field(default_factory=list)
    """This rank's batches. A sample's weight is that in the rank's loss, and after `exchange` that in the step."""
    of_all_ranks: tuple[Batch, ...] = ()
    """Known after `exchange`."""
    norms: dict[int, float] = field(default_factory=dict)
    """By training index: the norms of the samples' gradients, where these were taken one by one."""
    loss: float | None = None
    """The step's loss, where `Tracker.backward` has computed it; after `exchange`, the mean over the ranks."""
    ids: dict[int, str] = field(default_factory=dict)
    """By training index: the names of samples that the loop names by words; after `exchange`, those of all ranks."""
    changes: list["GradientChange"] = field(default_factory=list)
    """What the loop has done to the gradient, in that order."""

    @property
    def clip(self) -> float:
        """The factor that the gradient was clipped by."""
        return prod(change.factor for change in self.changes)

    def change(self, how: Alteration, factor: float = 1.0, seen: bool = False) -> None:
        """Notes what was done to the gradient of the batches so far.

        factor: for the weights of their samples. seen: see `GradientChange`.
        """
        self.changes.append(GradientChange(how, factor, len(self.local), seen))

    def forget_seen_changes(self) -> None:
        """Where the loop tells of what it did, that is the whole of it."""
        self.changes = [change for change in self.changes if not change.seen]

    def _apply_changes(self) -> None:
        """Lets the samples' weights take on the factors."""
        for change in self.changes:
            for place, batch in enumerate(self.local[: change.batches]):
                altered = (batch.altered or Alterations(batch.weight)).then(change.how)
                is_sum = change.how.kind in ("norm", "factor")
                self.local[place] = replace(
                    batch, altered=altered, weight=batch.weight * change.factor, clipped=batch.clipped or not is_sum
                )

    def forget_unused_randomness(self, device: torch.device) -> None:
        """Drops the random states of batches during whose passes nothing random was drawn."""
        states = [*(batch.random_state for batch in self.local), random_state(device)]
        for place, (start, end) in enumerate(pairwise(states)):
            if all(torch.equal(start[name], end[name]) for name in start):
                self.local[place] = replace(self.local[place], random_state={})

    def exchange(self, ranks: Ranks) -> None:
        """Brings together the batches, norms and losses of all ranks; every rank calls it."""
        self._apply_changes()

        # the optimizer sees the mean of the ranks' gradients
        self.local = [_shared(batch, ranks.count) for batch in self.local]
        self.of_all_ranks = tuple(self.local)
        if ranks.count == 1 or ranks.shards is not None:  # of which nobody explains samples
            self.ids = ids_of(self.of_all_ranks)
            return

        gathered = ranks.gather(([_for_others(batch) for batch in self.local], self.norms, self.loss))
        self.of_all_ranks = tuple(
            batch
            for rank, (batches, *_) in enumerate(gathered)
            for batch in (self.local if rank == ranks.rank else batches)
        )
        self.ids = ids_of(self.of_all_ranks)
        self.norms = {index: norm for _, norms, _ in gathered for index, norm in norms.items()}
        losses = [loss for *_, loss in gathered if loss is not None]
        self.loss = sum(losses) / len(losses) if losses else None


def _shared(batch: Batch, ranks: int) -> Batch:
    """The batch with its weights in the mean of so many ranks' losses."""
    altered = batch.altered and replace(batch.altered, loss_weight=batch.altered.loss_weight / ranks)
    return replace(batch, weight=batch.weight / ranks, altered=altered)


def _for_others(batch: Batch) -> Batch:
    """The batch as other ranks are told of it: with its samples only where no index names them."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()

    return replace(
        batch,
        weight=tree_map(moved, batch.weight),
        altered=tree_map(moved, batch.altered),
        index=None if batch.index is None else moved(batch.index),
        data=tree_map(moved, batch.data) if batch.index is None else None,
    )


def make_batch(data: Any, index: Any, weight: Any, device: torch.device) -> Batch:
    """A batch as `Tracker.batch` is told of it.

    Raises ValueError if its parts disagree about the number of samples, or are not finite; TypeError for an index that
    names no samples, and for weights that are no numbers.
    """
    size = tree_rows(data)
    if any(tensor.device != device for tensor in tree_tensors(data)):
        data = tree_map(lambda tensor: tensor.to(device), data)
    ids = words("index=", index)
    numbers = index if ids is None else [number_of_id(name) for name in ids]
    return Batch(size, _weight_of(weight, size), _index_of(numbers, size), data, random_state(device), ids=ids)


def _index_of(index: Any, size: int) -> Tensor | None:
    """The index as int64."""
    if index is None:
        return None
    found = as_tensor("index=", index)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype is torch.bool:
        raise TypeError(
            f"index= names the batch's training samples by whole numbers, not by {found.dtype}: pass their numbers in "
            "the training set, (N,) int64"
        )
    if found.shape != (size,):
        raise ValueError(f"index must name the batch's {size} samples, ({size},), not {tuple(found.shape)}")
    return found.long()


def _weight_of(weight: Any, size: int) -> Tensor | float:
    """The weight as a number, or a tensor (N,)."""
    if isinstance(weight, str):
        require_one_of("weight= (or numbers)", weight, ("mean", "sum"))
        return 1.0 / size if weight == "mean" else 1.0

    weight = plain_number(weight)
    if not isinstance(weight, Iterable):
        return require_number("weight=", weight)
    found = as_tensor("weight=", weight)
    if found.shape != (size,):
        raise ValueError(f"weight must have one number for each of the {size} samples, not {tuple(found.shape)}")
    if found.dtype.is_complex:
        raise TypeError(f"weight= holds real numbers, not {found.dtype}")
    require_finite("weight=", found)
    return found
