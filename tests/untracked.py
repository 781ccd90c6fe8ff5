"""A loop without its Tracker, and how the two are compared."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class NoTracker:
    """Stands where a Tracker would, and does what its author would do without one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self) -> Any:
        return nullcontext()

    def batch(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def clip_grad_norm_(self, limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def clip_grad_value_(self, limit: float) -> None:
        nn.utils.clip_grad_value_(self.model.parameters(), limit)


def bits(tree: Any) -> list[Tensor]:
    """All tensors and numbers of a tree of mappings and lists, in order."""
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in bits(value)]
    if isinstance(tree, list | tuple):
        return [tensor for value in tree for tensor in bits(value)]
    return [torch.as_tensor(tree)] if isinstance(tree, Tensor | float | int) else []


def compare_trained(plain: tuple[nn.Module, Any], tracked: tuple[nn.Module, Any]) -> None:
    """Asserts that model and optimizer are the same, bit for bit, after training without a Tracker and with one."""
    for one, two in zip(plain, tracked, strict=True):
        wanted, found = bits(one.state_dict()), bits(two.state_dict())
        assert len(wanted) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))

    models = plain[0], tracked[0]
    assert [module.training for module in models[0].modules()] == [m.training for m in models[1].modules()]
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.requires_grad == two.requires_grad
        assert (one.grad is None) == (two.grad is None)
