"""Update rules: what an optimizer did to a parameter, split into the parts of the paper's Theorem 3.1.

Every optimizer here is linear in the gradients once its preconditioner `P` is given. With `G_s` the gradient of the
step and `λ` the coupled weight decay (one that is added to the gradient, as in `Adam` and `SGD`), it keeps

    B_s = β B_{s−1} + b (G_s + λ θ_s)                    its momentum buffer
    θ_{s+1} = θ_s − P (e B_s + d (G_s + λ θ_s)) − γ θ_s     γ: decoupled decay, as in AdamW

AdamW (Thm. 3.1):  P = 1/(√v̂_{s+1} + ε),  b = 1−β₁,  e = α_s/(1−β₁^{s+1}),  d = 0,  γ = α_s λ
SGD (Cor. 3.2):    P = 1,  b = 1 − dampening,  e = α_s,  d = 0  (Nesterov: e = α_s β, d = α_s)

A rule is one function that reads `(P, β, b, e, d, λ, γ)` off the optimizer's settings and state; everything else
follows. Register one for an optimizer of your own:

    @update_rule.register
    def _(optimizer: MyOptimizer, settings: dict, state: dict, first: bool) -> Rule: ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """The coefficients of one parameter's update; see the module's docstring for the equation they stand in."""

    buffer: Tensor | None
    """`B_s`, the optimizer's own momentum buffer after the step; None if it keeps none (then `e` is 0)."""
    beta: float
    b: float
    e: float
    d: float
    preconditioner: Callable[[], Tensor] | None = None
    """Computes `P`; None where `P` is 1. A function, so that nobody pays for it who does not ask."""
    coupled: float = 0.0
    decoupled: float = 0.0


@singledispatch
def update_rule(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool
) -> Rule:
    """The rule by which `optimizer` has just updated one parameter.

    settings: the parameter's entry of `optimizer.param_groups`, as it was during the step.
    state:    `optimizer.state[parameter]` after the step.
    first:    whether the optimizer held no state for the parameter before the step.

    Raises TypeError for an optimizer that no rule is registered for.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    known = ", ".join(sorted(cls.__name__ for cls in update_rule.registry if cls is not object))
    raise TypeError(
        f"no update rule for the optimizer {name}; there are rules for {known} and their subclasses. If its step is "
        "linear in the gradients, register one:\n"
        "    @explaind_track.update_rule.register\n"
        f"    def _(optimizer: {type(optimizer).__qualname__}, settings, state, first) -> explaind_track.Rule: ..."
    )


def require_rule(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError, before any work, for an optimizer that no rule is registered for."""
    fallback = update_rule.dispatch(object)
    if update_rule.dispatch(type(optimizer)) is fallback:
        fallback(optimizer, {}, {}, True)


@update_rule.register
def _adam(optimizer: torch.optim.Adam, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> Rule:
    """Adam and AdamW (which torch derives from it), with or without `amsgrad` and `maximize`."""
    (beta1, beta2), eps = settings["betas"], settings["eps"]
    count, rate, decay = float(state["step"]), float(settings["lr"]), settings["weight_decay"]
    beta1, beta2 = float(beta1), float(beta2)
    second = state["max_exp_avg_sq" if settings["amsgrad"] else "exp_avg_sq"]
    decoupled = settings["decoupled_weight_decay"]
    return Rule(
        buffer=state["exp_avg"],
        beta=beta1,
        b=1 - beta1,
        e=rate / (1 - beta1**count),
        d=0.0,
        preconditioner=lambda: ((second / (1 - beta2**count)).sqrt_().add_(eps)).reciprocal_(),
        coupled=0.0 if decoupled else decay,
        decoupled=rate * decay if decoupled else 0.0,
    )


@update_rule.register
def _sgd(optimizer: torch.optim.SGD, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> Rule:
    rate, beta, decay = float(settings["lr"]), float(settings["momentum"]), settings["weight_decay"]
    if beta == 0:
        return Rule(buffer=None, beta=0.0, b=1.0, e=0.0, d=rate, coupled=decay)
    return Rule(
        buffer=state["momentum_buffer"],
        beta=beta,
        b=1.0 if first else 1 - settings["dampening"],  # torch starts the buffer with the undampened gradient
        e=rate * beta if settings["nesterov"] else rate,
        d=rate if settings["nesterov"] else 0.0,
        coupled=decay,
    )
