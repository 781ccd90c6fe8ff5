"""The model's tensors by the names that they have without `torch.compile`, and the model run without it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WRAPPER = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module)\.")
"""What `torch.compile(module)` and `checkpoint_wrapper` put in front of the names of the module's tensors."""


def plain_name(name: str) -> str:
    """The name of a tensor of the model as it is without `torch.compile` and `checkpoint_wrapper`.

    Example:
        >>> from explaind_track.core.modules import plain_name
        >>> plain_name("_orig_mod.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return WRAPPER.sub("", name)


def parameters_of(model: nn.Module, aliases: bool = False) -> dict[str, Tensor]:
    """The model's parameters by their plain names.

    Args:
        model: Compiled or not.
        aliases: Tied parameters by each of their names; else by the first.
    """
    return {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=not aliases)}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's buffers by their plain names."""
    return {plain_name(name): value for name, value in model.named_buffers()}


def without_wrapper(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given."""
    wrapped: nn.Module = getattr(model, "_orig_mod", model)
    return wrapped


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a module of it is compiled, by `torch.compile(module)` or `module.compile()`."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules_of(model))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all modules in it, each once; by no generators in each other, since every step asks for them."""
    found = {id(model): model}
    waiting = [model]
    for module in waiting:
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return waiting


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs the model's compiled modules as they were written.

    Our passes put other tensors in the parameters' place, differentiate forward and vectorize. A graph compiled for
    them would push training's out; and where there can be none, the compiler gives up the module for good.
    """
    if not is_compiled(model):
        yield
        return

    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Gives every module its own mode back, training or not, at the end."""
    modes = [(module, module.training) for module in modules_of(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
