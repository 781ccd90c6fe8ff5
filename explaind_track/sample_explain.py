"""Plans and runs the walks that give influences of single training samples: `explain` where "sample" is kept."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.autodiff import SampleLoss
from explaind_track.explain import check_query
from explaind_track.features import kept_targets, output_count, some_outputs
from explaind_track.groups import Groups
from explaind_track.influence import Influence
from explaind_track.integrator import Integrator
from explaind_track.path import Quadrature
from explaind_track.plans import size_in_bytes
from explaind_track.queries import Query
from explaind_track.sample_axis import SAMPLE_AXES, Array, Data, Samples, SampleWalk
from explaind_track.samples import SampleMismatch
from explaind_track.step import Step
from explaind_track.trajectory import Trajectory

COPIES = 3
"""Of the parameters for each target in flight: the adjoint, the test feature, and the direction."""


class StepList:
    """Steps in memory, as a trajectory gives them. They have to last (`Trajectory.steps(lasting=True)`)."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = list(steps)
        for one, other in zip(self._steps, self._steps[1:], strict=False):
            if any(other.before.parameters[name] is value for name, value in one.before.parameters.items()):
                raise ValueError(
                    "samples are explained from the last step back, so all steps have to last: take them from "
                    "trajectory.steps(lasting=True), or pass the trajectory itself"
                )

    def __len__(self) -> int:
        return self._steps[-1].number + 1 if self._steps else 0

    def steps_back(self, first: int, last: int, memory: int) -> Iterator[Step]:
        return (step for step in reversed(self._steps) if first <= step.number < last)

    def steps_forward(self, first: int, last: int) -> Iterator[Step]:
        return (step for step in self._steps if first <= step.number < last)

    def indices(self, last: int) -> Iterator[tuple[int, Tensor | None, bool]]:
        for step in self._steps:
            for batch in step.batches:
                if step.number < last:
                    yield step.number, batch.index, batch.data is not None


@dataclass(frozen=True)
class Walk:
    """What one walk is for: acting steps, rows of the query, and outputs."""

    steps: slice
    rows: slice
    outputs: slice


