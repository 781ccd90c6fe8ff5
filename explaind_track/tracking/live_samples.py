"""What a Tracker makes of single training samples: a gradient out of theirs, the check that they are it, and their
influences. Every rank does its own samples."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.step import State, Step
from explaind_track.core.tensors import Tensors
from explaind_track.engine.functional import SampleLoss
from explaind_track.engine.samples import SampleInfluence, Samples, compare_gradients
from explaind_track.record import history
from explaind_track.tracking import sample_panels
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.live import Live
from explaind_track.tracking.step_batches import StepBatches

CHECKED_STEPS = 3
CHECK_EVERY = 500


class LiveSamples:
    """For the samples of one run."""

    def __init__(
        self,
        model: nn.Module,
        sample_loss: SampleLoss,
        live: Live,
        ranks: Ranks,
        map_queries: int,
        render: Callable[[int], Any] | None,
    ) -> None:
        ranks.refuse_common_statistics()
        if map_queries:
            import_module("matplotlib.figure")  # which takes seconds, and would in the first step that draws
        self._samples = Samples(model, sample_loss)
        self._live, self._ranks, self._map_queries, self._render = live, ranks, map_queries, render

    def gradient(self, state: State, batches: StepBatches) -> tuple[dict[str, Tensor], Tensor]:
        """The last batch's gradient by parameter, from per-sample gradients, and its loss; both are noted."""
        batch = batches.local[-1]
        gradient, losses, norms = self._samples.gradient(state, batch)
        if batch.index is not None:
            batches.norms |= dict(zip(batch.index.tolist(), norms.tolist(), strict=True))
        loss = (losses * batch.weight).sum()
        batches.loss = (batches.loss or 0.0) + float(loss)
        return gradient, loss

    def check(
        self, batches: StepBatches, number: int, state: State, gradients: Tensors, auxiliary: Mapping[str, Tensors]
    ) -> None:
        """Now and then, whether the samples make up the gradient, once the auxiliary losses are taken out of it."""
        due = number < CHECKED_STEPS or number % CHECK_EVERY == 0
        if not due or not batches.of_all_ranks or any(batch.clipped for batch in batches.of_all_ranks):
            return
        rest = {name: value.clone() for name, value in gradients.items()}
        for part in auxiliary.values():
            for name, value in part.items():
                rest[name] -= value
        total = self._samples.total_gradient(state, batches.local, rest)
        self._ranks.add_up(total.values())
        if self._ranks.rank == 0:
            compare_gradients(total, rest, number)

    def influences(self, batches: StepBatches, step: Step) -> tuple[SampleInfluence, Tensor | None]:
        """Of all ranks' samples on the first loss query; and where a map is wanted, how much they changed the losses of
        its first single queries, (queries, samples)."""
        local = replace(step, batches=tuple(batches.local))
        samples = SampleInfluence.together(self._ranks.gather(self._live.tabulate(self._samples, local)))
        if not self._map_queries:
            return samples, None
        rows = self._ranks.gather(self._live.by_query(self._samples, local, self._map_queries))
        return samples, -torch.cat(rows, dim=1)

    def draw(self, batches: StepBatches, samples: SampleInfluence, changes: Tensor | None) -> dict[str, Any]:
        """The panels of what `influences` has found."""
        drawn: dict[str, Any] = {history.SAMPLES: sample_panels.sample_table(samples, batches.norms, self._render)}
        if changes is not None:
            order = sample_panels.most_influential(samples)
            drawn[history.SAMPLE_MAP] = sample_panels.sample_map(changes[:, order], samples.index[order])
            drawn[history.QUERY_COSINES] = sample_panels.cosine_map(changes)
        return drawn
