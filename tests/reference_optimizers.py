"""The oracle's optimizers: what a gradient of step i does to a parameter in step s, as its paper or torch defines it.

Each function takes `past`, the settings of the parameter at its steps 0…s, and `seen`, the gradients that the optimizer
saw at them, and gives a linear map for each step i = 0…s.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]
"""An optimizer's hyperparameters for one parameter: an entry of its `param_groups`."""

Map = Callable[[Tensor], Tensor]
"""What the gradient of step i, once it is given, does to the parameter in step s; linear."""


def adam(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """c_{s,i} P_s,  c_{s,i} = α_s (1−β₁) β₁^{s−i} / (1−β₁^{s+1}) for i = 0…s, from the settings at those steps, and
    P_s = 1 / (√v̂_{s+1} + ε),  v_{i+1} = β₂ v_i + (1−β₂) g_i²,  v̂_{s+1} = v_{s+1} / (1−β₂^{s+1})  (Thm. 3.1)."""
    now = past[-1]
    p = adam_preconditioner(past, seen)
    rate = now["lr"] / (1 - now["betas"][0] ** len(past))
    return [scaled(rate * c, p) for c in averaging(past)]


def averaging(past: Sequence[Settings]) -> list[float]:
    """(1−β₁) β₁^{s−i}: how much of gradient i a running average holds."""
    return [(1 - then["betas"][0]) * prod(later["betas"][0] for later in past[i + 1 :]) for i, then in enumerate(past)]


def second_moment(past: Sequence[Settings], seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """v_{s+1} and the largest of all v so far."""
    v = largest = torch.zeros_like(seen[0])
    for then, gradient in zip(past, seen, strict=True):
        v = then["betas"][1] * v + (1 - then["betas"][1]) * gradient**2
        largest = torch.maximum(largest, v)
    return v, largest


def adam_preconditioner(past: Sequence[Settings], seen: Sequence[Tensor]) -> Tensor:
    now = past[-1]
    v, largest = second_moment(past, seen)
    v_hat = (largest if now.get("amsgrad") else v) / (1 - now["betas"][1] ** len(past))
    return 1 / (v_hat.sqrt() + now["eps"])


def scaled(coefficient: float, p: Tensor) -> Map:
    return lambda gradient: coefficient * p * gradient


def nadam(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """M looks one step ahead: θ −= α P ((1−μ_s) g_s / (1−Π_{i≤s} μ_i) + μ_{s+1} m_s / (1−Π_{i≤s+1} μ_i)),
    μ_i = β₁ (1 − 0.96^{(i+1) ψ} / 2)."""
    now, count = past[-1], len(past)

    def mu(then: Settings, place: int) -> float:
        return then["betas"][0] * (1 - 0.5 * 0.96 ** (place * then["momentum_decay"]))

    # Π_{i≤s} μ_i
    rounded = torch.tensor(1.0)  # torch keeps the product in float32
    for place, then in enumerate(past, start=1):
        rounded *= mu(then, place)
    product, ahead = float(rounded), mu(now, count + 1)

    coefficients = [now["lr"] * ahead / (1 - product * ahead) * c for c in averaging(past)]
    coefficients[-1] += now["lr"] * (1 - mu(now, count)) / (1 - product)
    return [scaled(c, adam_preconditioner(past, seen)) for c in coefficients]


def radam(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """θ −= α r m̂ √(1−β₂^{s+1}) / (√v + ε) once ρ_s > 5, else α m̂."""
    now, count = past[-1], len(past)
    beta2 = now["betas"][1]
    most = 2 / (1 - beta2) - 1
    rho = most - 2 * count * beta2**count / (1 - beta2**count)
    p = torch.ones_like(seen[0])
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)) ** 0.5
        p = r * (1 - beta2**count) ** 0.5 / (second_moment(past, seen)[0].sqrt() + now["eps"])
    return [scaled(now["lr"] / (1 - now["betas"][0] ** count) * c, p) for c in averaging(past)]


def sgd(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """c_{s,i} = α_s β^{s−i} (Cor. 3.2), times 1 − dampening for all gradients but the first, whose buffer torch
    does not dampen. Nesterov looks one step ahead: α_s β β^{s−i}, and α_s more for i = s."""
    now, one = past[-1], torch.ones_like(seen[0])
    if now["momentum"] == 0:
        return [scaled(0.0, one)] * (len(past) - 1) + [scaled(now["lr"], one)]

    coefficients = []
    for i, then in enumerate(past):
        fresh = 1 if i == 0 else 1 - then["dampening"]
        coefficients.append(now["lr"] * fresh * prod(later["momentum"] for later in past[i + 1 :]))
    if now["nesterov"]:
        coefficients = [now["momentum"] * coefficient for coefficient in coefficients]
        coefficients[-1] += now["lr"]
    return [scaled(c, one) for c in coefficients]


def rmsprop(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """θ −= α Σ_{i≤s} μ^{s−i} P_i g_i,  P_i = 1 / (√(v_i − ḡ_i²) + ε), ḡ only if centered: each gradient keeps the
    preconditioner of its own step."""
    now, maps = past[-1], []
    v = mean = torch.zeros_like(seen[0])
    for i, (then, gradient) in enumerate(zip(past, seen, strict=True)):
        v = then["alpha"] * v + (1 - then["alpha"]) * gradient**2
        mean = then["alpha"] * mean + (1 - then["alpha"]) * gradient
        p = 1 / ((v - mean**2 if then["centered"] else v).sqrt() + then["eps"])
        maps.append(scaled(now["lr"] * prod(later["momentum"] for later in past[i + 1 :]), p))
    return maps


def only_last(past: Sequence[Settings], p: Tensor) -> list[Map]:
    return [scaled(0.0, p)] * (len(past) - 1) + [scaled(past[-1]["lr"], p)]


def adagrad(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """P_s = 1 / ((1 + s γ) (√Σ_i g_i² + ε))."""
    total = sum((gradient**2 for gradient in seen), torch.zeros_like(seen[0]))
    slower = 1 + (len(past) - 1) * past[-1]["lr_decay"]
    return only_last(past, 1 / (slower * (total.sqrt() + past[-1]["eps"])))


def adadelta(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """P_s = √(Δ_{s−1} + ε) / √(v_s + ε),  Δ_s = ρ Δ_{s−1} + (1−ρ) (P_s g_s)²."""
    v = delta = p = torch.zeros_like(seen[0])
    for then, gradient in zip(past, seen, strict=True):
        v = then["rho"] * v + (1 - then["rho"]) * gradient**2
        p = (delta + then["eps"]).sqrt() / (v + then["eps"]).sqrt()
        delta = then["rho"] * delta + (1 - then["rho"]) * (p * gradient) ** 2
    return only_last(past, p)


def lion(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """θ −= α sign(c_s),  c_s = β₁ m_{s−1} + (1−β₁) g_s,  m_s = β₂ m_{s−1} + (1−β₂) g_s: as if P_s = 1/|c_s| were
    given."""
    now = past[-1]
    coefficients = [
        now["betas"][0] * (1 - then["betas"][1]) * prod(later["betas"][1] for later in past[i + 1 : -1])
        for i, then in enumerate(past[:-1])
    ] + [1 - now["betas"][0]]

    c = sum((k * gradient for k, gradient in zip(coefficients, seen, strict=True)), torch.zeros_like(seen[0]))
    return [scaled(now["lr"] * k, 1 / c.abs()) for k in coefficients]


def muon(past: Sequence[Settings], seen: Sequence[Tensor]) -> list[Map]:
    """θ −= α' X_5,  X_0 = C/‖C‖,  X ← (a + b XXᵀ + c (XXᵀ)²) X with C = (1−μ) g_s + μ B_s (Nesterov): as if the matrix
    P_s with X_5 = P_s C (X_5 = C P_s for a tall C) were given: U diag(x_5/σ) Uᵀ with C's shorter singular vectors."""
    now = past[-1]
    decayed = [(1 - t["momentum"]) * prod(u["momentum"] for u in past[i + 1 :]) for i, t in enumerate(past)]
    if now["nesterov"]:
        decayed = [now["momentum"] * k for k in decayed]
        decayed[-1] += 1 - now["momentum"]
    c = sum((k * gradient for k, gradient in zip(decayed, seen, strict=True)), torch.zeros_like(seen[0]))

    # The iteration leaves the singular vectors as they are: it moves the singular values alone.
    left, sigma, right = torch.linalg.svd(c, full_matrices=False)
    x = sigma / sigma.norm()
    first, second, third = now["ns_coefficients"]
    for _ in range(now["ns_steps"]):
        x = first * x + second * x**3 + third * x**5

    tall = c.shape[0] > c.shape[1]
    p = right.T @ torch.diag(x / sigma) @ right if tall else left @ torch.diag(x / sigma) @ left.T
    rate = now["lr"] * max(1, c.shape[0] / c.shape[1]) ** 0.5

    def contribution(k: float) -> Map:
        return lambda gradient: rate * k * (gradient @ p if tall else p @ gradient)

    return [contribution(k) for k in decayed]


MAPS: dict[str, Callable[[Sequence[Settings], Sequence[Tensor]], list[Map]]] = {
    "AdamW": adam, "Adam": adam, "NAdam": nadam, "RAdam": radam, "SGD": sgd, "RMSprop": rmsprop, "Adagrad": adagrad,
    "Adadelta": adadelta, "Lion": lion, "Muon": muon,
}  # fmt: skip


def decoupled(settings: Settings) -> bool:
    """Whether weight decay stays out of the gradient, as in AdamW; Lion and Muon have no other."""
    return bool(settings.get("decoupled_weight_decay", "betas" in settings or "ns_steps" in settings))
