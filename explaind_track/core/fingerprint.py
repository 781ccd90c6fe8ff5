"""The fingerprint of a tensor: a few numbers that tell, in the place of a copy, whether it has been written to."""

import torch
from torch import Tensor

WHOLE = 2**16
"""Bytes up to which a tensor is kept itself."""

COLUMNS = 512
"""Words in a row of those that are added up."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Of a small tensor, its bits. Of another, these as words of 64 bits in rows: the sum of every row and of every
    column, modulo 2⁶⁴.

    So any one entry that is changed shows, and all that a loop does to weights (scaled, clamped, averaged, pruned,
    exchanged, turned around): a change is missed only where it cancels in each row and in each column to the bit.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    size = len(flat) // 8 * 8
    if len(flat) <= WHOLE or flat.storage_offset() % 8:
        return flat.clone()

    words = flat[:size].view(torch.int64)
    rows = len(words) // COLUMNS
    table = words[: rows * COLUMNS].view(rows, COLUMNS)
    rest = words[rows * COLUMNS :], flat[size:].to(torch.int64)
    return torch.cat([table.sum(0), table.sum(1), *rest])
