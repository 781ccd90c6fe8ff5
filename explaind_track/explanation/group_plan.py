"""Plans and runs `explain` over steps, groups, queries and outputs: everything that needs no single sample."""

import math
from collections.abc import Callable
from os import PathLike

import numpy as np
import xarray as xr
from tqdm import tqdm

from explaind_track.core import distributed
from explaind_track.core.influence import Influence
from explaind_track.core.tensors import cuts, size_in_bytes
from explaind_track.engine.targets import output_count
from explaind_track.explanation.digests import query_digest
from explaind_track.explanation.explainer import Explainer
from explaind_track.explanation.plan import ExplanationPlan, timed
from explaind_track.explanation.step_source import StepStream
from explaind_track.record.results import Store
from explaind_track.record.trajectory import Trajectory


class GroupPlan(ExplanationPlan):
    """Influences of groups of parameters, planned and not yet computed."""

    def __init__(
        self,
        source: Trajectory | StepStream,
        make: Callable[[], Explainer],
        window: tuple[int, int] | None,
        memory: int,
        progress: bool,
        out: str | PathLike[str] | None,
    ) -> None:
        """make: an Explainer with one choice of kept axes."""
        super().__init__(progress, out)
        self._source, self._make, self._memory = source, make, memory
        self._explainer = make()
        self.first, self.last = window or (0, len(source))

    @property
    def keep(self) -> tuple[str, ...]:
        return self._explainer.accumulators[0].keep

    @property
    def shape(self) -> dict[str, int]:
        integrator, accumulator = self._explainer.integrator, self._explainer.accumulators[0]
        sizes = {
            "part": 2 if integrator.wanted_parts is None else len(integrator.wanted_parts),
            "step": self.last - self.first,
            "group": len(accumulator.groups),
            "query": len(integrator.query),
            "output": output_count(integrator.functional.model, integrator.query),
        }
        return {axis: size for axis, size in sizes.items() if axis in ("part", *self.keep)}

    @property
    def result_bytes(self) -> int:
        model = self._explainer.integrator.functional.model
        return math.prod(self.shape.values()) * max(parameter.dtype.itemsize for parameter in model.parameters())

    @property
    def working_bytes(self) -> int:
        return self._memory + 5 * size_in_bytes(dict(self._explainer.integrator.functional.model.named_parameters()))

    @property
    def passes(self) -> int:
        return 1

    @property
    def steps(self) -> int:
        return self.last - self.first

    def seconds(self) -> float:
        """Tries the step in the middle of the window."""
        if isinstance(self._source, StepStream):
            raise ValueError("the time is estimated by trying a step, which only a trajectory's steps allow")
        middle = (self.first + self.last) // 2
        start = self._source.keyframe(middle)
        stop = min(start + 10, middle + 1)
        replay = timed(lambda: sum(1 for _ in self._source.steps(start, stop))) / (stop - start)
        step = next(self._source.steps(middle, middle + 1))
        explainer = self._make()
        return self.steps * (replay + timed(lambda: explainer.add(step))) / distributed.processes()

    def compute(self) -> Influence:
        if self.out is None:
            return self._in_memory()
        if isinstance(self._source, StepStream):
            raise ValueError("out= goes on where it stopped, which only a trajectory's steps allow")
        if distributed.processes() > 1:
            raise ValueError("out= is for one process; in several, keep fewer axes or give each process its own window")
        return self._on_disk(Store(self.out, self._request()))

    def _in_memory(self) -> Influence:
        """Each process takes its share of the steps."""
        size = max(1, -(-self.steps // distributed.processes()))
        pieces = cuts(self.first, self.last, size) if self.steps else [slice(0, 0)]
        explainer = self._explainer
        for piece in pieces[distributed.rank() : distributed.rank() + 1]:
            total = piece.stop - piece.start or None
            with tqdm(total=total, desc="explain", unit="step", disable=not self.progress) as bar:
                self._add(explainer, piece, bar)
        for accumulator in explainer.accumulators:
            accumulator.join(distributed.gather(accumulator.state))
        return explainer.results()[0]

    def _add(self, explainer: Explainer, piece: slice, bar: tqdm) -> None:
        for step in self._source.steps(piece.start, piece.stop):
            explainer.add(step)
            bar.update()

    def _on_disk(self, store: Store) -> Influence:
        """Piece after piece of the steps, each as large as a pass; their arrays lie end to end along the steps."""
        if "step" not in self.keep:
            return store.complete(self._in_memory().data, {})
        each = max(1, self._memory // max(1, self.result_bytes // self.steps))
        labels: list[xr.Dataset] = []
        with tqdm(total=self.steps, desc="explain", unit="step", disable=not self.progress) as bar:
            for piece in cuts(self.first, self.last, each):
                explainer, name = self._make(), f"{piece.start}-{piece.stop}"
                path = store.directory / f"{name}.safetensors"
                if name in store.notes:
                    bar.update(piece.stop - piece.start)
                else:
                    self._add(explainer, piece, bar)
                    data = explainer.results()[0].data
                    large = [key for key in data.data_vars if data[key].ndim > 1 and "step" in data[key].dims]
                    for key in large:
                        self._write(store, str(key), data[key], piece)
                    Influence(data.drop_vars(large)).save(path)
                    store.done(name, [str(key) for key in large])
                labels.append(Influence.load(path).data)
        return self._together(store, labels)

    def _write(self, store: Store, name: str, values: xr.DataArray, piece: slice) -> None:
        sizes = {str(axis): self.steps if axis == "step" else size for axis, size in values.sizes.items()}
        target = np.moveaxis(store.array(name, sizes, values.dtype), values.dims.index("step"), 0)
        target[piece.start - self.first : piece.stop - self.first] = values.transpose("step", ...).values

    def _together(self, store: Store, labels: list[xr.Dataset]) -> Influence:
        """The small variables of all pieces; the prediction before is the first's, that after the last's."""
        over_steps = [name for name in labels[0].data_vars if "step" in labels[0][name].dims]
        whole = xr.concat([one[over_steps] for one in labels], "step", join="exact", combine_attrs="override")
        whole = whole.assign_coords({name: labels[0][name] for name in labels[0].coords if name not in whole.coords})
        whole = whole.assign({name: labels[0][name] for name in labels[0].data_vars if name not in over_steps})
        if "final" in whole:
            whole["final"] = labels[-1]["final"]
        whole.attrs |= {"last_step": self.last - 1, "steps": self.steps}
        return store.complete(whole, {})

    def _request(self) -> dict[str, object]:
        integrator, accumulator = self._explainer.integrator, self._explainer.accumulators[0]
        rule = integrator.quadrature
        return {
            "keep": self.keep,
            "window": [self.first, self.last],
            "groups": accumulator.groups,
            "parts": integrator.wanted_parts,
            "close": self._explainer.close,
            "query": query_digest(integrator.query),
            "trajectory": self._source.fingerprint,
            "quadrature": [rule.tolerance, rule.nodes, rule.max_nodes],
            "memory": self._memory,
        }
