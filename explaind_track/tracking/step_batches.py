"""The batches of the step at hand, as the training loop tells of them, and what they weigh in the step's gradient."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.rng import random_state
from explaind_track.core.step import Batch
from explaind_track.core.tensors import tree_map, tree_rows
from explaind_track.tracking.ddp import Ranks


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
    clip: float = 1.0
    """The factor that the gradient was clipped by."""

    def clip_by_norm(self, factor: float) -> None:
        self.clip = factor
        self.local = [replace(batch, weight=batch.weight * factor) for batch in self.local]

    def clip_by_value(self) -> None:
        self.local = [replace(batch, clipped=True) for batch in self.local]

    def forget_unused_randomness(self, device: torch.device) -> None:
        """Drops the random states of batches during whose passes nothing random was drawn."""
        states = [*(batch.random_state for batch in self.local), random_state(device)]
        for place, (start, end) in enumerate(pairwise(states)):
            if all(torch.equal(start[name], end[name]) for name in start):
                self.local[place] = replace(self.local[place], random_state={})

    def exchange(self, ranks: Ranks) -> None:
        """Brings together the batches, norms and losses of all ranks; every rank calls it."""
        # the optimizer sees the mean of the ranks' gradients
        self.local = [replace(batch, weight=batch.weight / ranks.count) for batch in self.local]
        self.of_all_ranks = tuple(self.local)
        if ranks.count == 1:
            return

        gathered = ranks.gather(([_for_others(batch) for batch in self.local], self.norms, self.loss))
        self.of_all_ranks = tuple(
            batch
            for rank, (batches, *_) in enumerate(gathered)
            for batch in (self.local if rank == ranks.rank else batches)
        )
        self.norms = {index: norm for _, norms, _ in gathered for index, norm in norms.items()}
        losses = [loss for *_, loss in gathered if loss is not None]
        self.loss = sum(losses) / len(losses) if losses else None


def _for_others(batch: Batch) -> Batch:
    """The batch as other ranks are told of it: with its samples only where no index names them."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()

    return replace(
        batch,
        weight=moved(batch.weight) if isinstance(batch.weight, Tensor) else batch.weight,
        index=None if batch.index is None else moved(batch.index),
        data=tree_map(moved, batch.data) if batch.index is None else None,
    )


def make_batch(data: Any, index: Tensor | None, weight: Tensor | float | str, device: torch.device) -> Batch:
    """A batch as `Tracker.batch` is told of it. Raises ValueError if its parts disagree about the number of samples."""
    size = tree_rows(data)
    if index is not None and index.shape != (size,):
        raise ValueError(f"index must name the batch's {size} samples, ({size},), not {tuple(index.shape)}")

    if isinstance(weight, str):
        if weight not in ("mean", "sum"):
            raise ValueError(f'weight is "mean", "sum", a number or a tensor (N,), not {weight!r}')
        weight = 1.0 / size if weight == "mean" else 1.0
    elif isinstance(weight, Tensor) and weight.shape != (size,):
        raise ValueError(f"weight must have one number for each of the {size} samples, not {tuple(weight.shape)}")
    return Batch(size, weight, index, data, random_state(device))
