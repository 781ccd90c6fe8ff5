"""⟨direction, ∇L_k⟩ for all samples k of a batch and R directions, without a buffer for any sample that lasts.

Few directions: one forward-mode derivative of the batch's unreduced losses for each, which runs the batch as training
did, and is exact under dropout and batch norm. Many: per-sample gradients once, a chunk of samples at a time, and a
matrix product with all directions; for models in which a sample's loss depends on that sample alone.
"""

from collections.abc import Callable, Iterator

import torch
from einops import einsum
from torch import Tensor, nn

from explaind_track.core.groups import Groups
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.step import Batch, State, Step
from explaind_track.core.tensors import Tensors, size_in_bytes, tree_slice
from explaind_track.engine.functional import (
    Functional,
    SampleLoss,
    activation_bytes,
    differentiable_attention,
    sample_gradients,
    tell_of_fallback,
    vjp_rows,
)
from explaind_track.engine.samples import CHUNK_BYTES, Samples

FORWARD_DIRECTIONS = 6
"""Up to so many directions, forward mode. Measured on the modulo-113 Transformer (4000 samples): per-sample gradients
cost as much as five directions, and the products come on top."""


class SampleProducts:
    """For the batches of one training run."""

    def __init__(
        self, model: nn.Module, sample_loss: SampleLoss, groups: Groups, memory: int, alone: bool | None = None
    ) -> None:
        """alone: whether a sample's loss depends on that sample alone; None: look at the first batch."""
        self._functional = Functional(model)
        self._samples = Samples(model, sample_loss)
        self._sample_loss = sample_loss
        self._groups, self._memory = groups, memory
        self._alone = alone
        self._vectorized = True
        self._activation_bytes = 0

    def of(self, step: Step, batch: Batch, directions: Tensors, parts: tuple[Tensor, int] | None = None) -> Tensor:
        """`w_k ⟨direction, ∇L_k(θ_s)⟩` restricted to each group, (G, R, N).

        directions: (R, *shape) by parameter; entries too small to count may be set to 0.
        parts: for each sample the part of a partition that it is in, (N,), and the number of parts P: the sums over
        them, (G, R, P), which may come cheaper than the samples themselves.
        """
        state = step.before
        self.stands_alone(step, batch)
        rows = len(next(iter(directions.values())))
        passes = rows * len(self._groups)
        weight = batch.weights(next(iter(directions.values())))
        if parts is not None:
            present = parts[0].unique()
            if len(present) < passes:
                _drop_specks(directions)
                gradients = self._part_gradients(state, batch, weight, parts[0], present, directions)
                found = self._multiply(directions, gradients, rows, len(present))
                return found.new_zeros(*found.shape[:2], parts[1]).index_copy(2, present, found)
        values = None
        if passes > FORWARD_DIRECTIONS and self._alone and self._vectorized:
            values = self._reverse(state, batch, directions, rows)
        if values is None:
            values = self._forward(state, batch, directions, rows)
        values = values * weight
        if parts is None:
            return values
        return values.new_zeros(*values.shape[:2], parts[1]).index_add_(2, parts[0], values)

    def gradient(self, step: Step, batch: Batch, share: Tensor | float, parameters: Tensors) -> dict[str, Tensor]:
        """`Σ_k w_k share_k ∇L_k(θ_s)` of the whole batch, with respect to the parameters named."""
        weight = batch.weights(next(iter(parameters.values()))) * share
        all_of_them = torch.zeros(batch.size, dtype=torch.int64)
        found = self._part_gradients(step.before, batch, weight, all_of_them, all_of_them[:1], parameters)
        return {name: rows[0] for name, rows in found.items()}

    def stands_alone(self, step: Step, batch: Batch) -> bool:
        """Whether a sample's loss depends on that sample alone, as far as the first batch told."""
        if self._alone is None:
            self._alone = self._stand_alone(step.before, batch)
        return self._alone

    def gradients(self, step: Step, batch: Batch) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """∇L_k(θ_s) by parameter, (n, *shape), chunk by chunk of the batch's samples."""
        state = step.before
        alone = self.stands_alone(step, batch)
        size = max(1, min(CHUNK_BYTES, self._memory) // size_in_bytes(state.parameters))
        for start in range(0, batch.size, size):
            rows = slice(start, min(batch.size, start + size))
            if alone:
                chunk = tree_slice(batch.data, rows.start, rows.stop)
                yield rows, sample_gradients(self._functional, self._sample_loss, state, chunk)[0]
            else:
                losses = self._losses(state, batch)
                with differentiable_attention():
                    yield rows, vjp_rows(lambda moved: losses(moved)[rows], dict(state.parameters))  # noqa: B023

    def _losses(self, state: State, batch: Batch) -> Callable[[Tensors], Tensor]:
        """The batch's losses as training computed them, however often they are asked for."""

        def losses(moved: Tensors) -> Tensor:
            buffers = {name: value.clone() for name, value in state.buffers.items()}
            with replayed_random_state(batch.random_state):
                return self._samples.losses(self._functional, State({**state.parameters, **moved}, buffers), batch)

        return losses

    def _forward(self, state: State, batch: Batch, directions: Tensors, rows: int) -> Tensor:
        losses = self._losses(state, batch)
        at_once = self._directions_at_once(state, batch)
        result: list[Tensor] = []
        with differentiable_attention():
            for names in self._groups.values():
                members = {name: directions[name] for name in names if name in directions}
                if not members:
                    result.append(batch.weights(next(iter(directions.values()))).new_zeros(rows, batch.size))
                    continue
                primals = {name: state.parameters[name] for name in members}
                pieces = [
                    self._functional.jvp(
                        losses, primals, {n: d[start : start + at_once] for n, d in members.items()}, bool(self._alone)
                    )
                    for start in range(0, rows, at_once)
                ]
                result.append(torch.cat(pieces))
        return torch.stack(result)

    def _directions_at_once(self, state: State, batch: Batch) -> int:
        if not self._alone:
            return 1
        if not self._activation_bytes:
            one = tree_slice(batch.data, 0, 1)
            kept = activation_bytes(self._functional, state, lambda model: self._sample_loss(model, one))
            self._activation_bytes = max(1, kept)
        return max(1, self._memory // (2 * self._activation_bytes * batch.size))

    def _reverse(self, state: State, batch: Batch, directions: Tensors, rows: int) -> Tensor | None:
        """None where the samples' gradients cannot be taken by `vmap`."""
        pieces = []
        _drop_specks(directions)
        size = max(1, min(CHUNK_BYTES, self._memory) // size_in_bytes(state.parameters))
        for start in range(0, batch.size, size):
            chunk = tree_slice(batch.data, start, start + size)
            try:
                gradients, _ = sample_gradients(self._functional, self._sample_loss, state, chunk)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                self._vectorized = False
                tell_of_fallback("one direction at a time", error)
                return None
            pieces.append(self._multiply(directions, gradients, rows, min(size, batch.size - start)))
        return torch.cat(pieces, dim=2)

    def _multiply(self, directions: Tensors, gradients: Tensors, rows: int, count: int) -> Tensor:
        """The products of every direction with every gradient by group, (G, R, count); both may be written over."""
        _drop_specks(gradients)
        result = next(iter(directions.values())).new_zeros(len(self._groups), rows, count)
        for group, names in enumerate(self._groups.values()):
            for name in names:
                if name in directions:
                    one, other = (value.reshape(len(value), -1) for value in (directions[name], gradients[name]))
                    result[group] += einsum(one, other, "r d, n d -> r n")
        return result

    def _part_gradients(
        self, state: State, batch: Batch, weight: Tensor, parts: Tensor, present: Tensor, directions: Tensors
    ) -> dict[str, Tensor]:
        """Σ_{k in part} w_k ∇L_k by parameter, (parts present, *shape): one forward pass, one reverse pass for each."""
        leaves = {name: state.parameters[name].detach().requires_grad_() for name in directions}
        with torch.enable_grad(), differentiable_attention():
            losses = self._losses(state, batch)(leaves)
        rows = [
            torch.autograd.grad(
                losses, list(leaves.values()), weight * (parts == part), retain_graph=True, allow_unused=True
            )
            for part in present
        ]
        return {
            name: torch.stack([torch.zeros_like(leaf) if row[place] is None else row[place] for row in rows])
            for place, (name, leaf) in enumerate(leaves.items())
        }

    def _stand_alone(self, state: State, batch: Batch) -> bool:
        """Whether no random number is drawn, and a sample alone has the loss that it has in its batch."""
        device = next(iter(state.parameters.values())).device
        last = Batch(1, 1.0, None, tree_slice(batch.data, batch.size - 1, batch.size))
        buffers = [{name: value.clone() for name, value in state.buffers.items()} for _ in range(2)]
        states = [State(state.parameters, own) for own in buffers]
        before = random_state(device)
        with replayed_random_state(before), torch.no_grad():
            together = self._samples.losses(self._functional, states[0], batch)[-1]
            if not all(torch.equal(one, before[name]) for name, one in random_state(device).items()):
                return False
            try:
                alone = self._samples.losses(self._functional, states[1], last)[0]
            except (RuntimeError, ValueError):  # batch norm needs more than one sample
                return False
        tolerance = together.abs().clamp(min=1e-3) * torch.finfo(together.dtype).eps ** 0.5
        return bool((alone - together).abs() <= tolerance)


def _drop_specks(rows: Tensors) -> None:
    """Sets to 0 what is so far below a tensor's largest entry that its products may be subnormal numbers: no sum in
    this precision sees those, but a CPU multiplies them a hundred times slower. Gradients of well-learned samples are
    full of them (modulo-113 Transformer, step 1700, decoder, 200 × 1000 products: 12 s instead of 0.09 s)."""
    for value in rows.values():
        if value.device.type != "cpu" or value.numel() == 0:
            continue
        low, high = value.aminmax()
        limit = torch.finfo(value.dtype).tiny ** 0.5 * max(-float(low), float(high))
        torch.ops.aten.hardshrink.out(value, limit, out=value)
