"""Single training samples, live: a step's gradient made of theirs, the check that they add up to it, their influences.

Every rank does its own samples.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.queries import Query
from explaind_track.core.step import Batch, State, Step
from explaind_track.core.tensors import Tensors, low_precision, upcast
from explaind_track.core.tokens import TokenText
from explaind_track.engine.batch_losses import SampleLoss, upcast_batch
from explaind_track.engine.features import Features
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.engine.sample_influence import SampleInfluence, of_gradient, through_own_step
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

TABLE_MISMATCH = 0.02
"""The share of its samples' influences by which a table may miss the whole gradient's: more than autocast rounds."""

SAME_PRECISION = 0.6
"""In bfloat16 and float16, eps to this power (5% and 1.6%), for gradients of samples in training's own arithmetic."""

OTHER_PRECISION = 0.4
"""The same (14% and 6%) for gradients in float32, as samples are explained, which miss what training rounded."""

ADVICE = (
    "Influences of samples are wrong until they do (those of groups are not). Tell tracker.batch of every batch of the "
    "step, right before its forward pass, with the weights of its samples in the loss (`weight=`; the mean if not "
    "given); return unreduced losses in sample_loss; and if the loop changes weights by itself (clamps, masks), let it "
    "do so before the forward pass or behind optimizer.step(), not in between"
)

AUTOCAST = 0.02
"""Up to so much may be missed by what autocast rounds."""

AUTOCAST_ADVICE = ". Where the loss is computed under autocast, so small a miss is its rounding"

LOW_PRECISION_ADVICE = (
    "They do in the precision of training, but not in float32, as samples are explained, so that influences of samples "
    "are coarse (those of groups are not). Train float32 parameters under autocast instead, or explain groups only"
)


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
        self._table_was_wrong = False

    def gradient(self, state: State, batches: StepBatches) -> tuple[dict[str, Tensor], Tensor]:
        """The last batch's gradient by parameter, from per-sample gradients, and its loss.

        The loss and the norms of the samples' gradients are noted in `batches`.
        """
        batch = batches.local[-1]
        explained = state.upcast()
        whole = batch if explained is state else upcast_batch(batch)
        try:
            gradient, losses, norms = self._samples.gradient_and_norms(explained, whole)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            self._samples.losses(explained, whole)  # where this fails too, it says what is wrong with sample_loss
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
        self,
        batches: StepBatches,
        number: int,
        state: State,
        gradients: Tensors,
        auxiliary: Mapping[str, Tensors],
        trained: Collection[str],
    ) -> None:
        """Compares, now and then, the sum of the samples' gradients with the step's, less the auxiliary losses'.

        In bfloat16 and float16 twice: in training's own arithmetic, which tells whether the batches are what the loop
        says, and in float32, as samples are explained. trained: the parameters that require gradients. Warns with
        SampleMismatchWarning. Every rank calls it.
        """
        due = number < CHECKED_STEPS or number % CHECK_EVERY == 0
        if not due or not batches.of_all_ranks or any(batch.clipped for batch in batches.of_all_ranks):
            return

        # zeros that are kept of a frozen parameter are no sample's
        learning = {name: value for name, value in gradients.items() if name in trained or bool(value.any())}
        rest = {name: upcast(value).clone() for name, value in learning.items()}
        for part in auxiliary.values():
            for name, value in part.items():
                rest[name] -= value

        precision = low_precision(state.parameters)
        off = self._miss(state, batches.local, rest)
        if precision is None:
            self._warn(number, off, MISMATCH, ADVICE + AUTOCAST_ADVICE if off <= AUTOCAST else ADVICE)
            return

        eps = torch.finfo(precision).eps
        off_upcast = self._miss(state.upcast(), [upcast_batch(batch) for batch in batches.local], rest)
        if not self._warn(number, off, eps**SAME_PRECISION, ADVICE):
            self._warn(number, off_upcast, eps**OTHER_PRECISION, LOW_PRECISION_ADVICE)

    def _miss(self, state: State, local: Sequence[Batch], gradients: Tensors) -> float:
        """By how much `Σ_k w_k ∇L_k` misses the gradients that the optimizer is to use, relative to their norm."""
        total = {name: torch.zeros_like(value) for name, value in gradients.items()}
        for batch in local:
            for name, value in self._samples.gradient(state, batch, 1.0, gradients).items():
                total[name] += value
        self._ranks.add_up(total.values())

        off = sum(float((total[name] - gradient).square().sum()) for name, gradient in gradients.items()) ** 0.5
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        return off / max(norm, 1e-30) if off else 0.0

    def _warn(self, number: int, off: float, limit: float, advice: str) -> bool:
        """Warns where more than `limit` is missed; returns whether it is."""
        wrong = not off <= limit  # also where it is NaN
        if wrong and self._ranks.rank == 0:
            warnings.warn(
                f"at step {number}, the per-sample losses do not add up to the gradient that the optimizer saw: they "
                f"miss it by {off:.2g} of its norm. {advice}",
                SampleMismatchWarning,
                stacklevel=3,
            )
        return wrong

    def _check_table(self, samples: SampleInfluence, step: Step, of_gradient: float) -> None:
        """Compares the sum of a table's influences with that of the step's gradient, which costs nothing beside them.

        Warns with SampleMismatchWarning, once in a run.
        """
        if self._table_was_wrong or step.precision is not None or any(batch.clipped for batch in step.batches):
            return
        off, size = abs(float(samples.influence.sum()) - of_gradient), float(samples.influence.abs().sum())
        self._table_was_wrong = not off <= TABLE_MISMATCH * max(size, abs(of_gradient))
        if self._table_was_wrong and self._ranks.rank == 0:
            total = float(samples.influence.sum())
            warnings.warn(
                f"the influences in the table of step {step.number} add up to {total:.3g}, but "
                f"the gradient that the optimizer saw has {of_gradient:.3g}: clipping that the Tracker was not told of "
                "does this (use tracker.clip_grad_norm_, or tell tracker.gradient_scaled by which factor). " + ADVICE,
                SampleMismatchWarning,
                stacklevel=3,
            )

    def explain(self, batches: StepBatches, step: Step) -> "StepSamples":
        """The influences of all ranks' samples on the first loss query; every rank calls it."""
        mine = batches.local if step.precision is None else [upcast_batch(batch) for batch in batches.local]
        local = replace(step, batches=tuple(mine))
        integrator = self._live.explainers[self._live.losses[0]].integrator
        query, nodes = integrator.query, integrator.path(step)

        def features(query: Query) -> dict[str, Tensor]:
            mean = Features(integrator.functional, replace(query, reduction="mean"), integrator.memory)
            return {name: rows.sum(0) for name, rows in mean.of(step, nodes).items()}

        slopes = features(query)
        samples = SampleInfluence.together(
            self._ranks.gather(
                SampleInfluence.of(self._samples, local, slopes, with_tokens=isinstance(self._render, TokenText))
            )
        )
        self._check_table(samples, step, of_gradient(step, slopes))
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
            names = sample_panels.names_of(self.influences, order, self.ids, self.render)
            drawn[history.SAMPLE_MAP] = sample_panels.sample_map(self.changes[:, order], names)
            drawn[history.QUERY_COSINES] = sample_panels.cosine_map(self.changes)
        return drawn
