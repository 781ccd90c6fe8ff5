"""The optimizer that a checkpoint has saved: its class, settings and state, and the real one made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.checks import first_few
from explaind_track.core.modules import parameters_of
from explaind_track.core.rules import require_rule
from explaind_track.errors import CheckpointError

State = Mapping[str, Any]
"""A parameter's state: tensors and numbers by their names, as torch's optimizers hold them."""


@dataclass(frozen=True)
class SavedOptimizer:
    """What a checkpoint holds of its optimizer."""

    kind: type[torch.optim.Optimizer]
    groups: list[dict[str, Any]]
    """The settings of each group as of the next step, and in `params` the names of its parameters."""
    state: Mapping[str, State]
    """By parameter; read when it is asked for."""
    warnings: list[str] = field(default_factory=list)
    """What its reader is not sure of."""
    replaceable: tuple[str, ...] = ()
    """Settings that the files tell of another step than the next, and that the user's own replace."""


def build_optimizer(saved: SavedOptimizer, model: nn.Module, path: Path) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, see `Checkpoint.optimizer`."""
    parameters = parameters_of(model)
    require_names(saved, parameters, path)
    groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in saved.groups]
    optimizer = saved.kind(groups)  # type: ignore[call-arg]
    require_rule(optimizer)

    for name, state in saved.state.items():
        optimizer.state[parameters[name]] = {
            key: _placed(value, parameters[name], f"{key} of {name}", path) for key, value in state.items()
        }
    return optimizer


def require_names(saved: SavedOptimizer, parameters: Mapping[str, Tensor], path: Path) -> None:
    """Every parameter of the model is in one group, and every state belongs to one of them.

    Raises:
        CheckpointError: They do not.
    """
    grouped = [name for group in saved.groups for name in group["params"]]
    foreign = sorted({*grouped, *saved.state} - parameters.keys())
    missing = [name for name, value in parameters.items() if value.requires_grad and name not in grouped]
    stateless = [name for name in grouped if name not in saved.state] if saved.state else []
    complaints = {
        "it names parameters that the model has not": foreign,
        "it lacks parameters of the model (freeze what was not trained: requires_grad_(False))": missing,
        "it has no state for": stateless,
    }
    told = "; ".join(f"{what}: {first_few(which)}" for what, which in complaints.items() if which)
    if told:
        raise CheckpointError(f"the optimizer's state in {path} is not this model's. {told}")


def _placed(value: Any, parameter: Tensor, what: str, path: Path) -> Any:
    """The entry of a state as the optimizer holds it: on the parameter's device, in its type where it has its shape."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{path}: {what} has the shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: the state is "
            "another model's, or its parameters are in another order"
        )
    return value.to(parameter.device, parameter.dtype)
