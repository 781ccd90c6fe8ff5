"""Clipping by `torch.nn.utils`, seen where a step is open: by the loop itself, and by Accelerate, Fabric, Lightning and
transformers, who call it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import unwrap
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils

from explaind_track.core.alterations import Alteration
from explaind_track.core.shards import is_piece, whole

Tell = Callable[[list[Tensor], Alteration, Callable[[], float]], None]
"""`tell(parameters, how, factor)`: what was done to their gradients; unless each of their numbers was cut by itself,
they were multiplied by `factor()`, which may have to wait for the device."""

_listeners: list[Tell] = []
"""Those of the steps that are open."""

_last_norm: tuple[Tensor, float] | None = None
"""The norm that torch has computed last, and its order."""


@contextmanager
def seeing_clipping(tell: Tell) -> Iterator[None]:
    """Tells of every clipping within."""
    _stand_before_torch()
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


@contextmanager
def unseen() -> Iterator[None]:
    """Tells nobody of a clipping within."""
    heard, _listeners[:] = list(_listeners), []
    try:
        yield
    finally:
        _listeners[:] = heard


_TORCHS: tuple[Any, ...] = (utils.get_total_norm, utils.clip_grads_with_norm_, utils.clip_grad_value_)
_total_norm, _clip, _clip_value = map(unwrap, _TORCHS)


@cache
def _stand_before_torch() -> None:
    """Lets torch's functions call those below.

    They may have been imported by their names before, so that nothing could take their place; but what they call in
    their turn, without gradients, can be another. In a torch that does it otherwise, clipping goes unseen: the check of
    the samples tells of it then.
    """
    for function, ours in zip(_TORCHS, (_note_norm, _clip_with_norm, _clip_by_value), strict=True):
        if function is not unwrap(function) and "func" in function.__code__.co_freevars:
            function.__closure__[function.__code__.co_freevars.index("func")].cell_contents = ours


def _note_norm(tensors: Any, norm_type: float = 2.0, *others: Any, **named: Any) -> Tensor:
    global _last_norm
    norm: Tensor = _total_norm(tensors, norm_type, *others, **named)
    if _listeners and not torch.compiler.is_compiling():
        _last_norm = norm, float(norm_type)
    return norm


def _clip_with_norm(parameters: Any, max_norm: float, total_norm: Tensor, *others: Any, **named: Any) -> None:
    if not _listeners or torch.compiler.is_compiling():
        _clip(parameters, max_norm, total_norm, *others, **named)
        return

    clipped = _listed(parameters)
    _clip(clipped, max_norm, total_norm, *others, **named)
    if isfinite(max_norm):  # else only the norm is asked for
        # a rerun, whose gradient is another, clips to the norm anew, if it is of the second order
        is_usual = _last_norm is not None and _last_norm[0] is total_norm and _last_norm[1] == 2.0
        how = Alteration("norm" if is_usual else "factor", float(max_norm))
        for tell in _listeners:
            tell(clipped, how, lambda: factor_of(float(max_norm), total_norm))


def _clip_by_value(parameters: Any, clip_value: float, *others: Any, **named: Any) -> None:
    if not _listeners or torch.compiler.is_compiling():
        _clip_value(parameters, clip_value, *others, **named)
        return

    clipped = _listed(parameters)
    gradients = [p.grad for p in clipped if p.grad is not None]
    # of pieces, only all processes together could tell
    acts = any(is_piece(gradient) or bool((gradient.abs() > clip_value).any()) for gradient in gradients)
    _clip_value(clipped, clip_value, *others, **named)
    if acts:
        for tell in _listeners:
            tell(clipped, Alteration("value", float(clip_value)), lambda: 1.0)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def factor_of(max_norm: float, norm: Tensor) -> float:
    """What torch multiplies a gradient by that it clips to a norm."""
    return min(1.0, max_norm / (float(whole(norm)) + 1e-6))
