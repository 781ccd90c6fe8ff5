"""Tensors: in trees (tuples, lists and mappings, as batches and model inputs are), by name, and their bits."""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Tensors by name: parameters, buffers, gradients, directions."""


def size_in_bytes(tensors: Tensors) -> int:
    """The memory that the tensors' elements take together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def explained_type(dtype: torch.dtype) -> torch.dtype:
    """The type that numbers of a type are explained in: float32 for bfloat16 and float16, for all others their own."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the type that it is explained in: the tensor itself, unless it is of a lower precision."""
    return tensor.to(explained_type(tensor.dtype))


def upcast_all(tensors: Tensors) -> Tensors:
    """Each of them upcast; the same mapping where none is of a lower precision."""
    return tensors if low_precision(tensors) is None else {name: upcast(value) for name, value in tensors.items()}


def low_precision(tensors: Tensors) -> torch.dtype | None:
    """The coarsest of the tensors' types that are explained in a finer one; None where there is none."""
    low = {tensor.dtype for tensor in tensors.values() if explained_type(tensor.dtype) is not tensor.dtype}
    return max(low, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def explained_bytes(tensors: Tensors) -> int:
    """The memory that the tensors take in the types that they are explained in."""
    return sum(tensor.numel() * explained_type(tensor.dtype).itemsize for tensor in tensors.values())


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


def tree_map(
    function: Callable[[Tensor], Any],
    tree: Any,
    other: Callable[[Any], Any] = lambda leaf: leaf,
    is_leaf: Callable[[Any], bool] = lambda node: False,
) -> Any:
    """`function` on every tensor of the tree and `other` on every other leaf, in the same structure.

    Tuples, lists, mappings and dataclasses are gone into, and are of their own classes again; what `is_leaf` says of
    them is a leaf.
    """

    def go(node: Any) -> Any:
        return tree_map(function, node, other, is_leaf)

    if isinstance(tree, Tensor):
        return function(tree)
    if is_leaf(tree):
        return other(tree)
    if isinstance(tree, Mapping):
        return _mapping_like(tree, {key: go(item) for key, item in tree.items()})
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: go(getattr(tree, field.name)) for field in fields(tree) if field.init})
    if isinstance(tree, tuple | list):
        items = [go(item) for item in tree]
        is_named = hasattr(tree, "_fields")  # a named tuple takes its items one by one
        return type(tree)(*items) if is_named else type(tree)(items)
    return other(tree)


def _mapping_like(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the tree's class with these items: made of them, or a copy that is given them; else a dictionary."""
    if type(tree) is dict:
        return items

    def filled() -> Any:
        made: Any = copy(tree)
        for key, item in items.items():
            made[key] = item
        return made

    for make in (lambda: type(tree)(items), filled):  # type: ignore[call-arg]
        try:
            made = make()
            if made.keys() == items.keys() and all(made[key] is item for key, item in items.items()):
                return made
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
            continue
    return items


def tree_tensors(tree: Any) -> list[Tensor]:
    """The tensors of the tree, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    tree_map(note, tree)
    return found


def tree_with(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The same tree with other tensors in the places of its own, in their order."""
    others = iter(tensors)
    return tree_map(lambda _: next(others), tree)


def tree_rows(tree: Any) -> int:
    """The number of rows (length of the first axis) that the tree's tensors share.

    Raises ValueError if they differ, or if there is no row.
    """
    counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in tree_tensors(tree)}
    if not counts:
        raise ValueError(
            f"found no tensor in {type(tree).__name__}: expected a tensor, or tuples, lists, mappings and dataclasses "
            "of tensors, one row for each sample"
        )
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"expected tensors that all have the same, positive number of rows, found {sorted(counts)}")
    return counts.pop()


def tree_take(tree: Any, rows: slice | Tensor) -> Any:
    """These rows of every tensor of the tree, and of everything in it that has an entry for each row (`has_entries`).

    rows: a slice, or their numbers.
    """
    count = tree_rows(tree)

    def entries(leaf: Any) -> Any:
        if not has_entries(leaf, count):
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        chosen = range(count)[rows] if isinstance(rows, slice) else rows.tolist()
        return type(leaf)(leaf[place] for place in chosen)

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]

    return tree_map(take, tree, entries, lambda node: has_entries(node, count))


def tree_slice(tree: Any, start: int, stop: int) -> Any:
    """Rows `[start:stop]` of the tree, see `tree_take`."""
    return tree_take(tree, slice(start, stop))


def has_entries(node: Any, count: int) -> bool:
    """Whether something that is no tensor has an entry for each of `count` rows: an array of NumPy or a list of that
    length without tensors in it, or a tuple of words of that length. Anything else is the same for all rows."""
    if isinstance(node, np.ndarray):
        return node.ndim > 0 and len(node) == count
    if not isinstance(node, list | tuple) or len(node) != count or hasattr(node, "_fields"):
        return False
    if isinstance(node, tuple):
        return all(isinstance(item, str) for item in node)
    return not tree_tensors(node)


def tree_has_entries(tree: Any) -> bool:
    """Whether the tree holds more than its tensors for each row: things that `vmap` cannot take one by one."""
    count, found = tree_rows(tree), False

    def look(leaf: Any) -> Any:
        nonlocal found
        found |= has_entries(leaf, count)
        return leaf

    tree_map(lambda tensor: tensor, tree, look, lambda node: has_entries(node, count))
    return found
