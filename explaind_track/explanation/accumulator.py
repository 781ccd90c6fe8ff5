"""Sums the terms of steps into an `Influence`, over the axes that it does not keep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind_track.core.influence import AXES, Influence
from explaind_track.engine.path_integral import Terms


class Accumulator:
    """Sums the terms of steps into an `Influence` that keeps some axes. Where it does not keep the step, it holds the
    sum over steps for every group, query and output, since the importance takes absolute values only then."""

    def __init__(self, keep: Sequence[str], groups: Sequence[str]) -> None:
        """Raises ValueError for axes that there are not."""
        unknown = set(keep) - set(AXES)
        if unknown:
            raise ValueError(f"keep takes some of {AXES}, got {tuple(keep)}")
        self.keep = tuple(axis for axis in AXES if axis in keep)
        self.groups = tuple(groups)
        self.parts: tuple[str, ...] = ()
        self._chunks: dict[int, Terms] = {}
        self._initial: dict[int, Tensor] = {}
        self._open: list[dict[str, Tensor]] = []
        self._rows: list[dict[str, Tensor]] = []
        self._steps: list[int] = []
        self._nodes: list[int] = []

    def begin(self, number: int, nodes: int, parts: tuple[str, ...]) -> None:
        """Starts a step. Raises ValueError if its parts are not those of the steps before."""
        if self.parts and parts != self.parts:
            raise ValueError(f"step {number} has the parts {parts}, the steps before it had {self.parts}")
        self.parts = parts
        self._steps.append(number)
        self._nodes.append(nodes)

    def add(self, start: int, terms: Terms) -> None:
        """Adds the terms of the queries from row `start` on."""
        if "group" not in self.keep:
            terms = terms.grouped()
        if {"query", "output"} <= set(self.keep) and start not in self._initial:
            self._initial[start] = (terms.after - terms.buffers - terms.change).cpu()
        if "step" in self.keep:
            self._open.append(self._reduce(terms))
        elif start in self._chunks:
            self._chunks[start] += terms
        else:
            self._chunks[start] = terms.copy()

    def end(self) -> dict[str, Tensor]:
        """Closes the step and returns its row (empty where steps are summed)."""
        if "step" not in self.keep:
            return {}
        row = self._join(self._open)
        self._open = []
        self._rows.append(row)
        return row

    def _reduce(self, terms: Terms) -> dict[str, Tensor]:
        """The terms of one chunk of queries, summed over the axes that are not kept; norms are still squared."""
        group, query, output = (axis in self.keep for axis in ("group", "query", "output"))
        gone = tuple(axis for axis, kept in ((-2, query), (-1, output)) if not kept)
        across = (-1,) if query else (-2, -1)

        def over(value: Tensor, axes: tuple[int, ...]) -> Tensor:
            return (value.sum(axes) if axes else value).cpu()

        totals = terms.influence.sum(1)
        return {
            "influence": over(terms.influence if group else totals, gone),
            "importance": over((terms.influence if group else totals).abs(), across),
            "total_importance": over(totals.abs(), across),
            "rounding": over(terms.rounding, gone),
            "buffers": over(terms.buffers, gone),
            "change": over(terms.change, gone),
            "final": over(terms.after, gone),
            "remainder": over(terms.remainder, gone),
            "_remainder": terms.remainder.square().sum().double().cpu(),
            "_change": terms.change.square().sum().double().cpu(),
            "_floor": terms.after.square().sum().double().cpu() * (4 * torch.finfo(terms.after.dtype).eps) ** 2,
        }

    def _join(self, chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The rows of all chunks as one: laid end to end along the query axis if that is kept, else added."""
        dims = self.dims()

        def join(name: str) -> Tensor:
            values = [chunk[name] for chunk in chunks]
            axes = [axis for axis in dims.get(name, ()) if axis != "step"]
            return torch.cat(values, axes.index("query")) if "query" in axes else torch.stack(values).sum(0)

        row = {name: join(name) for name in chunks[0]}
        remainder, change, floor = (row.pop(name).sqrt() for name in ("_remainder", "_change", "_floor"))
        row["residual"] = torch.where(change > 0, remainder / change, remainder)
        row["residual_floor"] = torch.where(change > 0, floor / change, floor)
        return row

    @property
    def state(self) -> tuple[Any, ...]:
        """All that was taken in, to be joined with others'."""
        return self.parts, self._chunks, self._initial, self._rows, self._steps, self._nodes

    def join(self, states: Sequence[tuple[Any, ...]]) -> None:
        """Becomes what it would be, had it taken in the steps of all these states, which follow on each other."""
        states = [state for state in states if state[4]]
        if not states:
            return
        self.parts, self._chunks, self._initial = states[0][:3]
        for _, chunks, *_ in states[1:]:
            for start, terms in chunks.items():
                self._chunks[start] += terms
        self._rows, self._steps, self._nodes = ([item for state in states for item in state[p]] for p in (3, 4, 5))

    def dims(self) -> dict[str, tuple[str, ...]]:
        """The axes of every variable but `part`'s and `step`'s order: see `result`."""
        kept = set(self.keep)
        cells = tuple(axis for axis in ("step", "query", "output") if axis in kept)
        return {
            "influence": ("part", *self.keep),
            "importance": ("part", *(axis for axis in self.keep if axis != "output")),
            "total_importance": ("part", *(axis for axis in self.keep if axis not in ("group", "output"))),
            **dict.fromkeys(("rounding", "buffers", "change", "final", "remainder"), cells),
            "residual": tuple(axis for axis in cells if axis == "step"),
            "residual_floor": tuple(axis for axis in cells if axis == "step"),
        }

    def result(self, attrs: Mapping[str, Any]) -> Influence:
        """The influence of all steps so far. Raises ValueError if there was none."""
        if not self._steps:
            raise ValueError("there is no step to sum over")
        if "step" in self.keep:
            values = {name: torch.stack([row[name] for row in self._rows], 0) for name in self._rows[0]}
            for name, axes in self.dims().items():  # the part axis comes first, the step axis after it
                if axes and axes[0] == "part":
                    values[name] = values[name].movedim(0, 1)
        else:
            values = self._join([self._reduce(self._chunks[start]) for start in sorted(self._chunks)])
        dims = self.dims()
        variables: dict[str, Any] = {name: (dims[name], value.numpy()) for name, value in values.items()}
        if "step" in self.keep:
            variables["nodes"] = (("step",), np.array(self._nodes))
        else:
            variables["nodes"] = ((), np.array(max(self._nodes)))
        if self._initial:
            initial = torch.cat([self._initial[start] for start in sorted(self._initial)])
            variables["initial"] = (("query", "output"), initial.numpy())
            if "step" in self.keep:
                variables["final"] = (("query", "output"), values["final"][-1].numpy())
        else:
            del variables["final"]
        labels: dict[str, Any] = {"part": np.array(self.parts, dtype=object)}
        if "step" in self.keep:
            labels["step"] = np.array(self._steps)
        if "group" in self.keep:
            labels["group"] = np.array(self.groups, dtype=object)
        span = {"first_step": self._steps[0], "last_step": self._steps[-1], "steps": len(self._steps)}
        return Influence(xr.Dataset(variables, labels, {**attrs, **span}))
