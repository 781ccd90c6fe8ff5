"""Shape and type of tensors, as JSON has them; whether a tensor may stand where another was recorded."""

import math
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.tensors import Tensors
from explaind_track.errors import TrajectoryError

LOW_PRECISION = ("bfloat16", "float16")


def environment() -> dict[str, str]:
    """What the bits of a gradient depend on beside the training's code: version, threads, and the machine's kind."""
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def signature(tensors: Tensors) -> dict[str, list[Any]]:
    """Shape and type of every tensor, as JSON has them."""
    return {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}


def stands_for(found: Sequence[Any] | None, recorded: Sequence[Any] | None) -> bool:
    """Whether a tensor of this shape and type may be put in the place of the one recorded; by `signature`."""
    if found is None or recorded is None:
        return False
    (shape, dtype), (recorded_shape, recorded_dtype) = found, recorded
    is_upcast = recorded_dtype in LOW_PRECISION and dtype == "float32"
    return bool(shape == recorded_shape) and (dtype == recorded_dtype or is_upcast)


def is_low_precision(signatures: Mapping[str, Sequence[Any]]) -> bool:
    """Whether any of these tensors is explained in float32, which it was not trained in; by `signature`."""
    return any(dtype in LOW_PRECISION for _, dtype in signatures.values())


def refuse_other_shapes(found: Tensors, parameters: Tensors, what: str) -> None:
    """Raises TrajectoryError unless each tensor found has the shape of the parameter of its name."""
    for name, tensor in found.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            known = list(parameters[name].shape) if name in parameters else "no such parameter"
            raise TrajectoryError(
                f"the record has {what} of {name!r} of shape {list(tensor.shape)}, where the model has {known}"
            )


def refuse_spreading(state: Tensor, parameter: Tensor, what: str) -> None:
    """Raises TrajectoryError for an optimizer's tensor that would spread beyond the parameter's shape, and take memory
    for it: a column beside a row."""
    try:
        spread = torch.broadcast_shapes(state.shape, parameter.shape)
    except RuntimeError:
        return  # they have nothing in common: nothing spreads
    if math.prod(spread) > max(parameter.numel(), state.numel()):
        raise TrajectoryError(f"the record has {what} of shape {list(state.shape)} for one of {list(parameter.shape)}")


def refuse_other_generators(state: Tensors) -> None:
    """Raises TrajectoryError unless these are states of random generators, by device."""
    for device, value in state.items():
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
            raise TrajectoryError(f"the record has the state of a random generator on {device!r}, which is no device")
        try:
            if device == "cpu":
                torch.Generator().set_state(value)  # which looks at all of it
        except (RuntimeError, TypeError) as error:
            raise TrajectoryError(f"the record has no state of a random generator, where it should: {error}") from None
