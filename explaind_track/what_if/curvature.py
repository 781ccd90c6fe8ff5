"""How a batch's gradient depends on its samples' weights and on the parameters, along the adjoints of many targets.

With g(w, θ) = Σ_k w_k ∇L_k(θ), computed with a graph, one more reverse pass of ⟨λ, g⟩ gives both

    ∂⟨λ, g⟩/∂w_k = ⟨λ, ∇L_k⟩    and    ∂⟨λ, g⟩/∂θ = Σ_k w_k ∇²L_k λ

in the very pass that training ran: the same masks, the same batch statistics.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import Tensors, cuts
from explaind_track.engine.batch_losses import BatchLosses, SampleLoss
from explaind_track.engine.functional import Functional, differentiable_attention, writable
from explaind_track.engine.memory import activation_bytes
from explaind_track.what_if.running_statistics import RunningStatistics
from explaind_track.what_if.step_gradients import AuxiliaryLosses

Settled = dict[str, tuple[float, Tensor]]
"""How a pass moves running statistics, b ← slope · b + offset, by name."""


class Curvature:
    """Products with the gradients and Hessians of one run's batches."""

    def __init__(self, model: nn.Module, sample_loss: SampleLoss, auxiliary: AuxiliaryLosses, memory: int) -> None:
        """memory: bytes that one pass may take."""
        self._losses, self._auxiliary, self._memory = BatchLosses(model, sample_loss), auxiliary, memory
        self._functional: Functional = self._losses.functional
        self.statistics = RunningStatistics(model)
        self._batched = True
        """Whether reverse passes of several targets go together."""
        self._activation_bytes = 0

    def gradient(self, state: State, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        """Σ_k w_k ∇L_k by parameter, with the weights in the loss."""
        leaves = _leaves(state, names)

        def pull(losses: Tensor) -> dict[str, Tensor]:
            weight = loss_weights(batch, losses)
            return _filled(torch.autograd.grad(losses, list(leaves.values()), weight, allow_unused=True), leaves)

        with differentiable_attention():
            return self._losses.at(state, batch).held(leaves, pull)

    def along(
        self, state: State, batch: Batch, adjoint: Tensors, names: list[str], running: Tensors, before: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Settled]:
        """Returns ⟨λ, ∇L_k⟩, (R, N); Σ_k w_k ∇²L_k λ with respect to the parameters named, (R, *shape) each, and with
        it what the running statistics add; Σ_k w_k ∇L_k by parameter; and how the pass moves the statistics.

        adjoint: λ by parameter, (R, *shape); running: of the running statistics behind the batch. before: how many
        batches of the step have run already.
        """
        leaves = _leaves(state, list(dict.fromkeys((*adjoint, *names))))

        at_once = self._at_once(state, batch)

        def products(losses: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Settled]:
            settled = self.statistics.settled(list(seen), state.buffers, before)
            weight = loss_weights(batch, losses).requires_grad_()
            gradient = _with_graph(losses, {name: leaves[name] for name in adjoint}, weight)
            wanted = {"": weight, **{name: leaves[name] for name in names}}

            outputs = {**gradient, **{name: offset for name, (_, offset) in settled.items()}}
            rows = self._pulled(outputs, {**adjoint, **running}, wanted, at_once)
            found = _filled([gradient.get(name) for name in adjoint], leaves, adjoint)
            return rows.pop(""), rows, found, {n: (slope, offset.detach()) for n, (slope, offset) in settled.items()}

        losses = self._losses.at(state, batch)
        with differentiable_attention(), self.statistics.inputs() as seen:
            return losses.held(leaves, products)

    def along_auxiliary(
        self, state: State, loss: str, adjoint: Tensors, names: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """∇²A λ with respect to the parameters named, (R, *shape) each, of an auxiliary loss A; and ∇A."""
        leaves = _leaves(state, list(dict.fromkeys((*adjoint, *names))))

        def products(value: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            gradient = _with_graph(value, {name: leaves[name] for name in adjoint}, torch.ones_like(value))
            rows = self._pulled(gradient, adjoint, {name: leaves[name] for name in names}, 1)
            return rows, _filled([gradient.get(name) for name in adjoint], leaves, adjoint)

        return self._functional.at(state, self._auxiliary[loss]).held(leaves, products)

    def auxiliary_gradient(self, state: State, loss: str, names: list[str]) -> dict[str, Tensor]:
        """∇A by parameter, of an auxiliary loss A."""
        leaves = _leaves(state, names)

        def pull(value: Tensor) -> dict[str, Tensor]:
            return _filled(torch.autograd.grad(value, list(leaves.values()), allow_unused=True), leaves)

        return self._functional.at(state, self._auxiliary[loss]).held(leaves, pull)

    def _pulled(
        self, gradient: dict[str, Tensor], adjoint: Tensors, wanted: dict[str, Tensor], at_once: int
    ) -> dict[str, Tensor]:
        """∂⟨λ, g⟩/∂x for each of R targets and each x that is wanted, (R, *shape)."""
        count = len(next(iter(adjoint.values())))
        outputs = {name: value for name, value in gradient.items() if value.requires_grad}
        if not outputs:
            return {name: value.new_zeros(count, *value.shape) for name, value in wanted.items()}

        pieces = []
        for rows in cuts(0, count, at_once if self._batched else 1):
            pieces.append(self._pull(outputs, {name: adjoint[name][rows] for name in outputs}, list(wanted.values())))
        return {name: torch.cat([piece[place] for piece in pieces]) for place, name in enumerate(wanted)}

    def _pull(self, outputs: Tensors, adjoint: Tensors, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        values, rows = list(outputs.values()), list(adjoint.values())
        if self._batched and len(rows[0]) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message="There is a performance drop")
                    return torch.autograd.grad(values, wanted, rows, is_grads_batched=True, **options)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, UserWarning):
                self._batched = False
        singles = [
            torch.autograd.grad(values, wanted, [row[place] for row in rows], **options)
            for place in range(len(rows[0]))
        ]
        return tuple(torch.stack(of_one) for of_one in zip(*singles, strict=True))

    def _at_once(self, state: State, batch: Batch) -> int:
        """How many targets' passes the memory allows together."""
        if not self._activation_bytes:
            point, device = writable(state), next(iter(state.parameters.values())).device
            with replayed_random_state(random_state(device)):
                kept = activation_bytes(self._functional, point, lambda m: self._losses.sample_loss(m, batch.data))
            self._activation_bytes = max(1, kept // batch.size)
        return max(1, self._memory // (4 * self._activation_bytes * batch.size))


def loss_weights(batch: Batch, losses: Tensor) -> Tensor:
    """w_k in the loss, before the gradient was altered, (N,)."""
    weight = batch.weight if batch.altered is None else batch.altered.loss_weight
    return weight.to(losses).clone() if isinstance(weight, Tensor) else torch.full_like(losses, weight).detach()


def _leaves(state: State, names: list[str]) -> dict[str, Tensor]:
    return {name: state.parameters[name].detach().requires_grad_() for name in names}


def _with_graph(value: Tensor, leaves: Tensors, weight: Tensor) -> dict[str, Tensor]:
    """Jᵀ w by parameter, with a graph; without those that the value does not depend on."""
    rows = torch.autograd.grad(value, list(leaves.values()), weight, create_graph=True, allow_unused=True)
    return {name: row for name, row in zip(leaves, rows, strict=True) if row is not None}


def _filled(rows: Iterable[Tensor | None], leaves: Tensors, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Rows by parameter, 0 in the place of None."""
    return {
        name: torch.zeros_like(leaves[name]) if row is None else row.detach()
        for name, row in zip(leaves if names is None else names, rows, strict=True)
    }
