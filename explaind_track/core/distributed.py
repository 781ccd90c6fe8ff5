"""More than one process: who does which share of the work, and everybody's results together.

Nothing happens where `torch.distributed` is not initialized (by `torchrun`, then
`torch.distributed.init_process_group("gloo")`).
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0 on."""
    return dist.get_rank() if processes() > 1 else 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Those that this process does, of items that are the same in all."""
    return items[rank() :: processes()]


def add_up(*arrays: np.ndarray[Any, Any] | Tensor) -> None:
    """Replaces each array by its sum over all processes."""
    if processes() == 1:
        return

    on_gpu = dist.get_backend() == "nccl"  # which adds up nothing elsewhere
    for array in arrays:
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
        total = tensor.cuda() if on_gpu else tensor.contiguous()
        dist.all_reduce(total)
        tensor.copy_(total)


def gather(value: Item) -> list[Item]:
    """Every process's value, by rank."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found
