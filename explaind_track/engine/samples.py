"""Training samples: their gradients as the step's gradient, the check that they are it, and their influences."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor, nn

from explaind_track.core.rng import replayed_random_state
from explaind_track.core.step import Batch, State, Step
from explaind_track.core.tensors import Tensors, size_in_bytes, tree_slice
from explaind_track.engine.functional import Functional, SampleLoss, differentiable_attention, sample_gradients
from explaind_track.errors import SampleMismatchWarning

CHUNK_BYTES = 2**25
"""What one chunk of per-sample gradients may take. Measured on the modulo-113 Transformer (4000 samples, 2 cores):
0.21 s with 100 samples (34 MB) at a time, 0.24 s with 50, and 0.50 to 0.55 s with 200 to 1600, whose memory is faulted
in anew."""

MISMATCH = 1e-3
"""By how much (of its norm) the samples' gradients may miss the step's gradient before it is said, in float32."""


@dataclass(frozen=True)
class SampleInfluence:
    """Influences of one step's samples on one target, each through the gradient of that step alone, (N,) each."""

    index: Tensor
    influence: Tensor
    """`w_k ⟨φ_s^test, P (e b + d) ∇L_k(θ_s)⟩`; with the share that momentum carries, their sum is Ψ_s."""
    loss: Tensor
    weight: Tensor

    @classmethod
    def together(cls, pieces: "Sequence[SampleInfluence]") -> "SampleInfluence":
        """The samples of all the pieces."""
        rows = {name: torch.cat([getattr(piece, name) for piece in pieces]) for name in vars(pieces[0])}
        return cls(**rows)


class Samples:
    """The training samples of a run, known by their loss."""

    def __init__(self, model: nn.Module, sample_loss: SampleLoss) -> None:
        self._functional = Functional(model)
        self._sample_loss = sample_loss

    def losses(self, functional: Functional, state: State, batch: Batch) -> Tensor:
        losses: Tensor = functional(state, lambda model: self._sample_loss(model, batch.data))
        if losses.shape != (batch.size,):
            raise ValueError(
                f"sample_loss must return the unreduced losses of its {batch.size} samples, ({batch.size},), "
                f'not {tuple(losses.shape)}; use reduction="none", and a mean over all but the first axis'
            )
        return losses

    def gradient(self, state: State, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`Σ_k w_k ∇L_k` by parameter, the samples' losses (N,) and the norms of their gradients (N,).

        From per-sample gradients, a chunk of samples at a time. Raises ValueError for a model whose samples are not
        independent of each other (batch norm in training mode), since then there is no gradient of one sample.
        """
        self._refuse_batch_statistics()
        total = {name: torch.zeros_like(value) for name, value in state.parameters.items()}
        losses, norms = [], []
        size = max(1, CHUNK_BYTES // size_in_bytes(state.parameters))
        for start in range(0, batch.size, size):
            chunk = tree_slice(batch.data, start, start + size)
            gradients, loss = sample_gradients(self._functional, self._sample_loss, state, chunk)
            weight = batch.weights(loss)[start : start + size]
            squares = torch.zeros_like(loss)
            for name, gradient in gradients.items():
                total[name] += einsum(gradient, weight, "n ..., n -> ...")
                squares += gradient.flatten(1).square().sum(1)
            losses.append(loss)
            norms.append(squares.sqrt())
        return total, torch.cat(losses), torch.cat(norms)

    def total_gradient(self, state: State, batches: Sequence[Batch], names: Iterable[str]) -> dict[str, Tensor]:
        """`Σ_k w_k ∇L_k` over all the batches, run as training ran them, by the parameters named."""
        moving = {name: state.parameters[name].detach().requires_grad_() for name in names}
        free = State({**state.parameters, **moving}, {name: value.clone() for name, value in state.buffers.items()})
        total = {name: torch.zeros_like(value) for name, value in moving.items()}
        for batch in batches:
            with replayed_random_state(batch.random_state), torch.enable_grad():
                losses = self.losses(self._functional, free, batch)
                summed = (losses * batch.weights(losses)).sum()
                parts = torch.autograd.grad(summed, list(moving.values()), allow_unused=True)
            for name, part in zip(moving, parts, strict=True):
                if part is not None:
                    total[name] += part
        return total

    def influence(self, step: Step, gradient: Tensors) -> SampleInfluence:
        """The influence of the step's samples on the target whose gradient φ_s^test is given, by one forward-mode
        derivative of the unreduced losses for each batch: `⟨μ, ∇L_k⟩` for all k at once."""
        direction = {
            name: step.updates[name].adjoint(value)[None] * step.updates[name].sign for name, value in gradient.items()
        }
        primals = {name: step.before.parameters[name] for name in direction}
        rows: dict[str, list[Tensor]] = {"index": [], "influence": [], "loss": [], "weight": []}
        for batch in step.batches:
            with replayed_random_state(batch.random_state), differentiable_attention():
                loss, slope = self._slopes(step.before, batch, primals, direction)
            weight = batch.weights(loss)
            unnamed = torch.full((batch.size,), -1)
            for name, value in zip(
                rows, (unnamed if batch.index is None else batch.index, slope * weight, loss, weight), strict=True
            ):
                rows[name].append(value.cpu())
        return SampleInfluence(**{name: torch.cat(values) for name, values in rows.items()})

    def _slopes(self, state: State, batch: Batch, primals: Tensors, direction: Tensors) -> tuple[Tensor, Tensor]:
        """The losses (N,) and their derivatives in one direction (N,)."""

        def losses(moved: Tensors) -> Tensor:
            buffers = {name: value.clone() for name, value in state.buffers.items()}
            return self.losses(self._functional, State({**state.parameters, **moved}, buffers), batch)

        slope = self._functional.jvp(losses, primals, direction, together=False)[0]
        with torch.no_grad():
            return losses({}), slope

    def _refuse_batch_statistics(self) -> None:
        for name, module in self._functional.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"'{name}' normalises with the statistics of its batch, so no sample has a gradient of its own; "
                    "use loss.backward() instead of tracker.backward(), or put the module into eval mode"
                )


def compare_gradients(total: Tensors, gradients: Tensors, number: int) -> None:
    """Compares `Σ_k w_k ∇L_k` with the gradients the optimizer is about to use; warns with SampleMismatchWarning."""
    off = sum(float((total[name] - gradient).square().sum()) for name, gradient in gradients.items()) ** 0.5
    norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    if off > MISMATCH * norm:
        warnings.warn(
            f"at step {number}, the per-sample losses do not add up to the gradient that the optimizer saw: they "
            f"miss it by {off / max(norm, 1e-30):.2g} of its norm. Influences of samples are wrong until they do "
            "(those of groups are not). Tell tracker.batch of every batch of the step, with the weights of its "
            "samples in the loss (`weight=`; the mean if not given), and return unreduced losses in sample_loss",
            SampleMismatchWarning,
            stacklevel=2,
        )
