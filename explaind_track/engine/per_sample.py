"""Gradients of single training samples, and their products with directions, without a buffer for any sample that lasts.

⟨direction, ∇L_k⟩ for all samples k of a batch and R directions. Few directions: one forward-mode derivative of the
batch's unreduced losses for each, which runs the batch as training did, and is exact under dropout and batch norm.
Many: per-sample gradients once, a chunk of samples at a time, and a matrix product with all directions; for models in
which a sample's loss depends on that sample alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from einops import einsum
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from explaind_track.core.groups import Groups
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import (
    Tensors,
    cuts,
    size_in_bytes,
    tree_has_entries,
    tree_rows,
    tree_slice,
    tree_tensors,
    tree_with,
    upcast,
)
from explaind_track.engine.batch_losses import BatchLosses, SampleLoss, one_for_each
from explaind_track.engine.derivatives import elsewhere, prove_same, tell_of_fallback, vjp_in, vjp_rows
from explaind_track.engine.functional import Functional, differentiable_attention, writable
from explaind_track.engine.ghost_norms import GhostNorms
from explaind_track.engine.memory import MEMORY, activation_bytes
from explaind_track.engine.predictions import SampleTokens, labels_and_predictions, tokens_and_predictions

CHUNK_BYTES = 2**25
"""What one chunk of per-sample gradients may take. Measured on the modulo-113 Transformer (4000 samples, 2 cores):
0.21 s with 100 samples (34 MB) at a time, 0.24 s with 50, and 0.50 to 0.55 s with 200 to 1600, whose memory is faulted
in anew."""

FORWARD_DIRECTIONS = 6
"""Up to so many directions, forward mode. Measured on the modulo-113 Transformer (4000 samples): per-sample gradients
cost as much as five directions, and the products come on top."""


class PerSampleGradients:
    """∇L_k(θ_s) for the batches of one training run: sums of them, products with directions, and themselves."""

    def __init__(
        self, model: nn.Module, sample_loss: SampleLoss, memory: int = MEMORY, alone: bool | None = None
    ) -> None:
        """memory: bytes that one pass may take. alone: whether a sample's loss depends on that sample alone, so that
        samples and directions may be taken in any company; None: look at the first batch."""
        self._losses = BatchLosses(model, sample_loss)
        self._functional = self._losses.functional
        self._memory = memory
        self._alone = alone
        self._vectorized = True
        self._proven = False
        self._activation_bytes = 0
        self._ghosts: GhostNorms | Literal[False] | None = None
        """Whether norms come from them; None: nobody has looked yet."""

    def losses(self, state: State, batch: Batch) -> Tensor:
        """The batch's losses as training computed them, (N,), but for attention's kernel."""
        with torch.no_grad(), differentiable_attention():
            return self._losses.at(state, batch)({})

    def classes(self, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """The samples' labels and the model's predictions, (N,) each; see `labels_and_predictions`."""
        return labels_and_predictions(self._functional, state, batch)

    def tokens(self, state: State, batch: Batch) -> list[SampleTokens]:
        """The samples' tokens and the model's predictions of them; see `tokens_and_predictions`."""
        return tokens_and_predictions(self._functional, state, batch)

    def stands_alone(self, state: State, batch: Batch) -> bool:
        """Whether a sample's loss depends on that sample alone, as far as the first batch told."""
        if self._alone is None:
            self._alone = self._losses.stand_alone(state, batch)
        return self._alone

    # ------------------------------------------------- gradients

    def gradients(self, state: State, batch: Batch) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """∇L_k by parameter, (n, *shape), chunk by chunk of the batch's samples."""
        fast = self.stands_alone(state, batch) and self._can_vectorize(state, batch)
        for rows in self._chunks(state, batch):
            yield rows, self._vmapped(state, batch, rows)[0] if fast else self._one_by_one(state, batch, rows)

    def gradient(self, state: State, batch: Batch, share: Tensor | float, parameters: Tensors) -> dict[str, Tensor]:
        """`Σ_k w_k share_k ∇L_k` of the whole batch, run as training did, with respect to the parameters named."""
        weight = batch.weights(next(iter(parameters.values()))) * share
        same_part = torch.zeros(batch.size, dtype=torch.int64, device=weight.device)
        sums = self._part_gradients(state, batch, weight, same_part, same_part[:1], parameters)
        return {name: parts[0] for name, parts in sums.items()}

    def gradient_and_norms(self, state: State, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`Σ_k w_k ∇L_k` by parameter, the samples' losses (N,) and the norms of their gradients (N,).

        By one backward pass and the layers' `GhostNorms` where the model allows it, else from per-sample gradients, a
        chunk of samples at a time. Raises ValueError for a model whose samples are not independent of each other (batch
        norm in training mode), since then there is no gradient of one sample.
        """
        self._refuse_batch_statistics()
        if self._ghosts is None:
            self._ghosts = self._proven_ghosts(state, batch)
        if self._ghosts:
            try:
                return self._by_ghosts(self._ghosts, state, batch)
            except NotImplementedError:  # this batch takes another way through the model
                pass
        return self._by_samples(state, batch)

    def _proven_ghosts(self, state: State, batch: Batch) -> GhostNorms | Literal[False]:
        """The model's, if the norms of two samples are those of their own gradients; else False."""
        two = replace(batch, size=min(2, batch.size), weight=1.0, data=tree_slice(batch.data, 0, min(2, batch.size)))
        try:
            ghosts = GhostNorms(self._functional.model, state.parameters)
            if not self._losses.stand_alone(state, batch):
                return False
            found, wanted = (way(state, two)[2] for way in (partial(self._by_ghosts, ghosts), self._by_samples))
        except (RuntimeError, NotImplementedError):
            return False
        eps = torch.finfo(wanted.dtype).eps
        return ghosts if bool(((found - wanted).abs() <= wanted * eps**0.5).all()) else False

    def _by_ghosts(self, ghosts: GhostNorms, state: State, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `gradient_and_norms`. Raises NotImplementedError where the norms cannot be had so."""
        leaves = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
        weight = batch.weights(next(iter(leaves.values())))
        if not bool(weight.all()):
            raise NotImplementedError("what has no weight in the loss has no gradient in its backward pass")

        def back(model: nn.Module) -> Tensor:
            losses = one_for_each(self._losses.sample_loss(model, batch.data), batch.size)
            (losses * weight).sum().backward()
            return losses.detach()

        with ghosts.watching(batch.size) as squares, torch.enable_grad():
            losses = self._functional(writable(State(leaves, state.buffers)), back)
        norms = squares.total().sqrt() / weight.abs()
        gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
        return gradients, losses, norms.to(losses)

    def _by_samples(self, state: State, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `gradient_and_norms`."""
        total = {name: torch.zeros_like(value) for name, value in state.parameters.items()}
        losses, norms = [], []

        for rows in self._chunks(state, batch):
            gradients, loss = self._vmapped(state, batch, rows)
            weight = batch.weights(loss)[rows]
            squares = torch.zeros_like(loss)
            for name, gradient in gradients.items():
                total[name] += einsum(gradient, weight, "n ..., n -> ...")  # Σ_k w_k ∇L_k
                squares += gradient.reshape(len(gradient), -1).square().sum(1)  # ‖∇L_k‖²
            losses.append(loss)
            norms.append(squares.sqrt())

        return total, torch.cat(losses), torch.cat(norms)

    def _chunks(self, state: State, batch: Batch) -> list[slice]:
        """The batch's samples, as many at a time as whole gradients of them may be held."""
        size = max(1, min(CHUNK_BYTES, self._memory) // size_in_bytes(state.parameters))
        return cuts(0, batch.size, size)

    def _can_vectorize(self, state: State, batch: Batch) -> bool:
        """Whether gradients by `vmap` are those of backward passes: looked at once, for one sample, at parameters that
        the model does not have itself."""
        if self._vectorized and not self._proven:
            point = State(elsewhere(state.parameters), state.buffers)
            first = replace(batch, size=1, data=tree_slice(batch.data, 0, 1))
            try:
                plain = vjp_rows(self._losses.at(point, first), point.parameters)
                prove_same(self._vmapped(point, first, slice(0, 1))[0], plain)
                self._proven = True
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                self._vectorized = False
                tell_of_fallback("one direction at a time", error)
        return self._vectorized

    def _vmapped(self, state: State, batch: Batch, rows: slice) -> tuple[dict[str, Tensor], Tensor]:
        """Of some samples, each without the others: their gradients, (n, *shape) by parameter, and losses (n,)."""
        chunk = tree_slice(batch.data, rows.start, rows.stop)
        return sample_gradients(self._functional, self._losses.sample_loss, state, chunk)

    def _one_by_one(self, state: State, batch: Batch, rows: slice) -> dict[str, Tensor]:
        """The gradients of some samples in the company of the whole batch: a reverse pass for each."""
        losses = self._losses.at(state, batch)
        with differentiable_attention():
            return vjp_rows(losses.then(lambda values: values[rows]), state.parameters)

    def _part_gradients(
        self, state: State, batch: Batch, weight: Tensor, parts: Tensor, present: Tensor, parameters: Tensors
    ) -> dict[str, Tensor]:
        """Σ_{k in part} w_k ∇L_k by parameter, (parts present, *shape): one forward pass, one reverse pass for each."""
        primals = {name: state.parameters[name] for name in parameters}

        # L → Jᵀ (w · 1[part]), for one part after the other
        weights = torch.stack([weight * (parts == part) for part in present])
        with differentiable_attention():
            return vjp_in(self._losses.at(state, batch), primals, lambda losses: weights.to(losses))

    def _refuse_batch_statistics(self) -> None:
        for name, module in self._functional.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"'{name}' normalises with the statistics of its batch, so no sample has a gradient of its own; "
                    "use loss.backward() instead of tracker.backward(), or put the module into eval mode"
                )

    # ------------------------------------------------- products

    def products(self, state: State, batch: Batch, directions: Tensors, groups: Groups) -> Tensor:
        """`w_k ⟨direction, ∇L_k⟩` restricted to each group, (G, R, N).

        directions: (R, *shape) by parameter; entries too small to count may be set to 0.
        """
        example = next(iter(directions.values()))
        many = len(example) * len(groups) > FORWARD_DIRECTIONS
        if self.stands_alone(state, batch) and many and self._can_vectorize(state, batch):
            products = self._reverse(state, batch, directions, groups)
        else:
            products = self._forward(state, batch, directions, groups)
        return products * batch.weights(example)

    def products_by_part(
        self, state: State, batch: Batch, directions: Tensors, groups: Groups, parts: Tensor, count: int
    ) -> Tensor:
        """The sums of these products over the parts of a partition, (G, R, P), which may come cheaper than they do.

        parts: the part that each sample is in, (N,); count: P, the number of parts.
        """
        example = next(iter(directions.values()))
        parts = parts.to(example.device)
        present = parts.unique()
        if len(present) >= len(example) * len(groups):
            products = self.products(state, batch, directions, groups)
            return products.new_zeros(*products.shape[:2], count).index_add_(2, parts, products)

        directions = _without_specks(directions)
        sums = self._part_gradients(state, batch, batch.weights(example), parts, present, directions)
        products = _multiply(directions, sums, groups)
        return products.new_zeros(*products.shape[:2], count).index_copy(2, present, products)

    def _forward(self, state: State, batch: Batch, directions: Tensors, groups: Groups) -> Tensor:
        """⟨direction, ∇L_k⟩, (G, R, N): the losses' derivatives in each group's directions."""
        losses = self._losses.at(state, batch)
        plain = None if self._alone else self._losses.plain(state, batch)
        at_once = self._directions_at_once(state, batch)
        example = next(iter(directions.values()))
        products: list[Tensor] = []

        with differentiable_attention():
            for names in groups.values():
                tangents = {name: directions[name] for name in names if name in directions}
                if not tangents:
                    products.append(batch.weights(example).new_zeros(len(example), batch.size))
                    continue

                # v → J v of the vector of losses: ⟨v, ∇L_k⟩ for all k
                primals = {name: state.parameters[name] for name in tangents}
                pieces = [
                    self._functional.jvp(losses, primals, _rows_of(tangents, rows), bool(self._alone), plain)
                    for rows in cuts(0, len(example), at_once)
                ]
                products.append(torch.cat(pieces))
        return torch.stack(products)

    def _directions_at_once(self, state: State, batch: Batch) -> int:
        """How many the memory allows; only where every sample stands alone may they share a pass at all."""
        if not self._alone:
            return 1
        if not self._activation_bytes:
            first = tree_slice(batch.data, 0, 1)
            kept = activation_bytes(self._functional, state, lambda model: self._losses.sample_loss(model, first))
            self._activation_bytes = max(1, kept)
        return max(1, self._memory // (2 * self._activation_bytes * batch.size))

    def _reverse(self, state: State, batch: Batch, directions: Tensors, groups: Groups) -> Tensor:
        """The same from the samples' gradients."""
        directions = _without_specks(directions)
        pieces = []
        for rows in self._chunks(state, batch):
            gradients, _ = self._vmapped(state, batch, rows)
            pieces.append(_multiply(directions, gradients, groups))
        return torch.cat(pieces, dim=2)


def sample_gradients(
    functional: Functional, sample_loss: SampleLoss, state: State, batch: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of every sample of `batch` by parameter, (N, *shape) each, and their losses (N,).

    The model is called on one sample at a time (a batch of one, under `vmap`), in whatever mode it is in; random
    operations draw for each sample afresh. Batches that hold more than tensors for each sample (such as words) cannot
    be vectorized: their samples are taken one after the other.
    """

    def loss_of_one(parameters: Tensors, tensors: list[Tensor]) -> Tensor:
        return loss_of(parameters, tree_with(batch, (tensor.unsqueeze(0) for tensor in tensors)))

    def loss_of(parameters: Tensors, single: Any) -> Tensor:
        losses: Tensor = functional(State(parameters, state.buffers), lambda model: sample_loss(model, single))
        return upcast(losses.reshape(()))

    parameters = dict(state.parameters)
    with differentiable_attention():
        if not tree_has_entries(batch):
            of_each = vmap(grad_and_value(loss_of_one), in_dims=(None, 0), randomness="different")
            gradients, losses = of_each(parameters, tree_tensors(batch))
            return gradients, losses

        singles = [tree_slice(batch, row, row + 1) for row in range(tree_rows(batch))]
        found = [grad_and_value(loss_of)(parameters, single) for single in singles]
    gradients = {name: torch.stack([gradient[name] for gradient, _ in found]) for name in parameters}
    return gradients, torch.stack([loss for _, loss in found])


def _rows_of(directions: Tensors, rows: slice) -> dict[str, Tensor]:
    return {name: direction[rows] for name, direction in directions.items()}


def _multiply(directions: Tensors, gradients: Tensors, groups: Groups) -> Tensor:
    """The products of every direction with every gradient by group, (G, R, N); the gradients may be written over."""
    gradients = _without_specks(gradients)
    example = next(iter(directions.values()))
    count = len(next(iter(gradients.values())))
    products = example.new_zeros(len(groups), len(example), count)
    for group, names in enumerate(groups.values()):
        for name in names:
            if name in directions:
                direction, gradient = (value.reshape(len(value), -1) for value in (directions[name], gradients[name]))
                products[group] += einsum(direction, gradient, "r d, n d -> r n")
    return products


def _without_specks(rows: Tensors) -> dict[str, Tensor]:
    """The rows with 0 for what is so far below a tensor's largest entry that its products may be subnormal numbers: no
    sum in this precision sees those, but a CPU multiplies them a hundred times slower. Gradients of well-learned
    samples are full of them (modulo-113 Transformer, step 1700, decoder, 200 × 1000 products: 12 s instead of 0.09 s).
    Tensors that have memory of their own for each entry are written over."""
    clean = dict(rows)
    for name, value in rows.items():
        if value.device.type != "cpu" or value.numel() == 0:
            continue
        low, high = value.aminmax()
        limit = torch.finfo(value.dtype).tiny ** 0.5 * max(-float(low), float(high))
        if 0 in value.stride():  # expanded, as the gradients are of a parameter without a part in the loss
            clean[name] = value = value.clone(memory_format=torch.contiguous_format)
        torch.ops.aten.hardshrink.out(value, limit, out=value)
    return clean
