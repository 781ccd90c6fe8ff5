"""Tensors: in trees (tuples, lists and mappings, as batches and model inputs are), by name, and their bits."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Tensors by name: parameters, buffers, gradients, directions."""


def size_in_bytes(tensors: Tensors) -> int:
    """The memory that the tensors' elements take together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are the same, bit for bit (NaN included)."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory, flat, as integers of its elements' size."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
    return tensor.contiguous().reshape(-1).view(integer)


def cuts(start: int, stop: int, size: int) -> list[slice]:
    """Cuts `start:stop` into slices of at most `size`, in order; only the last is shorter."""
    return [slice(low, min(stop, low + size)) for low in range(start, stop, size)]


# ----------------------------------------------------------------------- trees


def tree_map(function: Callable[[Tensor], Any], tree: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """`function` on every tensor of the tree and `other` on every other leaf, in the same structure."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: tree_map(function, item, other) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        items = [tree_map(function, item, other) for item in tree]
        is_named = hasattr(tree, "_fields")  # a named tuple takes its items one by one
        return type(tree)(*items) if is_named else type(tree)(items)
    return other(tree)


def tree_tensors(tree: Any) -> list[Tensor]:
    """The tensors of the tree, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def tree_rows(tree: Any) -> int:
    """The number of rows (length of the first axis) that the tree's tensors share.

    Raises ValueError if they differ, or if there is no row.
    """
    counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in tree_tensors(tree)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"expected tensors that all have the same, positive number of rows, found {sorted(counts) or 'no tensor'}"
        )
    return counts.pop()


def tree_slice(tree: Any, start: int, stop: int) -> Any:
    """Rows `[start:stop]` of every tensor of the tree."""
    return tree_map(lambda tensor: tensor[start:stop], tree)


def tree_in_dims(tree: Any) -> Any:
    """`in_dims` for `vmap` over the rows of the tree: 0 for tensors, None for other leaves."""
    return tree_map(lambda _: 0, tree, lambda _: None)
