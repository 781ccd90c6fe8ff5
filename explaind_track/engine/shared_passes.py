"""What several passes over the same inputs compute alike is computed once.

Passes at one node of the path differ in the directions that they carry, and repeat the model's own values. Within
`SharedPasses`, an operation on the very tensors that it had before is not done again: bit for bit the same, and nothing
that a direction has a part in is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from explaind_track.core.tensors import Tensors

WORTH_SHARING = 2**23
"""Bytes that a pass writes, above which the model's values are kept: looking an operation up costs 10 μs. It saves
little: a CNN on 400 images of MNIST in 4 groups took 149 ms a step instead of 152 (one thread); and in small passes it
costs more than it saves."""

NOWHERE = 0
"""The place in memory of what has none, such as a tensor without entries."""


class SharedPasses(TorchDispatchMode):
    """Keeps what operations give, by what they were given, while passes run at one node."""

    def __init__(self) -> None:
        super().__init__()
        self._own = {NOWHERE}
        """Memory that holds what a direction has a part in, or that was written over."""
        self._kept: dict[Any, Any] = {}
        self._held: list[Any] = []
        """Whatever keys stand for, so that no other tensor takes its place in memory."""

    def without(self, tangents: Tensors) -> "SharedPasses":
        """For a pass in these directions: what they have a part in is its own."""
        self._own.update(map(_place, tangents.values()))
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, or gives what it gave before."""
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs)]
        if func._schema.is_mutable or any(_place(tensor) in self._own for tensor in given):
            found = func(*args, **kwargs)
            self._own.update(map(_place, _tensors(found)))
            if func._schema.is_mutable:
                self._own.update(map(_place, given))
            return found

        # what makes tensors of nothing is as quick as to look it up, and so are views
        if not given or func.is_view or torch.Tag.nondeterministic_seeded in func.tags:
            return func(*args, **kwargs)

        key = (func, _key((args, kwargs)))
        if key in self._kept and not any(_place(tensor) in self._own for tensor in _tensors(self._kept[key])):
            return self._kept[key]
        found = func(*args, **kwargs)
        self._kept[key] = found
        self._held.append(given)
        return found


def _place(tensor: Tensor) -> int:
    """Where in memory its numbers lie; NOWHERE for tensors of another kind."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    is_plain = is_plain and not tensor._is_zerotensor() and not is_functorch_wrapped_tensor(tensor)
    return tensor.untyped_storage().data_ptr() if is_plain else NOWHERE


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of an operation's arguments, or of what it gives."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _key(given: Any) -> Any:
    """Tells one operation's arguments from another's: a tensor by its place in memory, a number by its type too."""
    if isinstance(given, Tensor):
        return given.data_ptr(), given.shape, given.stride(), given.dtype
    if isinstance(given, tuple | list):
        return tuple(map(_key, given))
    if isinstance(given, dict):
        return tuple((name, _key(value)) for name, value in given.items())
    return type(given), repr(given)
