"""Plans and runs `explain` over steps, groups, queries and outputs: everything that needs no single sample."""

import math
import warnings
from collections.abc import Callable
from os import PathLike

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from explaind_track.core import distributed
from explaind_track.core.influence import Influence
from explaind_track.core.modules import parameters_of
from explaind_track.core.tensors import cuts, explained_bytes, explained_type
from explaind_track.engine.targets import output_count
from explaind_track.errors import ResidualWarning
from explaind_track.explanation.digests import model_digest, query_digest, told_apart
from explaind_track.explanation.explainer import Explainer
from explaind_track.explanation.plan import ExplanationPlan, timed
from explaind_track.explanation.step_source import StepSource
from explaind_track.record.results import Store

RESIDUAL_LIMIT = 0.5
"""Of the change, what a split may leave over before it says little."""


class GroupPlan(ExplanationPlan):
    """Influences of groups of parameters, planned and not yet computed."""

    def __init__(
        self,
        source: StepSource,
        make: Callable[[], Explainer],
        memory: int,
        progress: bool,
        out: str | PathLike[str] | None,
    ) -> None:
        """make: an Explainer with one choice of kept axes."""
        super().__init__(progress, out)
        self._source, self._make, self._memory = source, make, memory
        self._example = make()
        """An Explainer that takes no step: it knows the query, the groups and the axes."""

    @property
    def keep(self) -> tuple[str, ...]:
        return self._example.accumulators[0].keep

    @property
    def shape(self) -> dict[str, int]:
        integrator, accumulator = self._example.integrator, self._example.accumulators[0]
        sizes = {
            "part": 2 if integrator.wanted_parts is None else len(integrator.wanted_parts),
            "step": self.steps,
            "group": len(accumulator.groups),
            "query": len(integrator.query),
            "output": output_count(integrator.functional.model, integrator.query),
        }
        if "token" in accumulator.keep:
            sizes["token"] = int(integrator.query.counted.sum())
        return {axis: size for axis, size in sizes.items() if axis in ("part", *self.keep)}

    @property
    def result_bytes(self) -> int:
        model = self._example.integrator.functional.model
        return math.prod(self.shape.values()) * max(explained_type(p.dtype).itemsize for p in model.parameters())

    @property
    def working_bytes(self) -> int:
        integrator = self._example.integrator
        copies = 2 if integrator.streams else 5  # θ_s(t), and what the step holds
        return self._memory + copies * explained_bytes(parameters_of(integrator.functional.model))

    @property
    def mode(self) -> str:
        return self._example.integrator.mode

    @property
    def passes(self) -> int:
        return 1

    @property
    def steps(self) -> int:
        return len(self._source)

    def seconds(self) -> float:
        """Tries the step in the middle of the window."""
        step, replay = self._source.trial()
        explainer = self._make()
        return self.steps * (replay + timed(lambda: explainer.add(step))) / distributed.processes()

    def compute(self) -> Influence:
        found = self._compute()
        whole = self._example.integrator.wanted_parts is None  # else what is left has parts that nobody asked for
        if whole and not self._example.close and distributed.rank() == 0:
            warn_of_residuals(found)
        return found

    def _compute(self) -> Influence:
        if self.out is None:
            return self._in_memory()
        if distributed.processes() > 1:
            raise ValueError("out= is for one process; in several, keep fewer axes or give each process its own window")
        self._refuse_unknown_parts()
        with Store(self.out, self._request()) as store:
            return store.result() or self._on_disk(store)

    def _refuse_unknown_parts(self) -> None:
        """Raises ValueError for parts that the first step does not have, before anything is written."""
        if self._example.integrator.wanted_parts is not None:
            step = next(self._source.forwards(self._source.first, self._source.first + 1))
            self._example.integrator.parts(step)

    def _in_memory(self) -> Influence:
        """Each process takes its share of the steps; of a stream, the first process takes all that come."""
        first, last = self._source.first, self._source.last
        each = max(1, -(-(last - first) // distributed.processes()))
        shares = cuts(first, last, each) or [slice(first, last)]
        explainer = self._make()
        for share in shares[distributed.rank() : distributed.rank() + 1]:
            total = share.stop - share.start or self.steps or None
            with tqdm(total=total, desc="explain", unit="step", disable=not self.progress) as bar:
                self._add(explainer, share, bar)

        for accumulator in explainer.accumulators:
            accumulator.join(distributed.gather(accumulator.sums))
        return explainer.results()[0]

    def _add(self, explainer: Explainer, steps: slice, bar: tqdm) -> None:
        for step in self._source.forwards(steps.start, steps.stop):
            explainer.add(step)
            bar.update()

    def _on_disk(self, store: Store) -> Influence:
        """Piece after piece of the steps, each as large as a pass; their arrays lie end to end along the steps."""
        if "step" not in self.keep:
            return store.complete(self._in_memory().data, {})

        each = max(1, self._memory // max(1, self.result_bytes // self.steps))
        labels: list[xr.Dataset] = []
        with tqdm(total=self.steps, desc="explain", unit="step", disable=not self.progress) as bar:
            for piece in cuts(self._source.first, self._source.last, each):
                name = f"{piece.start}-{piece.stop}"
                path = store.directory / f"{name}.safetensors"
                if name in store.notes:
                    bar.update(piece.stop - piece.start)
                else:
                    explainer = self._make()
                    self._add(explainer, piece, bar)
                    data = self._with_all_parts(explainer.results()[0].data)
                    large = [key for key in data.data_vars if data[key].ndim > 1 and "step" in data[key].dims]
                    for key in large:
                        self._write(store, str(key), data[key], piece)
                    store.write(path.name, data.drop_vars(large))
                    first = self._source.first
                    store.done(name, {"step": slice(piece.start - first, piece.start - first + data.sizes["step"])})
                labels.append(Influence.load(path).data)
        return self._together(store, labels)

    def _with_all_parts(self, data: xr.Dataset) -> xr.Dataset:
        """A piece, with zeros for the part `outside` where only other pieces have it."""
        if "outside" in data["part"].values or not self._source.has_outside:
            return data
        own = tuple(data["part"].values)
        wanted = self._example.integrator.wanted_parts or (*own, "outside")
        return data.reindex(part=[name for name in wanted if name in (*own, "outside")], fill_value=0.0)

    def _write(self, store: Store, name: str, values: xr.DataArray, piece: slice) -> None:
        """Writes a piece's rows into the whole's array, whatever the place of the step axis."""
        sizes = {str(axis): self.steps if axis == "step" else size for axis, size in values.sizes.items()}
        target = np.moveaxis(store.array(name, sizes, values.dtype), values.dims.index("step"), 0)
        start = piece.start - self._source.first
        target[start : start + values.sizes["step"]] = values.transpose("step", ...).values

    def _together(self, store: Store, labels: list[xr.Dataset]) -> Influence:
        """The small variables of all pieces; the prediction before is the first's, that after the last's."""
        over_steps = [name for name in labels[0].data_vars if "step" in labels[0][name].dims]
        whole = xr.concat([one[over_steps] for one in labels], "step", join="exact", combine_attrs="override")
        whole = whole.assign_coords({name: labels[0][name] for name in labels[0].coords if name not in whole.coords})
        whole = whole.assign({name: labels[0][name] for name in labels[0].data_vars if name not in over_steps})
        if "final" in whole:
            whole["final"] = labels[-1]["final"]
        whole.attrs |= {"last_step": labels[-1].attrs["last_step"], "steps": self.steps}
        return store.complete(whole, {})

    def _request(self) -> dict[str, object]:
        """What the directory remembers of what it holds."""
        integrator, accumulator = self._example.integrator, self._example.accumulators[0]
        rule = integrator.quadrature
        return {
            "keep": self.keep,
            "window": [self._source.first, self._source.last],
            "groups": accumulator.groups,
            "parts": integrator.wanted_parts,
            "close": self._example.close,
            **told_apart({"query": query_digest(integrator.query), "model": model_digest(integrator.functional.model)}),
            "trajectory": self._source.fingerprint,
            "quadrature": rule.settings,
            "memory": self._memory,
        }


def warn_of_residuals(influence: Influence) -> None:
    """Warns with ResidualWarning where steps leave more than half of the change over, and more than rounding."""
    residual, floor = np.atleast_1d(influence.residual.values), np.atleast_1d(influence.data["residual_floor"].values)
    large = (residual > RESIDUAL_LIMIT) & (residual > 2 * floor)
    if not large.any():
        return
    worst = int(residual.argmax())
    steps = influence.data["step"].values if "step" in influence.data.coords else None
    where = "the window" if steps is None else f"{large.sum()} of {len(steps)} steps (most: step {steps[worst]})"
    nodes = int(np.max(influence.data["nodes"].values))
    warnings.warn(
        f"the split of {where} leaves {residual[worst]:.2g} of the change over, with {nodes} node(s): what it says of "
        'parts and groups there is little. accuracy="1e-2" takes as many nodes as that needs, '
        "Quadrature(tolerance=…, max_nodes=…) more; close=True shares the rest out",
        ResidualWarning,
        stacklevel=5,
    )
