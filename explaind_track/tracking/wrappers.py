"""What Accelerate and Lightning put around an optimizer or a model: taken off, and asked whether a step is put off."""

from typing import Any

import torch
from torch import nn

OPTIMIZERS = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}
MODELS = {"_FabricModule"}


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that takes the steps, whose hooks are called and whose class has a rule."""
    while _is_one_of(optimizer, OPTIMIZERS):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def plain_model(model: Any) -> nn.Module:
    """The module that was given to Fabric, whose parameters have their plain names."""
    while _is_one_of(model, MODELS):
        model = model.module
    return model  # type: ignore[no-any-return]


def puts_off_steps(optimizer: Any) -> bool:
    """Whether `step()` and `zero_grad()` do nothing just now, as within `accelerator.accumulate()` between steps."""
    state = getattr(optimizer, "gradient_state", None) if _is_one_of(optimizer, OPTIMIZERS) else None
    return state is not None and not state.sync_gradients


def _is_one_of(wrapper: object, names: set[str]) -> bool:
    """By the names of its classes: whoever has such a wrapper has imported its package, and we need not."""
    return not names.isdisjoint(cls.__name__ for cls in type(wrapper).__mro__)
