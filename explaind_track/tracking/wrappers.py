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


def plain_model(model: Any, has_samples: bool) -> nn.Module:
    """The module that was given to Fabric, whose parameters have their plain names.

    Raises ValueError where samples' losses are asked for, which Fabric computes in another precision than the module.
    """
    while _is_one_of(model, MODELS):
        precision = type(model._strategy.precision).__name__
        if has_samples and precision != "Precision":
            raise ValueError(
                f"Fabric runs the model in a precision of its choice ({precision}), which sample_loss= cannot follow: "
                "pass the module itself, fabric_model.module, and a sample_loss that converts its inputs and enters "
                "autocast as Fabric does, or leave sample_loss= out (influences of groups are exact)"
            )
        model = model.module
    return model  # type: ignore[no-any-return]


def puts_off_steps(optimizer: Any) -> bool:
    """Whether `step()` and `zero_grad()` do nothing just now, as within `accelerator.accumulate()` between steps."""
    state = getattr(optimizer, "gradient_state", None) if _is_one_of(optimizer, OPTIMIZERS) else None
    return state is not None and not state.sync_gradients


def _is_one_of(wrapper: object, names: set[str]) -> bool:
    """By the names of its classes: whoever has such a wrapper has imported its package, and we need not."""
    return not names.isdisjoint(cls.__name__ for cls in type(wrapper).__mro__)