class SampleExplanation:
    """Influences of training samples, planned and not yet computed."""

    def __init__(
        self,
        steps: "Trajectory | StepList",
        model: nn.Module,
        query: Query,
        groups: Groups,
        keep: Sequence[str],
        window: tuple[int, int] | None,
        samples: Samples,
        quadrature: Quadrature | None,
        memory: int,
    ) -> None:
        unknown = set(keep) - set(SAMPLE_AXES)
        if unknown:
            raise ValueError(f"keep takes some of {SAMPLE_AXES} with samples, got {tuple(keep)}")
        self.keep = tuple(axis for axis in SAMPLE_AXES if axis in keep)
        self.first, self.last = window or (0, len(steps))
        if not 0 <= self.first < self.last <= len(steps):
            raise ValueError(f"the run has the steps 0 to {len(steps)}, not the window {self.first} to {self.last}")
        self.groups = groups if "group" in keep else {"all": [name for names in groups.values() for name in names]}
        self.model, self.samples, self.memory = model, samples, memory
        self.query = kept_targets(query, keep)
        self._source = steps
        self._integrator = Integrator(model, query, self.groups, (), quadrature, memory)
        self._nodes: dict[int, int] = {}

    @cached_property
    def outputs(self) -> int:
        return output_count(self.model, self.query)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, over `SAMPLE_AXES`; 1 for what is not kept. `seen` counts from step 0."""
        return (
            self.last - self.first if "step" in self.keep else 1,
            self.last if "seen" in self.keep else 1,
            len(self.groups),
            len(self.query),
            self.outputs,
            len(self.samples.labels),
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        widest = max((p.dtype for p in self.model.parameters()), key=lambda dtype: dtype.itemsize)
        return np.dtype(np.float64 if widest is torch.float64 else np.float32)

    def walks(self) -> list[Walk]:
        """Walks that cover the result, each with as many targets in flight as the memory allows, but at least one."""
        copies = max(1, self.memory // (COPIES * size_in_bytes(dict(self.model.named_parameters()))))
        outputs = min(self.outputs, copies)
        rows = min(len(self.query), max(1, copies // outputs))
        acting = self.last - self.first
        if "step" in self.keep:
            acting = min(acting, max(1, copies // (outputs * rows)))
        return [
            Walk(steps, own, some)
            for steps in cuts(self.first, self.last, acting)
            for own in cuts(0, len(self.query), rows)
            for some in cuts(0, self.outputs, outputs)
        ]

    def run(self, progress: bool) -> Influence:
        target = np.zeros(self.shape, self.dtype)
        kernel = np.zeros((self.shape[0], *self.shape[2:5]), self.dtype)
        mismatch: dict[int, float] = {}
        walks, told = self.walks(), False
        with tqdm(
            total=len(walks) * (self.last - self.first), desc="samples", unit="step", disable=not progress
        ) as bar:
            for walk in walks:
                one = self._walk(walk, target, kernel, bar)
                for number, value in one.mismatch.items():
                    mismatch[number] = max(mismatch.get(number, 0.0), value)
                if one.wrong and not told:
                    told = True
                    _tell_of_mismatch(one)
        return self._result(target, kernel, mismatch)

    def _walk(self, walk: Walk, target: Array, kernel: Array, bar: Any) -> SampleWalk:
        apart = "step" in self.keep
        query = self.query
        if not query.reduction:
            device = next(self.model.parameters()).device
            query = query.rows(walk.rows.start, walk.rows.stop, device)
        if walk.outputs != slice(0, self.outputs):
            query = some_outputs(query, walk.outputs.start, walk.outputs.stop)
        one = SampleWalk(
            self.model, query, self.groups, self.samples, walk.steps.start, walk.steps.stop, apart, self._nodes_of,
            self.memory,
        )  # fmt: skip
        acting = slice(walk.steps.start - self.first, walk.steps.stop - self.first) if apart else slice(0, 1)
        steps = self._source.steps_back(0, walk.steps.stop, self.memory)
        cell = (acting, slice(None), slice(None), walk.rows, walk.outputs)
        one.walk(steps, target[cell], kernel[acting, :, walk.rows, walk.outputs], bar)
        return one

    def _nodes_of(self, step: Step) -> int:
        if step.number not in self._nodes:
            self._nodes[step.number] = self._integrator.nodes(step)
        return self._nodes[step.number]

    def _result(self, target: Array, kernel: Array, mismatch: Mapping[int, float]) -> Influence:
        low = min(mismatch, default=self.first)
        sizes = dict(zip(SAMPLE_AXES, target.shape, strict=True))
        gone = tuple(place for place, axis in enumerate(SAMPLE_AXES) if axis not in self.keep)
        if "seen" in self.keep:
            target = target[:, low:]
        dims = [axis for axis in SAMPLE_AXES if axis in self.keep]
        cells = [axis for axis in dims if axis not in ("seen", "sample")]
        rest = tuple(
            p for p, a in enumerate(a for a in SAMPLE_AXES if a not in ("seen", "sample")) if a not in self.keep
        )
        numbers = sorted(mismatch)
        variables = {
            "influence": (dims, target.squeeze(gone)),
            "kernel": (cells, kernel.squeeze(rest)),
            "mismatch": (["walked"], np.array([mismatch[number] for number in numbers])),
        }
        labels: dict[str, Any] = {"walked": np.array(numbers)}
        if "step" in dims:
            labels["step"] = np.arange(self.first, self.last)
        if "seen" in dims:
            labels["seen"] = np.arange(low, low + target.shape[1])
        if "group" in dims:
            labels["group"] = np.array(list(self.groups), dtype=object)
        if "sample" in dims:
            own = self.samples.labels
            numeric = all(isinstance(label, int | np.integer) for label in own)
            labels["sample"] = np.array(own, dtype=np.int64 if numeric else object)
        assert all(sizes[axis] == 1 for axis in SAMPLE_AXES if axis not in self.keep and axis != "seen")
        attrs = {"first_step": self.first, "last_step": self.last - 1, "explaind_track": version("explaind_track")}
        return Influence(xr.Dataset(variables, labels, attrs))


def _tell_of_mismatch(walk: SampleWalk) -> None:
    worst = max(walk.wrong, key=walk.mismatch.__getitem__)
    warnings.warn(
        f"at {len(walk.wrong)} of {len(walk.mismatch)} steps, the samples' influences do not add up to that of the "
        f"gradient which the optimizer saw (at step {worst} they miss it by {walk.mismatch[worst]:.2g} of its size), "
        "and are wrong there. Tell tracker.batch of every batch with the weights of its samples (a clipped gradient's "
        "factor among them), put the model into the mode that it was trained in, and see that data(index) gives what it "
        "gave then",
        SampleMismatch,
        stacklevel=4,
    )


def cuts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(low, min(stop, low + size)) for low in range(start, stop, size)]


def choose_samples(
    source: "Trajectory | StepList",
    last: int,
    loss: SampleLoss | None,
    data: Data | None,
    samples: Iterable[int] | None,
    partition: Any,
) -> Samples:
    """The sample axis: every training index of the steps before `last`, or those asked for, or a partition's labels.

    Raises ValueError for what the record lacks, with the remedy.
    """
    if loss is None:
        raise ValueError("influences of samples need sample_loss=: (model, batch) → unreduced losses (N,)")
    found: set[int] = set()
    for number, index, stored in source.indices(last):
        if index is None:
            raise ValueError(
                f"a batch of step {number} has no index, so its samples have no names; in training, pass index= to "
                "tracker.batch"
            )
        if not stored and data is None:
            raise ValueError(
                f"the record holds the indices of step {number}'s samples but not the samples; pass data=, a function "
                "from an index tensor (N,) to the batch of sample_loss, such as lambda index: (x[index], y[index])"
            )
        found |= set(index.tolist())
    if not found:
        raise ValueError(
            "the run has no record of its batches; in training, call tracker.batch(batch, index=…) for each"
        )
    if samples is not None:
        wanted = [int(index) for index in samples]
        if set(wanted) - found:
            raise ValueError(f"no step saw the samples {sorted(set(wanted) - found)[:10]}")
        if len(set(wanted)) < len(wanted):
            raise ValueError("samples= names some training indices twice")
    else:
        wanted = sorted(found)
    if partition is None:
        return Samples(loss, data, wanted, {index: place for place, index in enumerate(wanted)}, False)
    label = {index: _label(partition[index]) for index in wanted}
    labels = sorted(set(label.values()), key=lambda value: (str(type(value)), value))
    return Samples(loss, data, labels, {index: labels.index(own) for index, own in label.items()}, True)


def _label(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor | np.generic) else value


def explain_samples(
    steps: "Trajectory | Iterable[Step]",
    model: nn.Module,
    query: Query,
    groups: Groups,
    keep: Sequence[str],
    window: tuple[int, int] | None,
    quadrature: Quadrature | None,
    memory: int,
    progress: bool,
    sample_loss: SampleLoss | None,
    data: Data | None,
    samples: Iterable[int] | None,
    partition: Any,
) -> Influence:
    """`explain` with "sample" or "seen" among the axes to keep."""
    source = steps if isinstance(steps, Trajectory) else StepList(steps)
    if isinstance(steps, Trajectory):
        steps.check_model(model)
    check_query(model, query)
    last = window[1] if window else len(source)
    chosen = choose_samples(source, last, sample_loss, data, samples, partition)
    plan = SampleExplanation(source, model, query, groups, keep, window, chosen, quadrature, memory)
    return plan.run(progress)
