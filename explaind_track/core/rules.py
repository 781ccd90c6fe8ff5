"""Update rules: what an optimizer did to a parameter, split into the parts of the paper's Theorem 3.1.

Every optimizer here is linear in the gradients once its preconditioners `P` and `Q` are given. With `G_s` the gradient
of the step and `λ` the coupled weight decay (one that is added to the gradient, as in `Adam` and `SGD`), it keeps

    B_s = β B_{s−1} + b Q (G_s + λ θ_s)                    its momentum buffer
    θ_{s+1} = θ_s − P (e B_s + d (G_s + λ θ_s)) − γ θ_s       γ: decoupled decay, as in AdamW

AdamW (Thm. 3.1):  P = 1/(√v̂_{s+1} + ε),  b = 1−β₁,  e = α_s/(1−β₁^{s+1}),  d = 0,  γ = α_s λ
SGD (Cor. 3.2):    P = 1,  b = 1 − dampening,  e = α_s,  d = 0  (Nesterov: e = α_s β, d = α_s)

`Q` is 1 but for RMSprop with momentum, which gathers preconditioned gradients. A rule is one function that reads
`(P, Q, β, b, e, d, λ, γ)` off the optimizer's settings and state; everything else follows. An optimizer whose step is
not linear in its gradients is split as if its preconditioner had been given: `sign(c)` is `c/|c|`, Muon's
orthogonalized matrix is a matrix times `c`. `update_rule` shows how to register a rule for an optimizer of your own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]

Precondition = Callable[[Tensor, Tensor], Tensor]
"""`(direction, seen)` → the preconditioner applied to a direction: linear and its own adjoint. The direction may carry
leading axes, and may be written over; `seen` is the gradient as the optimizer saw it, `G_s + λ θ_s`."""


@dataclass(frozen=True)
class Rule:
    """The coefficients of one parameter's update (Thm. 3.1), with `B_s` the momentum buffer:

        B_s = β B_{s−1} + b Q (G_s + λ θ_s)
        θ_{s+1} = θ_s − P (e B_s + d (G_s + λ θ_s)) − γ θ_s

    Example:
        >>> import torch
        >>> from explaind_track import Rule
        >>> Rule(buffer=torch.zeros(3), beta=0.9, b=1.0, e=0.1, d=0.0, coupled=1e-4).e  # SGD: the learning rate
        0.1
    """

    buffer: Tensor | None
    """`B_s`, the optimizer's own momentum buffer after the step; None if it keeps none (then `e` is 0)."""
    beta: float
    """`β`: how much of the buffer stays."""
    b: float
    """`b`: how much of the gradient enters the buffer."""
    e: float
    """`e`: how far the buffer moves the parameter."""
    d: float
    """`d`: how far the gradient moves it by itself, past the buffer."""
    precondition: Precondition | None = None
    """Applies `P`; None where `P` is 1."""
    enter: Precondition | None = None
    """Applies `Q`; None where `Q` is 1."""
    coupled: float = 0.0
    """`λ`: weight decay that is added to the gradient."""
    decoupled: float = 0.0
    """`γ`: weight decay that is taken off the parameter."""
    precision: torch.dtype | None = None
    """What the optimizer computes in, where that is less than the parameter's own type; the difference is rounding."""

    @property
    def is_elementwise(self) -> bool:
        """Whether each entry of the parameter moves by itself, so that the rule can be cut."""
        return all(matrix is None or isinstance(matrix, Diagonal) for matrix in (self.precondition, self.enter))

    @property
    def scales(self) -> list[Tensor]:
        """The tensors that an elementwise rule's scales are made of."""
        found = [matrix for matrix in (self.precondition, self.enter) if isinstance(matrix, Diagonal)]
        return [tensor for matrix in found for tensor in matrix.tensors.values()]

    def piece(self, rows: slice) -> "Rule":
        """The rule of some of the parameter's entries, as if these were one flat parameter; of an elementwise rule.

        Example:
            >>> import torch
            >>> from explaind_track import Rule
            >>> rule = Rule(buffer=torch.arange(4.0).reshape(2, 2), beta=0.9, b=1.0, e=0.1, d=0.0)
            >>> rule.piece(slice(1, 3)).buffer
            tensor([1., 2.])
        """
        buffer = None if self.buffer is None else self.buffer.view(-1)[rows]
        precondition, enter = (
            matrix.piece(rows) if isinstance(matrix, Diagonal) else None for matrix in (self.precondition, self.enter)
        )
        return replace(self, buffer=buffer, precondition=precondition, enter=enter)


