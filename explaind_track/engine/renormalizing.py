"""Embeddings with `max_norm`, whose forward pass shortens rows of their weight in place: not in a pass of ours.

A row w that is looked up becomes `w · min(1, m / ‖w‖)`. The model's prediction is a function of that, so queries are
differentiated through it. Training's gradient is the one behind it, at rows that have been shortened already, as the
step begins with them; so samples' losses are not.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Embedding = nn.Embedding | nn.EmbeddingBag


def renormalizing(model: nn.Module) -> list[Embedding]:
    """The modules of the model that write to their weight in the forward pass."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]


@contextmanager
def written_to_nothing(modules: Sequence[Embedding]) -> Iterator[None]:
    """The modules give what they gave, and leave their weight as it is."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_replaced_forward(module))
        yield


@contextmanager
def _replaced_forward(module: Embedding) -> Iterator[None]:
    inner: Any = module  # whose method is set aside for a while
    given = inner.__dict__.get("forward")

    def forward(*arguments: Any, **named: Any) -> Any:
        limit, weight = inner.max_norm, inner.weight
        inner.max_norm = None
        inner._parameters["weight"] = _shortened(weight, limit, inner.norm_type, differentiable=not inner.training)
        try:
            return type(inner).forward(inner, *arguments, **named)
        finally:
            inner.max_norm, inner._parameters["weight"] = limit, weight

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward
        if given is not None:
            inner.forward = given


def _shortened(weight: Tensor, limit: float, norm_type: float, differentiable: bool) -> Tensor:
    """Every row as it would be looked up, (V, d)."""
    norms = torch.linalg.vector_norm(weight, norm_type, dim=1, keepdim=True)
    # torch's own arithmetic
    scale = torch.where(norms > limit, limit / (norms + 1e-7), 1.0)
    return weight * (scale if differentiable else scale.detach())
