"""Plans and runs the walks that give influences of single training samples: `explain` where "sample" is kept."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from os import PathLike
from time import perf_counter
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

from explaind_track.core import distributed
from explaind_track.core.groups import Groups
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.core.tensors import size_in_bytes
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.per_sample import SampleProducts
from explaind_track.engine.samples import CHUNK_BYTES
from explaind_track.engine.targets import kept_targets, output_count, some_outputs
from explaind_track.explanation.digests import fingerprint, function_digest, query_digest
from explaind_track.explanation.plan import ExplanationPlan
from explaind_track.explanation.reverse_replay import ReverseSweep
from explaind_track.explanation.sample_axis import SAMPLE_AXES, Array, SampleAxis
from explaind_track.explanation.step_source import Source, reach
from explaind_track.explanation.tiles import Tile, cut_tiles
from explaind_track.record.results import Store

CELLS = tuple(axis for axis in SAMPLE_AXES if axis not in ("seen", "sample"))
"""What the influence of all samples together is kept over."""

COPIES = 3
"""Of the parameters for each target in flight: the adjoint, the test feature, and the direction."""


class SamplePlan(ExplanationPlan):
    """Influences of training samples, planned and not yet computed."""

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        query: Query,
        groups: Groups,
        keep: Sequence[str],
        window: tuple[int, int] | None,
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
        self.first, self.last = window or (0, len(source))
        self.groups = groups if "group" in keep else {"all": [name for names in groups.values() for name in names]}
        self.model, self.samples, self.memory = model, samples, memory
        self.query = kept_targets(query, keep)
        self.products = SampleProducts(model, samples.loss, self.groups, memory, samples.alone)
        self._source = source
        self._integrator = Integrator(model, query, self.groups, (), quadrature, memory)
        self._nodes: dict[int, int] = {}

    @cached_property
    def outputs(self) -> int:
        return output_count(self.model, self.query)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Of the result; 1 for axes that are not kept. `seen` counts from step 0."""
        return {
            "step": self.last - self.first if "step" in self.keep else 1,
            "seen": self.last if "seen" in self.keep else 1,
            "group": len(self.groups),
            "query": len(self.query),
            "output": self.outputs,
            "sample": len(self.samples.labels),
        }

    @property
    def shape(self) -> dict[str, int]:
        sizes = {axis: size for axis, size in self._sizes.items() if axis in self.keep}
        return sizes if "seen" not in sizes else {**sizes, "seen": self.last - self.floor}

    @property
    def dtype(self) -> np.dtype[Any]:
        widest = max((p.dtype for p in self.model.parameters()), key=lambda dtype: dtype.itemsize)
        return np.dtype(np.float64 if widest is torch.float64 else np.float32)

    @property
    def result_bytes(self) -> int:
        return math.prod(self.shape.values()) * self.dtype.itemsize

    @property
    def working_bytes(self) -> int:
        rows = max(walk.targets for walk in self.walks())
        parameters = size_in_bytes(dict(self.model.named_parameters()))
        return rows * COPIES * parameters + min(self.memory, 4 * parameters * self.steps) + CHUNK_BYTES

    @property
    def passes(self) -> int:
        return len(self.walks())

    @property
    def steps(self) -> int:
        return sum(map(self._length, self.walks()))

    def seconds(self) -> float:
        """Tries the last step of the window, and one that only momentum leads to, with the first walk's targets."""
        walk = self.walks()[0]
        started = perf_counter()
        floor = reach(self._source, self.first, self.last, self.memory)
        replay = (perf_counter() - started) / (self.last - floor)
        within, below = self._seconds_of(walk)
        total = 0.0
        for one in self.walks():
            share, length = one.targets / walk.targets, self._length(one)
            total += share * (one.acting * within + (length - one.acting) * below) + length * replay
        return total / distributed.processes()

    def _seconds_of(self, walk: Tile) -> tuple[float, float]:
        """Of a step within the window, and of one before it."""
        (step,) = self._source.steps_back(walk.steps.stop - 1, walk.steps.stop, self.memory)
        apart = walk.acting if walk.apart else 1
        rows = (walk.rows.stop - walk.rows.start, walk.outputs.stop - walk.outputs.start)
        target = np.zeros((apart, 1, len(self.groups), *rows, len(self.samples.labels)), self.dtype)
        kernel, bar = np.zeros((apart, len(self.groups), *rows), self.dtype), tqdm(disable=True)
        found = (0.0, 0.0)
        for _ in range(2):  # the first pays for what is only done once
            one = self.walk(walk, shared=False)
            times = [perf_counter()]
            for tried in (step, replace(step, number=-1)):
                one.walk([tried], target, kernel, bar)
                times.append(perf_counter())
            found = (times[1] - times[0], times[2] - times[1])
            if sum(found) > 60:
                break
        return found

    @property
    def copies(self) -> int:
        """Targets in flight that the memory allows."""
        return max(1, self.memory // (COPIES * size_in_bytes(dict(self.model.named_parameters()))))

    @cached_property
    def shared(self) -> bool:
        """Whether processes share the samples of every walk, and not the walks: where there are fewer walks than
        processes, and a step's samples, whose gradients every walk takes, are more than the targets, whose features
        every process then takes."""
        spread = distributed.processes()
        if spread == 1 or len(self._cut(1)) >= spread:
            return False
        (step,) = self._source.steps_back(self.last - 1, self.last, self.memory)
        batches = list(self.samples.batches(step))
        alone = all(self.products.stands_alone(step, batch) for batch, *_ in batches)
        return alone and sum(int((places >= 0).sum()) for _, places, _ in batches) > len(self.query) * self.outputs

    def walks(self) -> list[Tile]:
        """At least one for each process, unless processes share the walks' samples."""
        return self._cut(1 if self.shared else distributed.processes())

    def _cut(self, at_least: int) -> list[Tile]:
        apart = "step" in self.keep
        return cut_tiles((self.first, self.last), apart, len(self.query), self.outputs, self.copies, at_least)

    def compute(self) -> Influence:
        """In memory, or in a directory, where it goes on with the walks that are not done."""
        if self.out is not None and distributed.processes() > 1:
            raise ValueError("out= is for one process; in several, keep fewer axes, or give each its own samples")
        store = None if self.out is None else Store(self.out, self._request())
        target = self._array(store, "influence", SAMPLE_AXES)
        kernel = self._array(store, "kernel", CELLS)
        notes: dict[str, Any] = {} if store is None else store.notes
        walks: Sequence[Tile] = [walk for walk in self.walks() if walk.name not in notes]
        if not self.shared:
            walks = distributed.share(walks)
        total = sum(self._length(walk) for walk in walks)
        told = False
        with tqdm(total=total, desc="samples", unit="step", disable=not self.progress) as bar:
            for walk in walks:
                one = self._walk(walk, target, kernel, bar, fresh=store is None)
                notes[walk.name] = {str(number): value for number, value in one.mismatch.items()}
                if store is not None:
                    store.done(walk.name, notes[walk.name])
                if one.wrong and not told:
                    told = True
                    one.tell_of_mismatch()
        distributed.add_up(target, kernel)
        mismatch: dict[int, float] = {}
        for found in distributed.gather(notes):
            for values in found.values():
                for number, value in values.items():
                    mismatch[int(number)] = max(value, mismatch.get(int(number), value))
        return self._result(target, kernel, mismatch, store)

    def _array(self, store: Store | None, name: str, axes: Sequence[str]) -> Array:
        """Zeros over the axes; those that are not kept have length 1."""
        sizes = {axis: self._sizes[axis] for axis in axes}
        if store is None:
            return np.zeros(tuple(sizes.values()), self.dtype)
        kept = store.array(name, {axis: size for axis, size in sizes.items() if axis in self.keep}, self.dtype)
        return kept.reshape(tuple(sizes.values()))

    def _length(self, walk: Tile) -> int:
        """The steps that a walk goes through, as far as the reach before the window tells."""
        below: int = self.first - self.floor
        return int(walk.steps.stop - max(0, walk.steps.start - below))

    @cached_property
    def floor(self) -> int:
        """The first step whose gradient can be told from 0 in the window."""
        return reach(self._source, self.first, self.last, self.memory)

    def walk(self, walk: Tile, shared: bool) -> ReverseSweep:
        query = self.query
        if not query.reduction:
            query = query.rows(walk.rows.start, walk.rows.stop, next(self.model.parameters()).device)
        if walk.outputs != slice(0, self.outputs):
            query = some_outputs(query, walk.outputs.start, walk.outputs.stop)
        return ReverseSweep(
            self.model, query, self.groups, self.samples, self.products, walk, self.nodes_of, self.memory, shared
        )  # fmt: skip

    def steps_back(self, last: int) -> Iterator[Step]:
        return self._source.steps_back(0, last, self.memory)

    def _walk(self, walk: Tile, target: Array, kernel: Array, bar: Any, fresh: bool) -> ReverseSweep:
        one = self.walk(walk, self.shared)
        acting = slice(walk.steps.start - self.first, walk.steps.stop - self.first) if walk.apart else slice(0, 1)
        cell = target[acting, :, :, walk.rows, walk.outputs]
        own = kernel[acting, :, walk.rows, walk.outputs]
        if not fresh:  # an interrupted walk has left its beginning there
            cell[...], own[...] = 0, 0
        one.walk(self.steps_back(walk.steps.stop), cell, own, bar)
        return one

    def nodes_of(self, step: Step) -> int:
        if step.number not in self._nodes:
            self._nodes[step.number] = self._integrator.nodes(step)
        return self._nodes[step.number]

    def _result(self, target: Array, kernel: Array, mismatch: Mapping[int, float], store: Store | None) -> Influence:
        low = min(mismatch, default=self.first)
        dims, cells = ([axis for axis in axes if axis in self.keep] for axes in (SAMPLE_AXES, CELLS))
        if "seen" in self.keep:
            target = target[:, low:]
        numbers = sorted(mismatch)
        variables = {
            "influence": (dims, target.squeeze(_missing(SAMPLE_AXES, self.keep))),
            "kernel": (cells, kernel.squeeze(_missing(CELLS, self.keep))),
            "mismatch": (["walked"], np.array([mismatch[number] for number in numbers])),
        }
        own = self.samples.labels
        numeric = all(isinstance(label, int | np.integer) for label in own)
        labels = {
            "walked": np.array(numbers, dtype=np.int64),
            "step": np.arange(self.first, self.last),
            "seen": np.arange(low, low + target.shape[1]),
            "group": np.array(list(self.groups), dtype=object),
            "sample": np.array(own, dtype=np.int64 if numeric else object),
        }
        attrs = {"first_step": self.first, "last_step": self.last - 1, "explaind_track": version("explaind_track")}
        own_labels = {name: values for name, values in labels.items() if name in (*dims, "walked")}
        data = xr.Dataset(variables, own_labels, attrs)
        return Influence(data) if store is None else store.complete(data, {"seen": low})

    def _request(self) -> dict[str, Any]:
        """What a directory remembers of what it holds."""
        rule = self._integrator.quadrature
        return {
            "keep": self.keep,
            "window": [self.first, self.last],
            "groups": {group: list(names) for group, names in self.groups.items()},
            "samples": fingerprint(self.samples.labels, sorted(self.samples.place.items())),
            "sample_loss": function_digest(self.samples.loss),
            "query": query_digest(self.query),
            "targets": [len(self.query), self.outputs],
            "trajectory": self._source.fingerprint,
            "quadrature": [rule.tolerance, rule.nodes, rule.max_nodes],
            "walks": [walk.name for walk in self.walks()],
        }


def _missing(axes: Sequence[str], keep: Sequence[str]) -> tuple[int, ...]:
    return tuple(place for place, axis in enumerate(axes) if axis not in keep)
