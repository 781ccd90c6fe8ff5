"""The oracle: the paper's formulas as plain float64 loops. Slow, obvious, and without any code of the package.

Letters as in Theorem 3.1: step s (of N), earlier step i, training sample k (of M), prediction x (of X), its output j
(of O). The D parameter entries of a model lie end to end in one axis, parameter after parameter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Settings = Mapping[str, Any]
"""An optimizer's hyperparameters for one parameter: an entry of its `param_groups`."""


@dataclass(frozen=True)
class Turn:
    """One step of a training loop: its batch `B_s` with the weights `w_{s,k}`, and what is special about it."""

    index: tuple[int, ...]
    weights: tuple[float, ...]
    settings: Settings = field(default_factory=dict)
    """Hyperparameters that change in all parameter groups before the step."""
    without: tuple[str, ...] = ()
    """Parameters that get no gradient in this step."""
    clip_norm: float = inf
    """The gradient's norm is clipped to this."""


@dataclass(frozen=True)
class Training:
    """Everything that determines a run. `sample_loss(model, x, y)` gives the losses (B,) of a batch's samples."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sample_loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    loop: Sequence[Turn]
    auxiliary: Callable[[nn.Module], Tensor] | None = None
    """A term of the loss that belongs to no sample."""

    def losses(self) -> Iterator[tuple[Turn, Tensor]]:
        """Each turn with the losses of its samples; whoever iterates calls `backward` and the optimizer's `step`."""
        for turn in self.loop:
            for group in self.optimizer.param_groups:
                group.update(turn.settings)
            self.optimizer.zero_grad()
            index = torch.tensor(turn.index)
            yield turn, self.sample_loss(self.model, self.x[index], self.y[index])

    def backward(self, turn: Turn, losses: Tensor) -> float:
        """The gradient of Σ_k w_k L_k and of the auxiliary loss, clipped; returns by what it was multiplied."""
        (losses * losses.new_tensor(turn.weights)).sum().backward()
        if self.auxiliary is not None:
            self.auxiliary(self.model).backward()
        for name in turn.without:
            self.model.get_parameter(name).grad = None
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), turn.clip_norm))
        return min(1.0, turn.clip_norm / (norm + 1e-6))


@dataclass(frozen=True)
class Moment:
    """The record of one step: θ_s, θ_{s+1}, the buffers then, and every sample's own gradient at θ_s."""

    turn: Turn
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    buffers_before: dict[str, Tensor]
    buffers_after: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    """∇L_k(θ_s) by parameter, for each sample of the batch."""
    auxiliary: dict[str, Tensor]
    """The auxiliary loss's gradient by parameter; zeros without one."""
    clip: float
    """By what the gradient was multiplied."""
    settings: dict[str, dict[str, Any]]
    """Of the parameters that the optimizer updated."""


