"""The optimizers' own arithmetic, as functions that can be differentiated: a step's parameter, gradient and state in,
the next parameter and state out.

Torch's `differentiable=True` is not used: it counts steps in float32, cuts the first momentum buffer off the graph, and
gives NaN where a second moment is 0.
"""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]
State = Mapping[str, Any]
Stepped = tuple[Tensor, dict[str, Tensor]]


@singledispatch
def differentiable_step(
    optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], settings: Settings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Takes an optimizer's step of one parameter by operations that autograd knows; dispatched on its class.

    `counterfactual` differentiates it. Register one for an optimizer of your own, beside its rule (`update_rule`).

    Args:
        optimizer: The optimizer.
        parameter: θ_s, of any shape.
        gradient: The parameter's `.grad`, of that shape; nothing is written to it.
        state: `optimizer.state[parameter]` before the step; empty before its first.
        settings: The parameter's entry of `optimizer.param_groups`; `lr` and `weight_decay` are tensors of shape ().

    Returns:
        θ_{s+1}, and those tensors of the state after the step that depend on gradients, by name. They are compared with
        what the optimizer has left.

    Raises:
        TypeError: There is none for the optimizer.

    Example:
        >>> import torch
        >>> from explaind_track.what_if import differentiable_step
        >>> class Cubic(torch.optim.SGD):  # θ ← θ − α G³
        ...     pass
        >>> @differentiable_step.register
        ... def _(optimizer: Cubic, parameter, gradient, state, settings):
        ...     return parameter - settings["lr"] * gradient**3, {}
        >>> optimizer = Cubic([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> after, _ = differentiable_step(optimizer, torch.ones(2), torch.tensor([1.0, 2.0]), {}, {"lr": 0.1})
        >>> after
        tensor([0.9000, 0.2000])
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    known = ", ".join(sorted(cls.__name__ for cls in differentiable_step.registry if cls is not object))
    raise TypeError(
        f"the step of {name} cannot be differentiated here; there are steps for {known} and their subclasses. Register "
        "one, in operations that autograd knows:\n"
        "    @explaind_track.what_if.differentiable_step.register\n"
        f"    def _(optimizer: {type(optimizer).__qualname__}, parameter, gradient, state, settings): ..."
    )


def require_differentiable(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError, before any work, for an optimizer whose step cannot be differentiated."""
    fallback = differentiable_step.dispatch(object)
    if differentiable_step.dispatch(type(optimizer)) is fallback:
        fallback(optimizer, torch.zeros(()), torch.zeros(()), {}, {})


def root(value: Tensor) -> Tensor:
    """√v, whose derivative is 0 where v is 0: a gradient that has always been 0 changes no second moment at first
    order."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def _seen(parameter: Tensor, gradient: Tensor, settings: Settings, coupled: bool = True) -> Tensor:
    """±G + λθ: the gradient as the optimizer uses it."""
    signed = -gradient if settings.get("maximize") else gradient
    return signed + settings["weight_decay"] * parameter if coupled else signed


def _count(state: State) -> float:
    """The step's number, from 1 on."""
    return float(state.get("step", 0)) + 1


def _held(state: State, name: str, like: Tensor) -> Tensor:
    value = state.get(name)
    return torch.zeros_like(like) if value is None else value


def _decayed(parameter: Tensor, settings: Settings, decoupled: bool) -> Tensor:
    return parameter * (1 - settings["lr"] * settings["weight_decay"]) if decoupled else parameter


def _moments(gradient: Tensor, state: State, settings: Settings) -> tuple[Tensor, Tensor]:
    """m_{s+1} = β₁ m_s + (1−β₁) g and v_{s+1} = β₂ v_s + (1−β₂) g²."""
    beta1, beta2 = map(float, settings["betas"])
    first = beta1 * _held(state, "exp_avg", gradient) + (1 - beta1) * gradient
    second = beta2 * _held(state, "exp_avg_sq", gradient) + (1 - beta2) * gradient.square()
    return first, second


@differentiable_step.register
def _adam(
    optimizer: torch.optim.Adam, parameter: Tensor, gradient: Tensor, state: State, settings: Settings
) -> Stepped:
    """Adam and AdamW: θ ← (1 − αλ) θ − α m̂ / (√v̂ + ε); with `amsgrad`, v is the largest so far."""
    (beta1, beta2), decoupled = map(float, settings["betas"]), settings["decoupled_weight_decay"]
    correction1, correction2 = 1 - beta1 ** _count(state), 1 - beta2 ** _count(state)
    first, second = _moments(_seen(parameter, gradient, settings, coupled=not decoupled), state, settings)
    after = {"exp_avg": first, "exp_avg_sq": second}
    if settings["amsgrad"]:
        most = _held(state, "max_exp_avg_sq", gradient)
        second = after["max_exp_avg_sq"] = torch.where(second > most, second, most)

    scale = root(second) / correction2**0.5 + settings["eps"]
    moved = settings["lr"] / correction1 * first / scale
    return _decayed(parameter, settings, decoupled) - moved, after


@differentiable_step.register
def _nadam(
    optimizer: torch.optim.NAdam, parameter: Tensor, gradient: Tensor, state: State, settings: Settings
) -> Stepped:
    (beta1, beta2), decoupled = map(float, settings["betas"]), settings["decoupled_weight_decay"]
    count = _count(state)
    now, ahead = (beta1 * (1 - 0.5 * 0.96 ** (s * settings["momentum_decay"])) for s in (count, count + 1))
    product = float(state.get("mu_product", torch.ones(())) * now)  # in torch's own precision
    seen = _seen(parameter, gradient, settings, coupled=not decoupled)
    first, second = _moments(seen, state, settings)

    scale = root(second / (1 - beta2**count)) + settings["eps"]
    moved = settings["lr"] * ((1 - now) / (1 - product) * seen + ahead / (1 - product * ahead) * first) / scale
    return _decayed(parameter, settings, decoupled) - moved, {"exp_avg": first, "exp_avg_sq": second}


@differentiable_step.register
def _radam(
    optimizer: torch.optim.RAdam, parameter: Tensor, gradient: Tensor, state: State, settings: Settings
) -> Stepped:
    (beta1, beta2), decoupled = map(float, settings["betas"]), settings["decoupled_weight_decay"]
    count = _count(state)
    first, second = _moments(_seen(parameter, gradient, settings, coupled=not decoupled), state, settings)
    moved = settings["lr"] * first / (1 - beta1**count)

    correction, most = 1 - beta2**count, 2 / (1 - beta2) - 1
    length = most - 2 * count * beta2**count / correction
    if length > 5:
        rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        moved = moved * (rectified * correction) ** 0.5 / (root(second) + settings["eps"])
    return _decayed(parameter, settings, decoupled) - moved, {"exp_avg": first, "exp_avg_sq": second}


@differentiable_step.register
def _sgd(optimizer: torch.optim.SGD, parameter: Tensor, gradient: Tensor, state: State, settings: Settings) -> Stepped:
    seen, beta = _seen(parameter, gradient, settings), float(settings["momentum"])
    if beta == 0:
        return parameter - settings["lr"] * seen, {}

    # torch starts the buffer with the undampened gradient
    held = state.get("momentum_buffer")
    buffer = seen if held is None else beta * held + (1 - settings["dampening"]) * seen
    moved = seen + beta * buffer if settings["nesterov"] else buffer
    return parameter - settings["lr"] * moved, {"momentum_buffer": buffer}


@differentiable_step.register
def _rmsprop(
    optimizer: torch.optim.RMSprop, parameter: Tensor, gradient: Tensor, state: State, settings: Settings
) -> Stepped:
    seen, alpha, beta = _seen(parameter, gradient, settings), settings["alpha"], float(settings["momentum"])
    square = alpha * _held(state, "square_avg", seen) + (1 - alpha) * seen.square()
    after = {"square_avg": square}
    if settings["centered"]:
        mean = after["grad_avg"] = alpha * _held(state, "grad_avg", seen) + (1 - alpha) * seen
        square = square - mean.square()

    scaled = seen / (root(square) + settings["eps"])
    if beta > 0:
        scaled = after["momentum_buffer"] = beta * _held(state, "momentum_buffer", seen) + scaled
    return parameter - settings["lr"] * scaled, after


@differentiable_step.register
def _adagrad(
    optimizer: torch.optim.Adagrad, parameter: Tensor, gradient: Tensor, state: State, settings: Settings
) -> Stepped:
    seen = _seen(parameter, gradient, settings)
    total = _held(state, "sum", seen) + seen.square()
    rate = settings["lr"] / (1 + (_count(state) - 1) * settings["lr_decay"])
    return parameter - rate * seen / (root(total) + settings["eps"]), {"sum": total}


@differentiable_step.register
def _adadelta(
    optimizer: torch.optim.Adadelta, parameter: Tensor, gradient: Tensor, state: State, settings: Settings
) -> Stepped:
    seen, rho, eps = _seen(parameter, gradient, settings), settings["rho"], settings["eps"]
    square = rho * _held(state, "square_avg", seen) + (1 - rho) * seen.square()
    delta = (_held(state, "acc_delta", seen) + eps).sqrt() / (square + eps).sqrt() * seen
    gathered = rho * _held(state, "acc_delta", seen) + (1 - rho) * delta.square()
    return parameter - settings["lr"] * delta, {"square_avg": square, "acc_delta": gathered}
