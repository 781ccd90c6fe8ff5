"""Training in several processes: rank zero shows and records for all.

Under DistributedDataParallel, every optimizer sees the mean of the ranks' gradients, so every rank takes the same step,
and rank zero explains it without a word from the others. They tell it of their batches, for the record, and of the
influences of their samples. In the step, a sample weighs what it weighs in its rank's loss, divided by the number of
ranks.

Where parameters are in pieces (`fully_shard`, tensor parallelism), every rank explains its own; see `core.shards`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from explaind_track.core import distributed
from explaind_track.core.modules import without_wrapper
from explaind_track.core.shards import Shards, known, reshard

Item = TypeVar("Item")


class Ranks:
    """The processes that train one model together: those of its DistributedDataParallel, those that hold its pieces, or
    this one alone."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model that not all processes train together, or that FSDP of the first kind holds."""
        model = without_wrapper(model)
        self._wrapped = model if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model if self._wrapped is None else without_wrapper(self._wrapped.module)
        """Without its wrappers, DistributedDataParallel's and the compiler's."""
        refuse_flat_parameters(self.model)
        reshard(self.model)
        self.shards = Shards.of(self.model)
        """Who holds which pieces of the parameters; None where all hold the whole of them."""
        if self._wrapped is not None and self.shards is not None:
            raise ValueError(
                "a DistributedDataParallel is around parameters in pieces: give fully_shard a mesh of two dimensions, "
                "which it replicates over the first, in the place of DistributedDataParallel"
            )

        if self._wrapped is not None and dist.get_world_size(self._wrapped.process_group) != distributed.processes():
            raise ValueError(
                f"the model is trained by {dist.get_world_size(self._wrapped.process_group)} of the "
                f"{distributed.processes()} processes; a Tracker needs a DistributedDataParallel of all of them"
            )

    @property
    def _is_alone(self) -> bool:
        return self._wrapped is None and self.shards is None

    @property
    def count(self) -> int:
        return 1 if self._is_alone else distributed.processes()

    @property
    def rank(self) -> int:
        return 0 if self._is_alone else distributed.rank()

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value."""
        return [value] if self._is_alone else distributed.gather(value)

    def together(self, names: Sequence[str]) -> list[str]:
        """The names that any of the processes has found which hold pieces of the parameters."""
        if self.shards is None or not self._anywhere(bool(names)):
            return list(names)
        return list(dict.fromkeys(name for own in self.gather(list(names)) for name in own))

    def all_succeed(self, action: Callable[[], Item]) -> Item:
        """Runs `action`. Where parameters are in pieces and it fails for those of another process, it fails here."""
        failure: Exception | None = None
        try:
            found = action()
        except Exception as error:
            failure = error

        if self.shards is not None and self._anywhere(failure is not None):
            reasons = self.gather(None if failure is None else repr(failure))
            if failure is None:
                rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
                raise RuntimeError(f"rank {rank} could not go on: {reason}")
        if failure is not None:
            raise failure
        return found

    def _anywhere(self, found: bool) -> bool:
        flag = torch.tensor(float(found))
        distributed.add_up(flag)
        return bool(flag)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks."""
        if not self._is_alone:
            distributed.add_up(*tensors)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Does to the gradients what DistributedDataParallel does after a backward pass; nothing in its `no_sync()`."""
        if self._wrapped is not None and self._wrapped.require_backward_grad_sync:
            distributed.add_up(*gradients)
            for gradient in gradients:
                gradient.div_(self.count)

    def at_zero(self, action: Callable[[], Item]) -> Item | None:
        """Runs `action` on rank zero alone. Returns its result there, None elsewhere.

        Where it fails, all ranks do, so that none waits for the others.
        """
        found, failure = None, None
        if self.rank == 0:
            try:
                found = action()
            except Exception as error:
                failure = error

        reason = self.gather(None if failure is None else repr(failure))[0]
        if failure is not None:
            raise failure
        if reason is not None:
            raise RuntimeError(f"rank zero could not go on: {reason}")
        return found

    def from_zero(self, action: Callable[[], Item]) -> Item:
        """Runs `action` on rank zero alone, and returns its result everywhere; where it fails, all ranks do."""
        return self.gather(self.at_zero(action))[0]  # type: ignore[return-value]  # rank zero's, which has one

    def refuse_others(self) -> None:
        """Raises RuntimeError for all but rank zero."""
        if self.rank:
            raise RuntimeError(f"rank zero explains for all, and this is rank {self.rank}: ask there")

    def refuse_uneven_steps(self) -> None:
        """Raises RuntimeError inside of `join()`, where ranks without batches take no steps."""
        if self._wrapped is not None and self._wrapped._join_config.enable:
            raise RuntimeError(
                "in DistributedDataParallel.join(), ranks that have no more batches take no part in a step, and the "
                "Tracker would wait for them; give all ranks as many batches (a DistributedSampler does), of any size"
            )

    def refuse_common_statistics(self) -> None:
        """Raises ValueError where a sample's loss depends on samples of other ranks."""
        for name, module in self.model.named_modules():
            if self._wrapped is not None and isinstance(module, nn.SyncBatchNorm):
                raise ValueError(
                    f"'{name}' normalises with the statistics of all ranks' batches, so no rank knows the loss of its "
                    "samples alone; leave sample_loss= out (influences of groups stay exact), or use BatchNorm without "
                    "convert_sync_batchnorm"
                )


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raises ValueError for FSDP of the first kind."""
    wrapper = known("torch.distributed.fsdp", "FullyShardedDataParallel")
    found = [name or "the model" for name, module in model.named_modules() if isinstance(module, wrapper)]
    if found:
        raise ValueError(
            f"FullyShardedDataParallel holds the parameters of {', '.join(found[:5])} as one flat tensor, in which "
            "nobody finds a group's: shard by torch.distributed.fsdp.fully_shard, its successor (Accelerate: "
            'fsdp_version=2; transformers: fsdp_config={"fsdp_version": 2}; Lightning: ModelParallelStrategy)'
        )
