"""An optimizer's `state_dict()`, as loops and libraries write it: numbers for parameters, settings by group."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.parameter_order import name_groups
from explaind_track.errors import CheckpointError

KINDS: tuple[tuple[type[torch.optim.Optimizer], set[str], set[str]], ...] = (
    (torch.optim.NAdam, {"momentum_decay"}, {"exp_avg", "exp_avg_sq", "mu_product"}),
    (torch.optim.Adam, {"betas", "amsgrad"}, {"exp_avg", "exp_avg_sq"}),
    (torch.optim.RAdam, {"betas", "decoupled_weight_decay"}, {"exp_avg", "exp_avg_sq"}),
    (torch.optim.Muon, {"ns_steps"}, {"momentum_buffer"}),
    (torch.optim.SGD, {"nesterov", "dampening"}, set()),
    (torch.optim.RMSprop, {"alpha", "centered"}, {"square_avg"}),
    (torch.optim.Adagrad, {"lr_decay", "initial_accumulator_value"}, {"sum"}),
    (torch.optim.Adadelta, {"rho"}, {"square_avg", "acc_delta"}),
)
"""Each optimizer with the settings and the entries of its state that tell it from the others."""


def saved_by_state_dict(content: Any, model: nn.Module, path: Path) -> SavedOptimizer:
    """The optimizer whose `state_dict()` a file holds.

    Raises:
        CheckpointError: It is none, or not this model's.
    """
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path} holds no optimizer's state_dict(): expected its 'state' and 'param_groups'")
    groups = [group for group in content["param_groups"] if group["params"]]
    if all(isinstance(name, str) for group in groups for name in group["params"]):  # gathered by FSDP
        names = [list(group["params"]) for group in groups]
    else:
        names = name_groups(groups, content["state"], model, path)

    state = {
        name: content["state"][number]
        for found, group in zip(names, groups, strict=True)
        for name, number in zip(found, group["params"], strict=True)
        if number in content["state"]
    }
    settings = [
        {**{key: value for key, value in group.items() if key != "param_names"}, "params": found}
        for found, group in zip(names, groups, strict=True)
    ]
    kind = optimizer_class(settings, state, path)
    warnings = []
    if kind is torch.optim.AdamW and any("decoupled_weight_decay" not in g and g["weight_decay"] for g in settings):
        warnings.append(f"{path.name} does not tell AdamW from Adam (torch < 2.7): taken as AdamW")
    return SavedOptimizer(kind, settings, state, warnings)


def steps_taken(content: Any) -> int | None:
    """How many steps an optimizer's `state_dict()` says were taken; None where it does not count them."""
    state = content.get("state") if isinstance(content, Mapping) else None
    entries = state.values() if isinstance(state, Mapping) else ()
    counts = [int(entry["step"]) for entry in entries if isinstance(entry, Mapping) and "step" in entry]
    return max(counts, default=None)


def optimizer_class(
    groups: list[dict[str, Any]], state: Mapping[str, Mapping[str, Any]], path: Path
) -> type[torch.optim.Optimizer]:
    """The class whose settings and state these are; AdamW where the file is too old to tell it from Adam.

    Raises:
        CheckpointError: It is none of torch's.
    """
    settings = set(groups[0])
    held = {key for entry in state.values() for key in entry}
    for kind, marks, states in KINDS:
        if marks <= settings and (not state or states <= held):
            is_decoupled = groups[0].get("decoupled_weight_decay", True)
            return torch.optim.AdamW if kind is torch.optim.Adam and is_decoupled else kind
    raise CheckpointError(
        f"{path} is of an optimizer that is none of torch's with an update rule: its settings are "
        f"{', '.join(sorted(settings - {'params'}))}, its state is {', '.join(sorted(held)) or 'empty'}"
    )