@singledispatch
def update_rule(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool
) -> Rule:
    """The rule by which `optimizer` has just updated one parameter; dispatched on the optimizer's class.

    Args:
        optimizer: The optimizer.
        settings: The parameter's entry of `optimizer.param_groups`, as it was during the step.
        state: `optimizer.state[parameter]` after the step.
        first: Whether the optimizer held no state for the parameter before the step.

    Returns:
        The coefficients, see `Rule`. They are proved at every step: a rule that does not explain how the parameter
        moved raises UnexplainedUpdateError.

    Raises:
        TypeError: No rule is registered for the optimizer.

    Example:
        >>> import torch
        >>> from explaind_track import Rule, StepObserver, update_rule
        >>> class SignSGD(torch.optim.SGD):  # sign(G) = P G with P = 1/|G|
        ...     def step(self):
        ...         for group in self.param_groups:
        ...             for parameter in group["params"]:
        ...                 parameter.data -= group["lr"] * parameter.grad.sign()
        >>> @update_rule.register
        ... def _(optimizer: SignSGD, settings: dict, state: dict, first: bool) -> Rule:
        ...     def precondition(direction, seen):
        ...         return direction / seen.abs()
        ...     return Rule(buffer=None, beta=0.0, b=1.0, e=0.0, d=settings["lr"], precondition=precondition)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SignSGD(model.parameters(), lr=0.1)
        >>> observer = StepObserver(optimizer, dict(model.named_parameters()))
        >>> model(torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        >>> observer.before(buffers={})
        >>> optimizer.step()
        >>> observer.after(number=0, buffers={}).parts["kernel"]["weight"]
        tensor([[ 0.1000, -0.1000,  0.1000]])
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"{name} evaluates the loss many times in one step, which has no parts; use a first-order one")
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


@dataclass(frozen=True)
class Diagonal:
    """A diagonal preconditioner: multiplies by a scale elementwise, which is computed at each use and not kept."""

    scale: Callable[[Mapping[str, Tensor]], Tensor]
    """From these tensors to the scale, entry by entry: a fresh tensor."""
    tensors: Mapping[str, Tensor]
    """Of the optimizer's state, of the parameter's shape."""

    def __call__(self, direction: Tensor, seen: Tensor) -> Tensor:
        return direction.mul_(self.scale(self.tensors))

    def piece(self, rows: slice) -> "Diagonal":
        return Diagonal(self.scale, {name: tensor.view(-1)[rows] for name, tensor in self.tensors.items()})


def diagonal(scale: Callable[[Mapping[str, Tensor]], Tensor], state: Mapping[str, Any], *names: str) -> Diagonal:
    """A diagonal preconditioner of tensors of the optimizer's state by these names."""
    return Diagonal(scale, {name: state[name] for name in names})


def _decay(settings: Settings, rate: float) -> tuple[float, float]:
    """Weight decay, coupled and decoupled, for optimizers that know both kinds."""
    decay = float(settings["weight_decay"])
    return (0.0, rate * decay) if settings["decoupled_weight_decay"] else (decay, 0.0)


def _bias_correction(beta: float, settings: Settings, state: Mapping[str, Any]) -> float:
    """`1 − β^{s+1}`. A capturable step, as any that is compiled, takes it of a count in a tensor, and so in float32."""
    count = state["step"] if settings.get("capturable") else float(state["step"])
    return float(1 - beta**count)


