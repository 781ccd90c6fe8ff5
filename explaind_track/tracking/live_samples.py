"""Single training samples, live: a step's gradient made of theirs, the check that they add up to it, their influences.

Every rank does its own samples.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.queries import Query
from explaind_track.core.step import State, Step
from explaind_track.core.tensors import Tensors
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.features import Features
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.engine.sample_influence import SampleInfluence, through_own_step
from explaind_track.errors import SampleMismatchWarning
from explaind_track.record import history
from explaind_track.tracking import sample_panels
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.live import Live
from explaind_track.tracking.step_batches import StepBatches

CHECKED_STEPS = 3
CHECK_EVERY = 500

MISMATCH = 1e-3
"""The share of its norm by which the samples' gradients may miss the step's gradient before it is said, in float32."""


class LiveSamples:
    """Differentiates the losses of a run's single samples, step by step."""

    def __init__(
        self,
        model: nn.Module,
        sample_loss: SampleLoss,
        live: Live,
        ranks: Ranks,
        map_queries: int,
        render: Callable[[Any], Any] | None,
    ) -> None:
        ranks.refuse_common_statistics()
        if map_queries:
            import_module("matplotlib.figure")  # which takes seconds, and would in the first step that draws
        # not alone: each direction runs the batch as training did, with its random numbers and its company
        self._samples = PerSampleGradients(model, sample_loss, alone=False)
        self._live, self._ranks, self._map_queries, self._render = live, ranks, map_queries, render

    def gradient(self, state: State, batches: StepBatches) -> tuple[dict[str, Tensor], Tensor]:
        """The last batch's gradient by parameter, from per-sample gradients, and its loss.

        The loss and the norms of the samples' gradients are noted in `batches`.
        """
        batch = batches.local[-1]
        try:
            gradient, losses, norms = self._samples.gradient_and_norms(state, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            self._samples.losses(state, batch)  # where this fails too, it says what is wrong with sample_loss
            raise RuntimeError(
                "tracker.backward() takes the gradient of every sample by itself, which an operation of the model does "
                "not allow (some recurrent layers and activation checkpointing are such): use loss.backward() in its "
                "place. All influences stay exact; only the tables of samples go without their gradients' norms. "
                f"Torch's reason: {str(error).splitlines()[0]}"
            ) from error
        if batch.index is not None:
            batches.norms |= dict(zip(batch.index.tolist(), norms.tolist(), strict=True))
        loss = (losses * batch.weight).sum()
        batches.loss = (batches.loss or 0.0) + float(loss)
        return gradient, loss

    def check(
        self, batches: StepBatches, number: int, state: State, gradients: Tensors, auxiliary: Mapping[str, Tensors]
    ) -> None:
        """Compares, now and then, the sum of the samples' gradients with the step's, less the auxiliary losses'.

        Warns with SampleMismatchWarning. Every rank calls it.
        """
        due = number < CHECKED_STEPS or number % CHECK_EVERY == 0
        if not due or not batches.of_all_ranks or any(batch.clipped for batch in batches.of_all_ranks):
            return

        rest = {name: value.clone() for name, value in gradients.items()}
        for part in auxiliary.values():
            for name, value in part.items():
                rest[name] -= value

        total = {name: torch.zeros_like(value) for name, value in rest.items()}
        for batch in batches.local:
            for name, value in self._samples.gradient(state, batch, 1.0, rest).items():
                total[name] += value
        self._ranks.add_up(total.values())
        if self._ranks.rank == 0:
            _compare(total, rest, number)

    def explain(self, batches: StepBatches, step: Step) -> "StepSamples":
        """The influences of all ranks' samples on the first loss query; every rank calls it."""
        local = replace(step, batches=tuple(batches.local))
        integrator = self._live.explainers[self._live.losses[0]].integrator
        query, nodes = integrator.query, integrator.nodes(step)

        def features(query: Query) -> dict[str, Tensor]:
            mean = Features(integrator.functional, replace(query, reduction="mean"), integrator.memory)
            return {name: rows.sum(0) for name, rows in mean.of(step, nodes).items()}

        mine = SampleInfluence.of(self._samples, local, features(query))
        samples = SampleInfluence.together(self._ranks.gather(mine))
        if not self._map_queries:
            return StepSamples(samples, batches.norms, batches.ids, None, self._render)

        # input by input: the features of several at once would take a copy of the parameters for each
        device = next(iter(step.before.parameters.values())).device
        singles = [query.rows(row, row + 1, device) for row in range(min(self._map_queries, query.size))]
        rows = torch.stack([through_own_step(self._samples, local, features(single)) for single in singles])
        changes = -torch.cat(self._ranks.gather(rows), dim=1)
        return StepSamples(samples, batches.norms, batches.ids, changes, self._render)


@dataclass(frozen=True)
class StepSamples:
    """The samples of a single step, of all ranks, explained."""

    influences: SampleInfluence
    """On the first loss query."""
    norms: Mapping[int, float]
    """By training index: the norms of the samples' gradients, where they are known."""
    ids: Mapping[int, str]
    """By training index: the names of samples that the loop names by words."""
    changes: Tensor | None
    """How much the samples changed the losses of single queries, (queries, samples), where a map is wanted."""
    render: Callable[[Any], Any] | None

    @property
    def own_step(self) -> float:
        """How much all of them changed the query's loss through this step's gradient alone."""
        return -float(self.influences.influence.sum())

    def draw(self) -> dict[str, Any]:
        """The panels."""
        table = sample_panels.sample_table(self.influences, self.norms, self.ids, self.render)
        drawn: dict[str, Any] = {history.SAMPLES: table}
        if self.changes is not None:
            order = sample_panels.most_influential(self.influences)
            names = [self.ids.get(index, index) for index in self.influences.index[order].tolist()]
            drawn[history.SAMPLE_MAP] = sample_panels.sample_map(self.changes[:, order], names)
            drawn[history.QUERY_COSINES] = sample_panels.cosine_map(self.changes)
        return drawn


def _compare(total: Tensors, gradients: Tensors, number: int) -> None:
    """Warns where `total`, `Σ_k w_k ∇L_k`, is not the gradients that the optimizer is about to use."""
    off = sum(float((total[name] - gradient).square().sum()) for name, gradient in gradients.items()) ** 0.5
    norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    if not off <= MISMATCH * norm:  # nor is it where it is NaN
        warnings.warn(
            f"at step {number}, the per-sample losses do not add up to the gradient that the optimizer saw: they "
            f"miss it by {off / max(norm, 1e-30):.2g} of its norm. Influences of samples are wrong until they do "
            "(those of groups are not). Tell tracker.batch of every batch of the step, with the weights of its "
            "samples in the loss (`weight=`; the mean if not given), and return unreduced losses in sample_loss",
            SampleMismatchWarning,
            stacklevel=2,
        )
