"""Influences of a step's own samples through the gradient of that step alone, as a training loop can have them live."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_track.core.step import Step
from explaind_track.core.tensors import Tensors
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.engine.predictions import SampleTokens


@dataclass(frozen=True)
class SampleInfluence:
    """Influences of one step's samples on one target, each through the gradient of that step alone, (N,) each."""

    index: Tensor
    """Which training samples these are; −1 where the loop did not say."""
    influence: Tensor
    """`w_k ⟨φ_s^test, P (e b + d) ∇L_k(θ_s)⟩`; with the share that momentum carries, their sum is Ψ_s."""
    loss: Tensor
    weight: Tensor
    label: Tensor
    prediction: Tensor
    """Classes before the step, as the model found them in eval mode; −1 where there are none (`predictions`)."""
    tokens: tuple[SampleTokens, ...] = ()
    """Of a language model's samples, where they were asked for."""

    @classmethod
    def of(
        cls, samples: PerSampleGradients, step: Step, features: Tensors, with_tokens: bool = False
    ) -> "SampleInfluence":
        """Of all the step's samples on the target whose gradient is φ_s^test, by parameter."""
        tokens = [samples.tokens(step.before, batch) for batch in step.batches] if with_tokens else []
        influence = through_own_step(samples, step, features)
        losses = [samples.losses(step.before, batch) for batch in step.batches]
        batches = list(zip(step.batches, losses, strict=True))
        classes = [samples.classes(step.before, batch) for batch in step.batches]
        return cls(
            index=torch.cat([torch.full((b.size,), -1) if b.index is None else b.index.cpu() for b, _ in batches]),
            influence=influence,
            loss=torch.cat(losses).cpu(),
            weight=torch.cat([batch.weights(loss) for batch, loss in batches]).cpu(),
            label=torch.cat([labels for labels, _ in classes]),
            prediction=torch.cat([predictions for _, predictions in classes]),
            tokens=tuple(sample for batch in tokens for sample in batch) if all(tokens) else (),
        )

    @classmethod
    def together(cls, pieces: "Sequence[SampleInfluence]") -> "SampleInfluence":
        """The samples of all the pieces."""
        names = [name for name in vars(pieces[0]) if name != "tokens"]
        rows = {name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names}
        tokens = tuple(sample for piece in pieces for sample in piece.tokens)
        return cls(**rows, tokens=tokens if len(tokens) == len(rows["index"]) else ())


def through_own_step(samples: PerSampleGradients, step: Step, features: Tensors) -> Tensor:
    """The influences alone, (N,) over all the step's batches."""
    # φ → (b Q e + d) P φ, whose product with w_k ∇L_k it is; −1 where the optimizer maximizes
    directions = {
        name: step.updates[name].adjoint(feature)[None] * step.updates[name].sign
        for name, feature in features.items()
        if not step.updates[name].frozen
    }
    if not directions:
        return torch.zeros(sum(batch.size for batch in step.batches))
    everything = {"all": list(directions)}
    products = [samples.products(step.before, batch, directions, everything)[0, 0] for batch in step.batches]
    return torch.cat(products).cpu()


def of_gradient(step: Step, features: Tensors) -> float:
    """What the step's whole gradient, but for that of auxiliary losses, did in that step: its samples' sum."""
    products = [
        (update.adjoint(feature) * update.kernel_gradient()).sum()
        for name, feature in features.items()
        if not (update := step.updates[name]).frozen
    ]
    return float(torch.stack(products).sum()) if products else 0.0