@update_rule.register
def _adam(optimizer: torch.optim.Adam, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    """Adam and AdamW (which torch derives from it), with or without `amsgrad` and `maximize`."""
    (beta1, beta2), eps = map(float, settings["betas"]), settings["eps"]
    correction1, correction2 = (_bias_correction(beta, settings, state) for beta in (beta1, beta2))
    rate = float(settings["lr"])
    coupled, decoupled = _decay(settings, rate)
    second = "max_exp_avg_sq" if settings["amsgrad"] else "exp_avg_sq"

    return Rule(
        buffer=state["exp_avg"],
        beta=beta1,
        b=1 - beta1,
        e=rate / correction1,
        d=0.0,
        precondition=diagonal(lambda own: (own[second] / correction2).sqrt_().add_(eps).reciprocal_(), state, second),
        coupled=coupled,
        decoupled=decoupled,
        precision=torch.float32 if settings.get("capturable") else None,
    )


@update_rule.register
def _nadam(optimizer: torch.optim.NAdam, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    """Looks a step ahead, with the momentum μ_s = β₁ (1 − 0.96^{s ψ}/2) and the product of all of them so far."""
    (beta1, beta2), eps = map(float, settings["betas"]), settings["eps"]
    count, rate, product = float(state["step"]), float(settings["lr"]), float(state["mu_product"])
    coupled, decoupled = _decay(settings, rate)
    now, ahead = (beta1 * (1 - 0.5 * 0.96 ** (s * settings["momentum_decay"])) for s in (count, count + 1))

    def scale(own: Mapping[str, Tensor]) -> Tensor:
        second: Tensor = own["exp_avg_sq"] / (1 - beta2**count)
        return second.sqrt_().add_(eps).reciprocal_()

    return Rule(
        buffer=state["exp_avg"],
        beta=beta1,
        b=1 - beta1,
        e=rate * ahead / (1 - product * ahead),
        d=rate * (1 - now) / (1 - product),
        precondition=diagonal(scale, state, "exp_avg_sq"),
        coupled=coupled,
        decoupled=decoupled,
    )


@update_rule.register
def _radam(optimizer: torch.optim.RAdam, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    """SGD with momentum until the second moment can be trusted (ρ_s > 5), Adam with a rectified rate from then on."""
    (beta1, beta2), eps = map(float, settings["betas"]), settings["eps"]
    count, rate = float(state["step"]), float(settings["lr"])
    correction, rho_most = 1 - beta2**count, 2 / (1 - beta2) - 1
    rho = rho_most - 2 * count * beta2**count / correction

    scale: Precondition | None = None
    if rho > 5:
        rectified = (rho - 4) * (rho - 2) * rho_most / ((rho_most - 4) * (rho_most - 2) * rho) * correction
        factor = math.sqrt(rectified)
        scale = diagonal(lambda own: own["exp_avg_sq"].sqrt().add_(eps).reciprocal_().mul_(factor), state, "exp_avg_sq")

    coupled, decoupled = _decay(settings, rate)
    return Rule(
        buffer=state["exp_avg"],
        beta=beta1,
        b=1 - beta1,
        e=rate / (1 - beta1**count),
        d=0.0,
        precondition=scale,
        coupled=coupled,
        decoupled=decoupled,
    )


@update_rule.register
def _sgd(optimizer: torch.optim.SGD, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
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


@update_rule.register
def _rmsprop(optimizer: torch.optim.RMSprop, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    """Without momentum a preconditioned gradient step; with it, the buffer gathers preconditioned gradients."""
    rate, beta, decay, eps = float(settings["lr"]), settings["momentum"], settings["weight_decay"], settings["eps"]

    def scale(own: Mapping[str, Tensor]) -> Tensor:
        second: Tensor = own["square_avg"]
        if settings["centered"]:
            second = second.addcmul(own["grad_avg"], own["grad_avg"], value=-1)
        return second.sqrt().add_(eps).reciprocal_()

    matrix = diagonal(scale, state, "square_avg", *(["grad_avg"] if settings["centered"] else []))
    if beta == 0:
        return Rule(buffer=None, beta=0.0, b=1.0, e=0.0, d=rate, precondition=matrix, coupled=decay)
    return Rule(state["momentum_buffer"], beta, b=1.0, e=rate, d=0.0, enter=matrix, coupled=decay)


@update_rule.register
def _adagrad(optimizer: torch.optim.Adagrad, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    rate = float(settings["lr"]) / (1 + (float(state["step"]) - 1) * settings["lr_decay"])
    eps = settings["eps"]
    scale = diagonal(lambda own: own["sum"].sqrt().add_(eps).reciprocal_(), state, "sum")
    return Rule(None, beta=0.0, b=1.0, e=0.0, d=rate, precondition=scale, coupled=settings["weight_decay"])


@update_rule.register
def _adadelta(optimizer: torch.optim.Adadelta, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    """P = √(Δ_{s−1} + ε) / √(v_s + ε). The optimizer has put the step into Δ_s = ρ Δ_{s−1} + (1−ρ) (P g)² already,
    which is linear in Δ_{s−1}, and is solved for it."""
    rho, eps = settings["rho"], settings["eps"]

    def precondition(direction: Tensor, seen: Tensor) -> Tensor:
        second = state["square_avg"] + eps
        # Δ_s = ρ Δ_{s−1} + share (Δ_{s−1} + ε), with share = (1−ρ) g²/(v_s + ε)
        share = seen.square().div_(second).mul_(1 - rho)
        before = (state["acc_delta"] - share * eps).div_(share.add_(rho)).clamp_(min=0)
        return direction.mul_(before.add_(eps).div_(second).sqrt_())

    rate, decay = float(settings["lr"]), settings["weight_decay"]
    return Rule(None, beta=0.0, b=1.0, e=0.0, d=rate, precondition=precondition, coupled=decay)


@update_rule.register
def _muon(optimizer: torch.optim.Muon, settings: Settings, state: Mapping[str, Any], first: bool) -> Rule:
    """The orthogonalized update is a matrix `P` times `C = e B + d G`: each Newton–Schulz step multiplies by a
    polynomial in its own Gram matrix. `P` is found in the parameter's precision, the optimizer uses bfloat16: the
    difference is rounding."""
    buffer: Tensor = state["momentum_buffer"]
    beta, decay = float(settings["momentum"]), float(settings["lr"]) * settings["weight_decay"]
    rows, columns = buffer.shape
    scales = {None: math.sqrt(max(1, rows / columns)), "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
    scales["original"] = scales[None]
    rate = float(settings["lr"]) * scales[settings["adjust_lr_fn"]]
    e, d = (beta, 1 - beta) if settings["nesterov"] else (1.0, 0.0)

    def precondition(direction: Tensor, seen: Tensor) -> Tensor:
        c = buffer * e + seen * d
        tall = c.shape[0] > c.shape[1]
        matrix = orthogonalizer(c.mT if tall else c, settings["ns_coefficients"], settings["ns_steps"], settings["eps"])
        return direction @ matrix if tall else matrix @ direction

    return Rule(
        buffer, beta, b=1 - beta, e=rate * e, d=rate * d, precondition=precondition, decoupled=decay,
        precision=torch.bfloat16,
    )  # fmt: skip


def orthogonalizer(c: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The symmetric matrix `P` (R, R) for which `P c` is `c` (R, C) after so many Newton–Schulz steps from `c/‖c‖` on,
    X ← (k₁ + k₂ A + k₃ A²) X with A = X Xᵀ."""
    first, second, third = coefficients
    identity = torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
    scale = c.norm().clamp(min=eps).reciprocal()

    total: Tensor = identity * scale  # P so far, X = P c
    gram: Tensor = (c @ c.mT) * scale.square()  # A = X Xᵀ
    for _ in range(steps):
        factor = first * identity + second * gram + third * (gram @ gram)
        total, gram = factor @ total, factor @ gram @ factor
    return total
