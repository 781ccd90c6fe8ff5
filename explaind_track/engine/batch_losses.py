"""The losses of a batch's samples, as training computed them: same mode, same random numbers, same buffers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import Tensors, tree_map, tree_slice, upcast
from explaind_track.engine.derivatives import PointFunction, Result, refuse_reentrant
from explaind_track.engine.functional import Functional, writable

SampleLoss = Callable[[nn.Module, Any], Tensor]
"""`sample_loss(model, batch)` → the unreduced loss of every sample, (N,)."""


def upcast_batch(batch: Batch) -> Batch:
    """The same samples with bfloat16 and float16 in float32, as models of these are explained."""
    return replace(batch, data=tree_map(upcast, batch.data))


class BatchLosses:
    """The unreduced losses of batches of one training run."""

    def __init__(self, model: nn.Module, sample_loss: SampleLoss) -> None:
        self.functional = Functional(model)
        self.sample_loss = sample_loss
        self._checked = False

    def at(self, state: State, batch: Batch) -> PointFunction:
        """The batch's losses (N,) as a function of some of the parameters, however often they are asked for.

        Raises ValueError for reentrant checkpoints; the function does where `sample_loss` does not return one loss for
        each sample.
        """
        if not self._checked:
            self._checked = True
            self._run_plainly(state, batch, refuse_reentrant)

        def run(moved: Tensors, use: Callable[[Tensor], Any]) -> Any:
            def losses(model: nn.Module) -> Any:
                return use(one_for_each(self.sample_loss(model, batch.data), batch.size))

            point = State({**state.parameters, **moved}, state.buffers)
            return self.functional.replay(point, batch.random_state, losses)

        return PointFunction(run)

    def plain(self, state: State, batch: Batch) -> Tensor:
        """The batch's losses as training computed them, in a pass like training's: with a graph, and by its kernels."""
        return self._run_plainly(state, batch, lambda losses: losses.detach())

    def _run_plainly(self, state: State, batch: Batch, use: Callable[[Tensor], Result]) -> Result:
        """`use(losses)`, in a pass in which all parameters require their gradients."""
        leaves = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
        return self.at(state, batch).held(leaves, use)

    def stand_alone(self, state: State, batch: Batch) -> bool:
        """Whether each sample's loss depends on that sample alone, as far as this batch tells: no random number is
        drawn, and its last sample has the same loss without the others."""
        device = next(iter(state.parameters.values())).device
        before = random_state(device)
        with replayed_random_state(before), torch.no_grad():
            together = self._now(state, batch.data, batch.size)[-1]
            if any(not torch.equal(drawn, before[name]) for name, drawn in random_state(device).items()):
                return False
            try:
                alone = self._now(state, tree_slice(batch.data, batch.size - 1, batch.size), 1)[0]
            except (RuntimeError, ValueError):  # batch norm needs more than one sample
                return False
        tolerance = together.abs().clamp(min=1e-3) * torch.finfo(together.dtype).eps ** 0.5
        return bool((alone - together).abs() <= tolerance)

    def _now(self, state: State, data: Any, size: int) -> Tensor:
        """The losses of `size` samples with the random numbers that come next."""
        return one_for_each(self.functional(writable(state), lambda model: self.sample_loss(model, data)), size)


def one_for_each(losses: Tensor, size: int) -> Tensor:
    """The losses, (N,). Raises ValueError for what is not one loss for each sample."""
    if losses.shape != (size,):
        raise ValueError(
            f"sample_loss must return the unreduced losses of its {size} samples, ({size},), "
            f'not {tuple(losses.shape)}; use reduction="none", and a mean over all but the first axis'
        )
    return upcast(losses)
