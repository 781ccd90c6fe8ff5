"""The oracle: the paper's formulas as plain float64 loops. Slow, obvious, and without any code of the package.

Letters as in Theorem 3.1: step s (of N), earlier step i, training sample k (of M), prediction x (of X), its output j
(of O). The D parameter entries of a model lie end to end in one axis, parameter after parameter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import torch
from reference_optimizers import MAPS, Settings, decoupled
from torch import Tensor, nn


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
    """The record of a step: θ_s, θ_{s+1}, the buffers then, and every sample's own gradient at θ_s."""

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
    """The hyperparameters of each parameter that the optimizer updated."""


def copies(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def record(training: Training) -> list[Moment]:
    """Trains, and records each step."""
    model, optimizer, moments = training.model, training.optimizer, []
    parameters = dict(model.named_parameters())
    learning = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    buffers = copies(model.named_buffers())
    for turn, losses in training.losses():
        # Every sample alone, and the auxiliary loss.
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

        # The step as it is trained.
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

        # The clip, from the samples' gradients rather than from what torch made of them.
        square = sum(
            float((sum(w * g[name] for w, g in zip(turn.weights, gradients, strict=True)) + extra[name]).square().sum())
            for name in settings
        )
        clip = min(1.0, turn.clip_norm / (square**0.5 + 1e-6))
        moments.append(Moment(turn, before, after, buffers, buffers_after, gradients, extra, clip, settings))
        buffers = buffers_after
    return moments


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
        """The parts of θ_s − θ_{s+1}, (N, D) each, as seen by who watches from step `first` on."""
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
    return explain_moments(moments, training.optimizer, training.model, len(training.x), target, rule)


def explain_moments(
    moments: Sequence[Moment],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    samples: int,
    target: Callable[[nn.Module], Tensor],
    rule: Rule,
) -> Reference:
    """Explains a training that was recorded, of so many samples; the model is copied."""
    places, size = layout(moments[0].before)
    train, auxiliary, decay = train_features(optimizer, moments, samples)
    model = deepcopy(model).eval().requires_grad_()

    def value(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        model.load_state_dict({**parameters, **buffers}, strict=False)
        return target(model)

    features, before, between, after = [], [], [], []
    for moment in moments:
        before.append(value(moment.before, moment.buffers_before).detach())
        between.append(value(moment.after, moment.buffers_before).detach())
        after.append(value(moment.after, moment.buffers_after).detach())

        # φ_s = Σ_t weight(t) ∇f(θ_s(t)),  θ_s(t) = θ_s + t (θ_{s+1} − θ_s): one gradient for each prediction and output
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
