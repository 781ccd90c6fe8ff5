"""Which of the model's parameters is which in a state that has numbers instead of names."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from explaind_track.core.modules import parameters_of, plain_name, without_wrapper
from explaind_track.errors import CheckpointError

Order = list[list[str]]
"""The names of each group's parameters, in the group's order."""

NO_DECAY = tuple(map(re.compile, (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")))
"""`Trainer.get_decay_parameter_names` of transformers: the parameters without decay, by name."""
BIAS = (re.compile("bias"),)
"""What older versions of it went by, beside the classes of norms."""


def name_groups(groups: Sequence[Mapping[str, Any]], state: Mapping[int, Any], model: nn.Module, path: Path) -> Order:
    """The names of the parameters that each group's numbers stand for.

    Numbers go up in the order of the groups, which keep the model's order. Of the ways in which groups are made, the
    one whose counts and shapes are the file's; those that torch has written along (`param_names`), where it has.

    Args:
        groups: The `param_groups` of an optimizer's `state_dict()`.
        state: Its `state`.
        model: Of the architecture that was trained.
        path: The file, for messages.

    Raises:
        CheckpointError: None fits, or several fit and say differently.
    """
    parameters = {name: value for name, value in parameters_of(model).items() if value.requires_grad}
    written = [group.get("param_names") for group in groups]
    if all(written):
        return [[plain_name(name) for name in names] for names in written if names]

    fitting: list[Order] = []
    for order in _orders(model, list(parameters), len(groups)):
        if order not in fitting and _fits(order, groups, state, parameters):
            fitting.append(order)
    if len(fitting) == 1:
        return fitting[0]

    counts = ", ".join(str(len(group["params"])) for group in groups)
    if fitting:
        raise CheckpointError(
            f"{path} has no names, and its groups of {counts} parameters fit the model in {len(fitting)} ways: write "
            "it with torch >= 2.6 and named parameters (AdamW(model.named_parameters(), …))"
        )
    raise CheckpointError(
        f"{path} is not this model's: its groups have {counts} parameters, of other shapes than the "
        f"model's {len(parameters)} trained ones (in one group, or split into decay and no decay as transformers' "
        "Trainer does). Make the model from the checkpoint's own config; freeze what was not trained"
    )


def _orders(model: nn.Module, names: list[str], count: int) -> Iterator[Order]:
    """The ways in which parameters come into so many groups."""
    if count == 1:
        yield [names]
    if count == 2:
        for patterns, is_norm in ((NO_DECAY, _is_layer_norm), (BIAS, _is_called_norm)):
            decaying = set(_outside(without_wrapper(model), is_norm, patterns))
            yield [[n for n in names if n in decaying], [n for n in names if n not in decaying]]
        # by the number of axes, as many loops of one's own do
        wide = {name for name, value in parameters_of(model).items() if value.ndim >= 2}
        yield [[n for n in names if n in wide], [n for n in names if n not in wide]]


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


def _is_called_norm(module: nn.Module) -> bool:
    """Whether an older transformers counted it among the norms."""
    return any(name in cls.__name__ for cls in type(module).__mro__ for name in ("LayerNorm", "RMSNorm"))


def _outside(module: nn.Module, is_norm: Callable[[nn.Module], bool], patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """The parameters that are in no norm and whose names match no pattern (`get_parameter_names` of transformers)."""
    found = []
    for name, child in module.named_children():
        if not is_norm(child):
            found += [f"{name}.{inner}" for inner in _outside(child, is_norm, patterns)]
    found += list(module._parameters)
    return [plain_name(name) for name in found if not any(pattern.search(name.lower()) for pattern in patterns)]


def _fits(
    order: Order, groups: Sequence[Mapping[str, Any]], state: Mapping[int, Any], parameters: Mapping[str, Tensor]
) -> bool:
    """Whether every group has as many parameters, of these shapes."""
    if [len(names) for names in order] != [len(group["params"]) for group in groups]:
        return False
    pairs = [
        (parameters[name], state.get(number, {}))
        for names, group in zip(order, groups, strict=True)
        for name, number in zip(names, group["params"], strict=True)
    ]
    return all(_fits_one(parameter, held) for parameter, held in pairs)


def _fits_one(parameter: Tensor, held: Mapping[str, Any]) -> bool:
    tensors = [value for value in held.values() if isinstance(value, Tensor) and value.ndim > 0]
    return all(value.shape == parameter.shape for value in tensors)
