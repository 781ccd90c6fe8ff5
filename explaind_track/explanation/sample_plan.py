"""Plans and runs the sweeps that give influences of single training samples: `explain` where "sample" is kept."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from explaind_track.core import distributed
from explaind_track.core.groups import Groups
from explaind_track.core.influence import Influence
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.core.tensors import explained_bytes
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.path_integral import Nodes, Quadrature
from explaind_track.engine.per_sample import CHUNK_BYTES, PerSampleGradients
from explaind_track.engine.targets import kept_targets, output_count, some_outputs
from explaind_track.explanation.digests import Digest, fingerprint, model_digest, query_digest, told_apart
from explaind_track.explanation.plan import ExplanationPlan
from explaind_track.explanation.reverse_replay import ReverseSweep
from explaind_track.explanation.sample_axis import SAMPLE_AXES, SampleAxis, data_digest, labels_of
from explaind_track.explanation.sample_result import SampleResult
from explaind_track.explanation.step_source import RepeatableSteps
from explaind_track.explanation.tiles import Tile, cut_tiles
from explaind_track.record.results import Store

COPIES = 3
"""Of the parameters for each target in flight: the adjoint, the test feature, and the direction."""


class SamplePlan(ExplanationPlan):
    """Influences of training samples, planned and not yet computed."""

    def __init__(
        self,
        source: RepeatableSteps,
        model: nn.Module,
        query: Query,
        groups: Groups,
        keep: Sequence[str],
        samples: SampleAxis,
        quadrature: Quadrature | None,
        memory: int,
        progress: bool,
        out: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(progress, out)
        unknown = set(keep) - set(SAMPLE_AXES)
        if unknown:
            raise ValueError(f"keep takes some of {SAMPLE_AXES} with samples, got {tuple(keep)}")
        self.keep = tuple(axis for axis in SAMPLE_AXES if axis in keep)
        self.groups = groups if "group" in keep else {"all": [name for names in groups.values() for name in names]}
        self.query = kept_targets(query, keep)
        self._source, self._model, self._samples, self._memory = source, model, samples, memory
        self._gradients = PerSampleGradients(model, samples.loss, memory, samples.alone)
        self._integrator = Integrator(model, query, self.groups, (), quadrature, memory)
        self._nodes: dict[int, Nodes] = {}

    @cached_property
    def outputs(self) -> int:
        return output_count(self._model, self.query)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Of the result; 1 for axes that are not kept. `seen` counts from step 0."""
        source = self._source
        return {
            "step": source.last - source.first if "step" in self.keep else 1,
            "seen": source.last if "seen" in self.keep else 1,
            "group": len(self.groups),
            "query": len(self.query),
            "output": self.outputs,
            "sample": len(self._samples.labels),
        }

    @property
    def shape(self) -> dict[str, int]:
        sizes = {axis: size for axis, size in self._sizes.items() if axis in self.keep}
        return sizes if "seen" not in sizes else {**sizes, "seen": self._source.last - self.floor}

    @property
    def dtype(self) -> np.dtype[Any]:
        widest = max((p.dtype for p in self._model.parameters()), key=lambda dtype: dtype.itemsize)
        return np.dtype(np.float64 if widest is torch.float64 else np.float32)

    @property
    def result_bytes(self) -> int:
        return math.prod(self.shape.values()) * self.dtype.itemsize

    @property
    def _parameter_bytes(self) -> int:
        return explained_bytes(parameters_of(self._model))

    @property
    def working_bytes(self) -> int:
        targets = max(tile.targets for tile in self.tiles())
        replayed = min(self._memory, 4 * self._parameter_bytes * self.steps)
        return targets * COPIES * self._parameter_bytes + replayed + CHUNK_BYTES

    @property
    def mode(self) -> str:
        return "reverse replay, an adjoint for each target"

    @property
    def passes(self) -> int:
        return len(self.tiles())

    @property
    def steps(self) -> int:
        return sum(map(self._length, self.tiles()))

    def _length(self, tile: Tile) -> int:
        """The steps that a tile's sweep goes through, as far as the reach before the window tells."""
        below: int = self._source.first - self.floor
        return int(tile.steps.stop - max(0, tile.steps.start - below))

    @cached_property
    def floor(self) -> int:
        """The first step whose gradient can be told from 0 in the window."""
        return self._source.reach(self._source.first, self._source.last, self._memory)

    def tiles(self) -> list[Tile]:
        """At least one for each process, unless processes share the samples of every sweep."""
        return self._cut(1 if self.shared else distributed.processes())

    def _cut(self, at_least: int) -> list[Tile]:
        window = (self._source.first, self._source.last)
        targets = max(1, self._memory // (COPIES * self._parameter_bytes))
        return cut_tiles(window, "step" in self.keep, len(self.query), self.outputs, targets, at_least)

    @cached_property
    def shared(self) -> bool:
        """Whether processes share the samples of every sweep, and not the sweeps: where there are fewer sweeps than
        processes, and a step's samples, whose gradients every sweep takes, are more than the targets, whose features
        every process then takes."""
        processes = distributed.processes()
        if processes == 1 or len(self._cut(1)) >= processes:
            return False
        step = next(self._source.backwards(self._source.last, self._memory))
        batches = list(self._samples.batches(step))
        alone = all(self._gradients.stands_alone(step.before, batch) for batch, *_ in batches)
        return alone and sum(int((places >= 0).sum()) for _, places, _ in batches) > len(self.query) * self.outputs

    def seconds(self) -> float:
        """Tries the last step of the window, and one that only momentum leads to, with the first tile's targets."""
        source = self._source
        started = perf_counter()
        floor = source.reach(source.first, source.last, self._memory)
        replay = (perf_counter() - started) / (source.last - floor)

        tried = self.tiles()[0]
        within, below = self._seconds_of(tried)
        total = 0.0
        for tile in self.tiles():
            share, length = tile.targets / tried.targets, self._length(tile)
            total += share * (tile.acting * within + (length - tile.acting) * below) + length * replay
        return total / distributed.processes()

    def _seconds_of(self, tile: Tile) -> tuple[float, float]:
        """Of a step within the window, and of one before it."""
        step = next(self._source.backwards(tile.steps.stop, self._memory))
        targets = (tile.rows.stop - tile.rows.start, tile.outputs.stop - tile.outputs.start)
        influence = np.zeros((tile.slots, 1, len(self.groups), *targets, len(self._samples.labels)), self.dtype)
        kernel, bar = np.zeros((tile.slots, len(self.groups), *targets), self.dtype), tqdm(disable=True)

        found = (0.0, 0.0)
        for _ in range(2):  # the first pays for what is only done once
            sweep = self._sweep(tile, shared=False)
            times = [perf_counter()]
            for one in (step, replace(step, number=-1)):
                sweep.run([one], influence, kernel, bar)
                times.append(perf_counter())
            found = (times[1] - times[0], times[2] - times[1])
            if sum(found) > 60:
                break
        return found

    def compute(self) -> Influence:
        """In memory, or in a directory, where it goes on with the tiles that are not done."""
        if self.out is not None and distributed.processes() > 1:
            raise ValueError("out= is for one process; in several, keep fewer axes, or give each its own samples")
        if self.out is None:
            return self._compute(None)
        with Store(self.out, self._request()) as store:
            return store.result() or self._compute(store)

    def _compute(self, store: Store | None) -> Influence:
        result = SampleResult(self.keep, self._sizes, self.dtype, store)
        tiles: Sequence[Tile] = [tile for tile in self.tiles() if result.lacks(tile)]
        if not self.shared:
            tiles = distributed.share(tiles)

        warned = False
        total = sum(map(self._length, tiles))
        with tqdm(total=total, desc="samples", unit="step", disable=not self.progress) as bar:
            for tile in tiles:
                sweep = self._sweep(tile, self.shared)
                steps = self._source.backwards(tile.steps.stop, self._memory)
                sweep.run(steps, *result.cells(tile, self._source.first), bar)
                result.done(tile, self._source.first, sweep.mismatch)
                if (sweep.mismatch.wrong or sweep.mismatch.lost) and not warned:
                    warned = True
                    sweep.mismatch.warn()
        return result.finish(self._labels(), (self._source.first, self._source.last), self.query.is_loss)

    def _sweep(self, tile: Tile, shared: bool) -> ReverseSweep:
        """Ready to run; its query has the tile's targets only."""
        query = self.query
        if not query.reduction:
            query = query.rows(tile.rows.start, tile.rows.stop, next(self._model.parameters()).device)
        if tile.outputs != slice(0, self.outputs):
            query = some_outputs(query, tile.outputs.start, tile.outputs.stop)
        features = Features(Functional(self._model), query, self._memory)
        return ReverseSweep(tile, features, self._gradients, self._samples, self.groups, self._nodes_of, shared)

    def _nodes_of(self, step: Step) -> Nodes:
        """Found once, for all sweeps."""
        if step.number not in self._nodes:
            self._nodes[step.number] = self._integrator.path(step)
        return self._nodes[step.number]

    def _labels(self) -> dict[str, Any]:
        return {"group": np.array(list(self.groups), dtype=object), "sample": labels_of(self._samples.labels)}

    def _request(self) -> dict[str, Any]:
        """What a directory remembers of what it holds."""
        rule = self._integrator.quadrature
        return {
            "keep": self.keep,
            "window": [self._source.first, self._source.last],
            "groups": {group: list(names) for group, names in self.groups.items()},
            "samples": fingerprint(self._samples.labels, sorted(self._samples.place.items())),
            "modes": fingerprint([module.training for module in self._model.modules()]),
            **told_apart(
                {
                    "sample_loss": Digest().add(self._samples.loss, "sample_loss"),
                    "query": query_digest(self.query),
                    "model": model_digest(self._model),
                    "data": data_digest(self._source, self._samples.data),
                }
            ),
            "targets": [len(self.query), self.outputs],
            "trajectory": self._source.fingerprint,
            "quadrature": rule.settings,
            "walks": [tile.name for tile in self.tiles()],
        }
