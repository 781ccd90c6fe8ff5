"""The gradient of a recorded step, computed again from its batches by a backward pass as training's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from explaind_track.core.alterations import Alteration
from explaind_track.core.rng import replayed_random_state
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import Tensors
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.functional import Functional
from explaind_track.explanation.sample_axis import Data, with_data
from explaind_track.record.schema import StepRecord

AuxiliaryLosses = Mapping[str, Callable[[nn.Module], Tensor]]


@dataclass(frozen=True)
class Computed:
    """What a step's passes give."""

    gradients: dict[str, Tensor]
    """As the optimizer uses them, by parameter."""
    auxiliary: dict[str, dict[str, Tensor]]
    """Those of auxiliary losses among them."""
    buffers: Tensors
    """The model's behind the forward passes."""
    batches: tuple[Batch, ...]
    """With the weights that their samples have in the gradient."""


class StepGradients:
    """Computes the gradients of one run's steps."""

    def __init__(
        self,
        model: nn.Module,
        sample_loss: SampleLoss,
        data: Data | None,
        auxiliary: AuxiliaryLosses,
        order: Sequence[str],
    ) -> None:
        """order: of the parameters, in which clipping adds up their norms."""
        self._functional, self._sample_loss = Functional(model), sample_loss
        self._data, self._auxiliary, self._order = data, auxiliary, order

    def at(self, state: State, record: StepRecord, batches: Sequence[Batch]) -> Computed:
        """The gradient of the step's batches where the model is now."""
        moving = [name for name in self._order if name in record.moved and name not in record.frozen]
        gradients, buffers = self._backward(state, batches, moving)
        auxiliary = self._auxiliary_gradients(state, record, moving)
        for found in auxiliary.values():
            for name, value in found.items():
                gradients[name] = gradients[name] + value

        # what the loop does to the gradient
        factor = 1.0
        for alteration in batches[0].altered.changes if batches and batches[0].altered else ():
            factor *= alter(alteration, gradients)
        auxiliary = {loss: {n: value * factor for n, value in found.items()} for loss, found in auxiliary.items()}
        gradients |= {name: torch.zeros_like(state.parameters[name]) for name in record.frozen}
        return Computed(gradients, auxiliary, buffers, tuple(_scaled(batch, factor) for batch in batches))

    def _backward(
        self, state: State, batches: Sequence[Batch], moving: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensors]:
        """The gradient of all batches' losses, and the buffers behind their forward passes."""
        parameters: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
        leaves = {name: parameters[name].requires_grad_() for name in moving}
        buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
        device = next(iter(parameters.values())).device

        for batch in batches:
            told = with_data(batch, self._data, device)

            def backward(model: nn.Module, told: Batch = told) -> None:
                losses = self._sample_loss(model, told.data)
                weight = told.weight if told.altered is None else told.altered.loss_weight
                (losses * (weight.to(losses) if isinstance(weight, Tensor) else weight)).sum().backward()

            with replayed_random_state(batch.random_state), torch.enable_grad():
                self._functional(State(parameters, buffers), backward)
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}, buffers

    def _auxiliary_gradients(
        self, state: State, record: StepRecord, moving: Sequence[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Of each auxiliary loss, before the loop alters them."""
        found = {}
        for loss in record.auxiliary:
            parameters: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
            leaves = [parameters[name].requires_grad_() for name in moving]
            with torch.enable_grad():
                value = self._functional(State(parameters, state.buffers), self._auxiliary[loss])
                rows = torch.autograd.grad(value, leaves, allow_unused=True)
            found[loss] = {name: row for name, row in zip(moving, rows, strict=True) if row is not None}
        return found


def alter(alteration: Alteration, gradients: Mapping[str, Tensor]) -> float:
    """Does to a step's gradient, in place, what the loop has done. Returns the factor that it has scaled it by."""
    if alteration.kind == "factor":
        for gradient in gradients.values():
            gradient.mul_(alteration.amount)
        return alteration.amount

    # torch's own arithmetic, on tensors that have these for their gradients
    holders = [_holder(gradient) for gradient in gradients.values()]
    if alteration.kind == "value":
        nn.utils.clip_grad_value_(holders, alteration.amount)
        return 1.0
    norm = nn.utils.clip_grad_norm_(holders, alteration.amount)
    return min(1.0, alteration.amount / (float(norm) + 1e-6))


def _holder(gradient: Tensor) -> Tensor:
    holder = torch.empty_like(gradient)
    holder.grad = gradient
    return holder


def _scaled(batch: Batch, factor: float) -> Batch:
    """The batch with the weights that its samples have in the gradient as it is altered."""
    return batch if batch.altered is None else replace(batch, weight=batch.altered.loss_weight * factor)