def copies(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def record(training: Training) -> list[Moment]:
    """Trains, and records each step."""
    model, optimizer, moments = training.model, training.optimizer, []
    parameters = dict(model.named_parameters())
    learning = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    buffers = copies(model.named_buffers())
    for turn, losses in training.losses():
        gradients = []
        for loss in losses:
            found = torch.autograd.grad(loss, list(learning.values()), retain_graph=True, allow_unused=True)
            gradients.append(
                {n: torch.zeros_like(learning[n]) if g is None else g for n, g in zip(learning, found, strict=True)}
            )
        extra = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        if training.auxiliary is not None:
            found = torch.autograd.grad(training.auxiliary(model), list(learning.values()), allow_unused=True)
            extra |= {name: g for name, g in zip(learning, found, strict=True) if g is not None}
        training.backward(turn, losses)
        settings = {
            name: {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
            for name, parameter in parameters.items()
            if parameter.grad is not None and any(parameter is member for member in group["params"])
        }
        before = copies(model.named_parameters())
        optimizer.step()
        after, buffers_after = copies(model.named_parameters()), copies(model.named_buffers())
        square = sum(
            float((sum(w * g[name] for w, g in zip(turn.weights, gradients, strict=True)) + extra[name]).square().sum())
            for name in settings
        )
        clip = min(1.0, turn.clip_norm / (square**0.5 + 1e-6))
        moments.append(Moment(turn, before, after, buffers, buffers_after, gradients, extra, clip, settings))
        buffers = buffers_after
    return moments


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


@dataclass(frozen=True)
class Reference:
    """The factors of ψ, and ψ itself."""

    places: dict[str, slice]
    """Where each parameter's entries lie along D."""
    train: Tensor
    """c_{s,i} 1[k∈B_i] w_{i,k} P_s ∇L_k(θ_i), (N, N, M, D) over s, i, k; its sum over i is φ_s^train(k)."""
    auxiliary: Tensor
    """The same for the auxiliary loss in the place of samples, (N, N, D) over s, i."""
    decay: Tensor
    """What the weight decay of step i does in step s, (N, N, D) over s, i; its sum over i is r_s."""
    moved: Tensor
    """θ_s − θ_{s+1}, (N, D)."""
    test: Tensor
    """φ_s^test(x)_j, (N, X, O, D)."""
    before: Tensor
    """f(θ_s, b_s), (N, X, O); b_s are the model's buffers."""
    between: Tensor
    """f(θ_{s+1}, b_s), (N, X, O)."""
    after: Tensor
    """f(θ_{s+1}, b_{s+1}), (N, X, O)."""

    def psi(self) -> Tensor:
        """ψ(s, θ_d, k, x)_j = φ_s^test(x)_{j,d} φ_s^train(k)_d, (N, D, M, X, O)."""
        train = self.train.sum(1)  # N M D
        return self.test.permute(0, 3, 1, 2)[:, :, None] * train.permute(0, 2, 1)[:, :, :, None, None]

    def psi_reg(self) -> Tensor:
        """ψ^reg(s, θ_d, x)_j = φ_s^test(x)_{j,d} (r_s)_d, (N, D, X, O)."""
        return self.test.permute(0, 3, 1, 2) * self.decay.sum(1)[:, :, None, None]

    def parts(self, first: int = 0) -> dict[str, Tensor]:
        """The parts of θ_s − θ_{s+1}, (N, D) each, as seen by someone who watches from step `first` on."""
        kernel, decay = self.train[:, first:].sum((1, 2)), self.decay[:, first:].sum(1)
        auxiliary = self.auxiliary[:, first:].sum(1)
        past = (self.train[:, :first].sum(2) + self.decay[:, :first] + self.auxiliary[:, :first]).sum(1)
        return {
            "kernel": kernel,
            "regularization": decay,
            "auxiliary": auxiliary,
            "past": past,
            "rounding": self.moved - kernel - decay - auxiliary - past,
            "momentum": torch.stack([by_step[first:s].sum((0, 1)) for s, by_step in enumerate(self.train)]),
        }

    def influence(self, part: Tensor) -> Tensor:
        """φ_s^test(x)_{j,d} part_{s,d}, (N, D, X, O)."""
        return self.test.permute(0, 3, 1, 2) * part[:, :, None, None]

    def over(self, groups: Mapping[str, Sequence[str]], values: Tensor) -> Tensor:
        """Sums the axis D (the second) over each group's parameters: (N, D, …) → (N, G, …)."""
        sums = [
            sum((values[:, self.places[name]].sum(1) for name in names), torch.zeros_like(values[:, 0]))
            for names in groups.values()
        ]
        return torch.stack(sums, 1)


MAPS: dict[str, Callable[[Sequence[Settings], Sequence[Tensor]], list[Map]]] = {
    "AdamW": adam, "Adam": adam, "NAdam": nadam, "RAdam": radam, "SGD": sgd, "RMSprop": rmsprop, "Adagrad": adagrad,
    "Adadelta": adadelta, "Lion": lion, "Muon": muon,
}  # fmt: skip


def train_features(
    optimizer: torch.optim.Optimizer, moments: Sequence[Moment], samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `train`, `auxiliary` and `decay` of a `Reference`. A parameter's steps are those at which the optimizer
    updated it."""
    places, size = layout(moments[0].before)
    train = torch.zeros(len(moments), len(moments), samples, size, dtype=torch.float64)
    auxiliary = torch.zeros(len(moments), len(moments), size, dtype=torch.float64)
    decay = torch.zeros_like(auxiliary)
    for name, place in places.items():
        touched = [i for i, moment in enumerate(moments) if name in moment.settings]
        for count, s in enumerate(touched, start=1):
            steps = touched[:count]
            past = [moments[i].settings[name] for i in steps]
            maps = MAPS[type(optimizer).__name__](past, [seen(moments[i], name) for i in steps])
            for i, then, mapped in zip(steps, past, maps, strict=True):
                moment, sign = moments[i], -1 if then.get("maximize") else 1
                for k, weight, gradients in zip(moment.turn.index, moment.turn.weights, moment.gradients, strict=True):
                    train[s, i, k, place] += mapped(sign * moment.clip * weight * gradients[name]).flatten()
                auxiliary[s, i, place] += mapped(sign * moment.clip * moment.auxiliary[name]).flatten()
                if not decoupled(then):
                    decay[s, i, place] += mapped(then["weight_decay"] * moment.before[name]).flatten()
            if decoupled(past[-1]):
                decay[s, s, place] += (past[-1]["lr"] * past[-1]["weight_decay"] * moments[s].before[name]).flatten()
    return train, auxiliary, decay


def decoupled(settings: Settings) -> bool:
    """Whether weight decay stays out of the gradient, as in AdamW; Lion and Muon have no other."""
    return bool(settings.get("decoupled_weight_decay", "betas" in settings or "ns_steps" in settings))


def seen(moment: Moment, name: str) -> Tensor:
    """The gradient as the optimizer sees it: ± Σ_k w_k ∇L_k(θ_s), clipped, and coupled weight decay added."""
    settings, theta = moment.settings[name], moment.before[name]
    total = torch.zeros_like(theta)
    for weight, gradients in zip(moment.turn.weights, moment.gradients, strict=True):
        total += weight * gradients[name]
    total = moment.clip * (total + moment.auxiliary[name])
    total = -total if settings.get("maximize") else total
    return total if decoupled(settings) else total + settings["weight_decay"] * theta


def layout(parameters: Mapping[str, Tensor]) -> tuple[dict[str, slice], int]:
    places, start = {}, 0
    for name, parameter in parameters.items():
        places[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return places, start


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in parameters.values()])


Rule = Sequence[tuple[float, float]]
"""The times t in [0, 1] at which the integral over a step is evaluated, each with its weight."""


def gauss_legendre(nodes: int) -> Rule:
    times, weights = np.polynomial.legendre.leggauss(nodes)  # on [−1, 1]
    return tuple((float(time + 1) / 2, float(weight) / 2) for time, weight in zip(times, weights, strict=True))


def reference(training: Training, target: Callable[[nn.Module], Tensor], rule: Rule) -> Reference:
    """Trains, and explains `target(model)` → (X, O), integrating every step by the rule."""
    moments = record(training)
    places, size = layout(moments[0].before)
    train, auxiliary, decay = train_features(training.optimizer, moments, len(training.x))
    model = deepcopy(training.model).eval().requires_grad_()

    def value(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        model.load_state_dict({**parameters, **buffers}, strict=False)
        return target(model)

    features, before, between, after = [], [], [], []
    for moment in moments:
        before.append(value(moment.before, moment.buffers_before).detach())
        between.append(value(moment.after, moment.buffers_before).detach())
        after.append(value(moment.after, moment.buffers_after).detach())
        phi = torch.zeros(*before[-1].shape, size, dtype=torch.float64)
        for time, weight in rule:
            theta = {n: moment.before[n] + time * (moment.after[n] - moment.before[n]) for n in places}
            outputs = value(theta, moment.buffers_before)
            for x, row in enumerate(outputs):
                for j, output in enumerate(row):
                    found = torch.autograd.grad(output, list(model.parameters()), retain_graph=True, allow_unused=True)
                    for place, gradient in zip(places.values(), found, strict=True):
                        if gradient is not None:
                            phi[x, j, place] += weight * gradient.flatten()
        features.append(phi)
    moved = torch.stack([flat(moment.before) - flat(moment.after) for moment in moments])
    stacks = (torch.stack(values) for values in (features, before, between, after))
    return Reference(places, train, auxiliary, decay, moved, *stacks)
