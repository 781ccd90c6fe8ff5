"""The plan of a counterfactual: sweeps back over the run, each with as many targets as fit the memory."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from os import PathLike
from time import perf_counter
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from explaind_track.core import distributed
from explaind_track.core.influence import Influence
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.step import State
from explaind_track.core.tensors import size_in_bytes
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.path_integral import gauss_legendre
from explaind_track.engine.targets import kept_targets, output_count, some_outputs
from explaind_track.explanation.digests import Digest, fingerprint, model_digest, query_digest, told_apart
from explaind_track.explanation.plan import ExplanationPlan
from explaind_track.explanation.sample_axis import Array, SampleAxis, data_digest, labels_of
from explaind_track.explanation.step_source import RepeatableSteps
from explaind_track.explanation.tiles import Tile, cut_tiles
from explaind_track.record.results import Store
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.adjoint import Adjoint
from explaind_track.what_if.curvature import Curvature
from explaind_track.what_if.snapshots import snapshots_back
from explaind_track.what_if.step_gradients import AuxiliaryLosses
from explaind_track.what_if.sweep import Cells, Standstill, Sweep

AXES = ("seen", "query", "output", "sample")
"""What the effects of samples may be kept over. `seen`: the step in whose batch the sample was."""

Notes = dict[str, dict[str, float]]
"""By tile that is done, and by step: the mismatch."""

SETTINGS_AXES = ("step", "settings", "query", "output")

COPIES = 8
"""Of the parameters for each target in flight: its adjoints by parameters, gradient and the optimizer's state, and what
arithmetic takes beside them."""


class CounterfactualPlan(ExplanationPlan):
    """Derivatives of a run, planned and not yet computed."""

    def __init__(
        self,
        trajectory: Trajectory,
        source: RepeatableSteps,
        model: nn.Module,
        query: Query,
        keep: Sequence[str],
        samples: SampleAxis,
        auxiliary: AuxiliaryLosses,
        initial: bool,
        memory: int,
        progress: bool,
        out: str | PathLike[str] | None,
    ) -> None:
        super().__init__(progress, out)
        self.keep = tuple(axis for axis in AXES if axis in keep)
        self.query = kept_targets(query, keep)
        self._trajectory, self._source, self._model, self._samples = trajectory, source, model, samples
        self._window = (source.first, source.last)
        self._auxiliary, self._initial, self._memory = auxiliary, initial, memory
        self._curvature = Curvature(model, samples.loss, auxiliary, memory)
        self._curvature.statistics.require_affine()
        if "sample" not in keep:
            self._samples = replace(samples, labels=["all"], place=dict.fromkeys(samples.place, 0))

    @cached_property
    def outputs(self) -> int:
        return output_count(self._model, self.query)

    @cached_property
    def _end(self) -> tuple[State, tuple[str, ...], int]:
        """The model where the run ended, the parameters that the optimizer has trained, and its groups' number."""
        replay = self._trajectory.replay(len(self._trajectory))
        groups = replay.optimizer.param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
        trained = tuple(name for name, parameter in replay.parameters.items() if id(parameter) in held)
        return State({n: p.detach() for n, p in replay.parameters.items()}, replay.buffers), trained, len(groups)

    @property
    def _sizes(self) -> dict[str, int]:
        """Of the effects; 1 for axes that are not kept."""
        first, last = self._window
        return {
            "seen": last - first if "seen" in self.keep else 1,
            "query": len(self.query),
            "output": self.outputs,
            "sample": len(self._samples.labels) if "sample" in self.keep else 1,
        }

    @property
    def shape(self) -> dict[str, int]:
        return {axis: size for axis, size in self._sizes.items() if axis in self.keep}

    @property
    def dtype(self) -> np.dtype[Any]:
        widest = max((p.dtype for p in self._model.parameters()), key=lambda dtype: dtype.itemsize)
        return np.dtype(np.float64 if widest is torch.float64 else np.float32)

    @property
    def result_bytes(self) -> int:
        size = math.prod(self.shape.values()) * self.dtype.itemsize
        return size + (len(self.query) * self.outputs * self._parameter_bytes if self._initial else 0)

    @property
    def _parameter_bytes(self) -> int:
        parameters = parameters_of(self._model)
        return size_in_bytes({name: parameters[name] for name in self._end[1]})

    @property
    def working_bytes(self) -> int:
        targets = max(tile.targets for tile in self.tiles())
        return targets * COPIES * self._parameter_bytes + 2 * self._memory

    @property
    def mode(self) -> str:
        return "reverse, an adjoint and a Hessian-vector product for each target"

    @property
    def passes(self) -> int:
        return len(self.tiles())

    @property
    def steps(self) -> int:
        return self.passes * self._length

    @property
    def _length(self) -> int:
        """The steps of one sweep: from the end of the run to the window's beginning."""
        return len(self._trajectory) - self._window[0]

    def tiles(self) -> list[Tile]:
        """At least one for each process."""
        targets = max(1, self._memory // (COPIES * self._parameter_bytes))
        return cut_tiles((0, 1), False, len(self.query), self.outputs, targets, distributed.processes())

    def seconds(self) -> float:
        """Tries the last step, with the first tile's targets."""
        tile, last = self.tiles()[0], len(self._trajectory)
        sweep, cells = self._sweep(tile), _of_tile(self._arrays(None), tile)
        times: list[float] = []
        for _ in range(2):  # the first pays for what is only done once
            started = perf_counter()
            sweep.run(snapshots_back(self._trajectory, last - 1, last, self._memory), cells, lambda: None)
            times.append(perf_counter() - started)
            if times[0] > 30:
                break
        return times[-1] * self.steps / distributed.processes()

    def compute(self) -> Influence:
        """In memory, or in a directory, where it goes on with the tiles that are not done."""
        if self.out is not None and (distributed.processes() > 1 or self._initial):
            raise ValueError("out= is for one process, and without initial=; keep fewer axes, or take fewer targets")
        if self.out is None:
            return self._compute(None)
        with Store(self.out, self._request()) as store:
            return store.result() or self._compute(store)

    def _compute(self, store: Store | None) -> Influence:
        arrays = self._arrays(store)
        targets = arrays.effect.shape[1:3]
        initial = {name: np.zeros((*targets, *p.shape), self.dtype) for name, p in self._initials.items()}
        mismatch: Notes = {} if store is None else store.notes

        tiles = distributed.share([tile for tile in self.tiles() if tile.name not in mismatch])
        with tqdm(total=len(tiles) * self._length, desc="back", unit="step", disable=not self.progress) as bar:
            for tile in tiles:
                sweep, cells = self._sweep(tile), _of_tile(arrays, tile)
                for cell in (cells.effect, cells.rate, cells.decay):
                    cell[...] = 0  # where an interrupted sweep may have left its beginning
                steps = snapshots_back(self._trajectory, self._window[0], len(self._trajectory), self._memory)
                sweep.run(steps, cells, bar.update)

                # what is left in the end are the derivatives by where the window begins
                for name, cell in initial.items():
                    rows = sweep.adjoint.parameters[name].cpu().numpy()
                    cell[tile.rows, tile.outputs] = rows.reshape(cell[tile.rows, tile.outputs].shape)
                mismatch[tile.name] = {str(number): value for number, value in sweep.mismatch.by_step.items()}
                if store is not None:
                    store.done(tile.name, {"query": tile.rows, "output": tile.outputs}, mismatch[tile.name])
                if sweep.mismatch.wrong:
                    sweep.mismatch.warn()
        distributed.add_up(arrays.effect, arrays.rate, arrays.decay, *initial.values())
        return self._result(arrays, initial, distributed.gather(mismatch), store)

    @property
    def _initials(self) -> dict[str, Tensor]:
        return {name: self._end[0].parameters[name] for name in self._end[1]} if self._initial else {}

    def _arrays(self, store: Store | None) -> Cells:
        """Of the whole result, zeros or what the directory holds; axes that are not kept have length 1."""
        sizes = {**self._sizes, "step": self._window[1] - self._window[0], "settings": self._end[2]}

        def array(name: str, axes: Sequence[str], always: Sequence[str]) -> Array:
            shape = tuple(sizes[axis] for axis in axes)
            if store is None:
                return np.zeros(shape, self.dtype)
            there = {axis: sizes[axis] for axis in axes if axis in self.keep or axis in always}
            return store.array(name, there, self.dtype).reshape(shape)

        return Cells(
            array("effect", AXES, ()),
            array("rate", SETTINGS_AXES, ("step", "settings")),
            array("decay", SETTINGS_AXES, ("step", "settings")),
        )

    def _sweep(self, tile: Tile) -> Sweep:
        """Ready to run, with the gradients of the tile's targets where the run ended."""
        state, names, _ = self._end
        query = self.query
        if not query.reduction:
            query = query.rows(tile.rows.start, tile.rows.stop, next(iter(state.parameters.values())).device)
        if tile.outputs != slice(0, self.outputs):
            query = some_outputs(query, tile.outputs.start, tile.outputs.stop)
        # ∂f/∂θ_N, and with the norms' weights and biases, by the running statistics
        statistics = self._curvature.statistics
        moved = tuple(dict.fromkeys((*names, *statistics.scales)))
        features = Features(Functional(self._model), query, self._memory)
        gradients = features.of(Standstill(len(self._trajectory), state, state, moved), gauss_legendre(1))
        adjoint = {**{name: gradients[name] for name in names}, **statistics.of_targets(gradients, state)}
        return Sweep(Adjoint(adjoint), self._curvature, self._samples, self._window)

    def _result(
        self,
        arrays: Cells,
        initial: dict[str, Array],
        mismatches: list[dict[str, dict[str, float]]],
        store: Store | None,
    ) -> Influence:
        mismatch: dict[int, float] = {}
        for found in mismatches:
            for values in found.values():
                for number, value in values.items():
                    mismatch[int(number)] = max(value, mismatch.get(int(number), value))
        numbers = sorted(mismatch)

        dims = [axis for axis in AXES if axis in self.keep]
        settings = ["step", "settings", *(axis for axis in ("query", "output") if axis in self.keep)]
        variables: dict[str, Any] = {
            "effect": (dims, arrays.effect.squeeze(_summed(AXES, dims))),
            "rate": (settings, arrays.rate.squeeze(_summed(SETTINGS_AXES, settings))),
            "decay": (settings, arrays.decay.squeeze(_summed(SETTINGS_AXES, settings))),
            "mismatch": (["walked"], np.array([mismatch[number] for number in numbers])),
        }
        for name, cell in initial.items():
            axes = [f"{name}.{place}" for place in range(cell.ndim - 2)]
            variables[f"initial:{name}"] = (["query", "output", *axes], cell)

        first, last = self._window
        labels = {
            "walked": np.array(numbers, dtype=np.int64),
            "step": np.arange(first, last),
            "seen": np.arange(first, last),
        }
        labels["sample"] = labels_of(self._samples.labels)
        kept = {name: values for name, values in labels.items() if name in (*dims, "walked", "step")}
        attrs = {"first_step": first, "last_step": last - 1, "explaind_track": version("explaind_track")}
        data = xr.Dataset(variables, kept, attrs)
        return Influence(data) if store is None else store.complete(data, {})

    def _request(self) -> dict[str, Any]:
        """What a directory remembers of what it holds."""
        return {
            "keep": self.keep,
            "window": list(self._window),
            "samples": fingerprint(self._samples.labels, sorted(self._samples.place.items())),
            "modes": fingerprint([module.training for module in self._model.modules()]),
            **told_apart(
                {
                    "sample_loss": Digest().add(self._samples.loss, "sample_loss"),
                    "auxiliary": Digest().add(dict(self._auxiliary), "auxiliary"),
                    "query": query_digest(self.query),
                    "model": model_digest(self._model),
                    "data": data_digest(self._source, self._samples.data),
                }
            ),
            "targets": [len(self.query), self.outputs],
            "trajectory": self._source.fingerprint,
            "walks": [tile.name for tile in self.tiles()],
        }


def _of_tile(cells: Cells, tile: Tile) -> Cells:
    """The tile's part of them."""
    return Cells(
        cells.effect[:, tile.rows, tile.outputs],
        cells.rate[:, :, tile.rows, tile.outputs],
        cells.decay[:, :, tile.rows, tile.outputs],
    )


def _summed(axes: Sequence[str], kept: Sequence[str]) -> tuple[int, ...]:
    """The places of the axes that are not kept."""
    return tuple(place for place, axis in enumerate(axes) if axis not in kept)
