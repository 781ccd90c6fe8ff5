"""Training in several processes under DistributedDataParallel: rank zero explains, shows and records for all.

Every optimizer sees the mean of the ranks' gradients, so every rank takes the same step, and rank zero explains it
without a word from the others. They tell it of their batches, for the record, and of the influences of their samples.
In the step, a sample weighs what it weighs in its rank's loss, divided by the number of ranks.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from explaind_track.core import distributed
from explaind_track.core.modules import parameters_of, without_wrapper

Item = TypeVar("Item")


class Ranks:
    """The processes that train one model together: those of its DistributedDataParallel, or this one alone."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model whose parameters are in pieces, or that not all processes train together."""
        model = without_wrapper(model)
        self._wrapped = model if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model if self._wrapped is None else without_wrapper(self._wrapped.module)
        """Without its wrappers, DistributedDataParallel's and the compiler's."""
        _refuse_pieces(self.model)

        if self._wrapped is not None and dist.get_world_size(self._wrapped.process_group) != distributed.processes():
            raise ValueError(
                f"the model is trained by {dist.get_world_size(self._wrapped.process_group)} of the "
                f"{distributed.processes()} processes; a Tracker needs a DistributedDataParallel of all of them"
            )

    @property
    def count(self) -> int:
        return 1 if self._wrapped is None else distributed.processes()

    @property
    def rank(self) -> int:
        return 0 if self._wrapped is None else distributed.rank()

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value."""
        return [value] if self._wrapped is None else distributed.gather(value)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks."""
        if self._wrapped is not None:
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


def _known(module: str, name: str) -> tuple[type, ...]:
    """A module's class, for isinstance; none where nobody has imported the module, which would take half a second."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _refuse_pieces(model: nn.Module) -> None:
    """Raises ValueError for FSDP and tensor parallelism."""
    wrapper = _known("torch.distributed.fsdp", "FullyShardedDataParallel")
    piece = _known("torch.distributed.tensor", "DTensor")
    pieces = [name for name, module in model.named_modules() if isinstance(module, wrapper)]
    pieces += [name for name, parameter in parameters_of(model).items() if isinstance(parameter, piece)]
    if pieces:
        raise ValueError(
            f"parameters are in pieces, one for each process ({', '.join(pieces[:5]) or 'all of them'}); a Tracker "
            "needs them whole: train with DistributedDataParallel instead of FSDP or tensor parallelism"
        )
