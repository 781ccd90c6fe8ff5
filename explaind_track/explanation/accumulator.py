"""Sums the terms of steps into an `Influence`, over the axes that it does not keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind_track.core.influence import AXES, Influence
from explaind_track.core.queries import Query
from explaind_track.engine.path_integral import Terms, arranged
from explaind_track.explanation.step_rows import Block, FiledRows, Row


@dataclass
class Reduced:
    """One chunk of queries, summed over the axes that are not kept."""

    values: Row
    squares: tuple[Tensor, Tensor, Tensor]
    """‖remainder‖², ‖change‖², and the square of what float arithmetic may leave of the first, in float64: chunks add
    up before the roots are taken."""


class Span(NamedTuple):
    """Which steps were taken in."""

    first: int
    last: int
    steps: int
    """How many."""
    nodes: int
    """The most that one of them took."""

    def joined(self, later: "Span") -> "Span":
        """Together with those of a stretch that follows."""
        return Span(self.first, later.last, self.steps + later.steps, max(self.nodes, later.nodes))


@dataclass
class Sums:
    """All that an Accumulator has taken in; those of neighbouring stretches of steps can be joined."""

    order: tuple[str, ...] = ()
    """Of the parts, where it was asked for; else in that in which they come."""
    parts: tuple[str, ...] = ()
    """Of all steps; a step that lacks some of them has nothing in these."""
    span: Span | None = None
    """Of all steps; None: there was none yet."""
    rows: list[Block] | FiledRows = field(default_factory=list)
    """Of the steps, where the step is kept."""
    chunks: dict[int, Terms] = field(default_factory=dict)
    """Where the step is not kept: the sums over the steps, by the chunk's first query."""
    initial: dict[int, Tensor] = field(default_factory=dict)
    """The predictions before the first step, by the chunk's first query."""

    def extend(self, other: "Sums") -> None:
        """Takes in the sums of the steps that follow."""
        self.include(other.parts)
        assert self.span is not None  # there are steps in both
        assert other.span is not None
        self.span = self.span.joined(other.span)
        for block in other.rows:
            self.rows.append(block)
        for start, terms in other.chunks.items():
            self.add(start, terms)

    def include(self, parts: Sequence[str]) -> None:
        """Gives the parts that are new a place among those known."""
        known = dict.fromkeys((*self.parts, *parts))
        self.parts = tuple(sorted(known, key=self.order.index) if self.order else known)

    def add(self, start: int, terms: Terms) -> None:
        """Adds a step's terms to the sums of its chunk; their parts are among those known."""
        if start in self.chunks:
            self.chunks[start] = self.chunks[start].arranged(self.parts)
            self.chunks[start] += terms.arranged(self.parts)
        else:
            self.chunks[start] = terms.copy()


class Accumulator:
    """Sums the terms of steps into an `Influence` that keeps some axes. Where it does not keep the step, it holds the
    sum over steps for every group, query and output, since the importance takes absolute values only then."""

    def __init__(
        self,
        keep: Sequence[str],
        groups: Sequence[str],
        parts: Sequence[str] | None = None,
        rows: FiledRows | None = None,
        query: Query | None = None,
    ) -> None:
        """parts: in the order asked for; None: as they come. rows: for those of the steps; None: in memory. query: the
        one that is explained, which has the axis "token".

        Raises ValueError for axes that there are not, and for tokens of a query that is not one of tokens.
        """
        unknown = set(keep) - set(AXES)
        if unknown:
            raise ValueError(f"keep takes some of {AXES}, got {tuple(keep)}")
        if "token" in keep and {"query", "output"} & set(keep):
            raise ValueError(
                f"the tokens of all inputs are one axis in the place of query and output, got keep={tuple(keep)}: "
                "leave out 'query' and 'output', or 'token'"
            )
        self.keep = tuple(axis for axis in AXES if axis in keep)
        self._query = query if "token" in keep else None
        self._counted = None if self._query is None else self._query.counted
        """Of the tokens along the axis, where that is kept."""
        self.groups = tuple(groups)
        self.sums = Sums(tuple(parts or ()), rows=[] if rows is None else rows)
        self._begun = Span(0, 0, 0, 0)
        """The step that has begun."""
        self._parts: tuple[str, ...] = ()
        self._open: list[Reduced] = []
        """Its chunks."""

    def begin(self, number: int, nodes: int, parts: tuple[str, ...]) -> None:
        """Starts a step. One that was started before and not closed is not in the rows."""
        self._begun, self._parts, self._open = Span(number, number, 1, nodes), parts, []
        self.sums.include(parts)

    def add(self, start: int, terms: Terms) -> None:
        """Adds the terms of the queries from row `start` on."""
        if "group" not in self.keep:
            terms = terms.grouped()
        if self._has_predictions and start not in self.sums.initial:
            self.sums.initial[start] = self._cells(terms.after - terms.buffers - terms.change, start).cpu()

        if "step" in self.keep:
            self._open.append(self._reduce(terms, start))
        else:
            self.sums.add(start, terms)

    def end(self) -> Row:
        """Closes the step and returns its row (empty where steps are summed)."""
        row = {}
        if "step" in self.keep:
            row = self._join(self._open)
            values = {name: value.unsqueeze(0) for name, value in row.items()}
            step, nodes = np.array([self._begun.first]), np.array([self._begun.nodes])
            self.sums.rows.append(Block(self._parts, step, nodes, values))
        self._open = []
        self.sums.span = self._begun if self.sums.span is None else self.sums.span.joined(self._begun)
        return row

    def join(self, every: Sequence[Sums]) -> None:
        """Becomes what it would be, had it taken in the steps of all these sums, which follow on each other."""
        taken = [sums for sums in every if sums.span is not None]
        if not taken:
            return
        self.sums = taken[0]
        for sums in taken[1:]:
            self.sums.extend(sums)

    @property
    def _has_predictions(self) -> bool:
        """Whether each target has a place of its own, so that its value before and after makes sense."""
        return "token" in self.keep or {"query", "output"} <= set(self.keep)

    def _cells(self, value: Tensor, start: int) -> Tensor:
        """(…, x, O) of the inputs from row `start` on, summed over the axes of query and output that are not kept; of
        tokens, those that count (…, t)."""
        if self._counted is not None:
            counted = self._counted[start : start + value.shape[-2]].to(value.device)
            return value[..., counted]
        gone = tuple(axis for axis, name in ((-2, "query"), (-1, "output")) if name not in self.keep)
        return value.sum(gone) if gone else value

    def _reduce(self, terms: Terms, start: int) -> Reduced:
        """The terms of one chunk of queries, from row `start` on, summed over the axes that are not kept."""
        across = (-1,) if "query" in self.keep else (-2, -1)
        totals = terms.influence.sum(1)
        cells = terms.influence if "group" in self.keep else totals
        values = {
            "importance": cells.abs().sum(across).cpu(),
            "total_importance": totals.abs().sum(across).cpu(),
        }
        for name, value in (
            ("influence", cells),
            ("rounding", terms.rounding),
            ("buffers", terms.buffers),
            ("change", terms.change),
            ("final", terms.after),
            ("remainder", terms.remainder),
        ):
            values[name] = self._cells(value, start).cpu()

        remainder, change, after = (
            value.square().sum().double().cpu() for value in (terms.remainder, terms.change, terms.after)
        )
        floor = after * (4 * terms.eps) ** 2
        return Reduced(values, (remainder, change, floor))

    def _join(self, chunks: Sequence[Reduced]) -> Row:
        """All chunks as one row: laid end to end along the axis of queries or tokens where that is kept, else added."""
        dims = self.dims()

        def join(name: str) -> Tensor:
            values = [chunk.values[name] for chunk in chunks]
            axes = [axis for axis in dims[name] if axis != "step"]
            along = [place for place, axis in enumerate(axes) if axis in ("query", "token")]
            return torch.cat(values, along[0]) if along else torch.stack(values).sum(0)

        row = {name: join(name) for name in chunks[0].values}
        squares = zip(*(chunk.squares for chunk in chunks), strict=True)
        remainder, change, floor = (torch.stack(column).sum(0).sqrt() for column in squares)
        row["residual"] = torch.where(change > 0, remainder / change, remainder)
        row["residual_floor"] = torch.where(change > 0, floor / change, floor)
        return row

    def dims(self) -> dict[str, tuple[str, ...]]:
        """The axes of every variable; that of the parts comes first, that of the steps behind it."""
        kept = set(self.keep)
        cells = tuple(axis for axis in ("step", "query", "output", "token") if axis in kept)
        return {
            "influence": ("part", *self.keep),
            "importance": ("part", *(axis for axis in self.keep if axis not in ("output", "token"))),
            "total_importance": ("part", *(axis for axis in self.keep if axis not in ("group", "output", "token"))),
            **dict.fromkeys(("rounding", "buffers", "change", "final", "remainder"), cells),
            "residual": tuple(axis for axis in cells if axis == "step"),
            "residual_floor": tuple(axis for axis in cells if axis == "step"),
        }

    def result(self, attrs: Mapping[str, Any]) -> Influence:
        """The influence of all steps so far. Raises ValueError if there was none."""
        sums = self.sums
        if sums.span is None:
            raise ValueError("there is no step to sum over")

        dims, by_step = self.dims(), "step" in self.keep
        blocks = list(sums.rows)
        values = self._stacked(blocks) if by_step else self._summed()
        variables: dict[str, Any] = {name: (dims[name], value.numpy()) for name, value in values.items()}
        nodes = np.concatenate([block.nodes for block in blocks]) if by_step else np.array(sums.span.nodes)
        variables["nodes"] = (("step",) if by_step else (), nodes)

        # the predictions before the first and behind the last step
        if sums.initial:
            axes = tuple(axis for axis in dims["final"] if axis != "step")
            initial = torch.cat([sums.initial[start] for start in sorted(sums.initial)])
            variables["initial"] = (axes, initial.numpy())
            if by_step:
                variables["final"] = (axes, values["final"][-1].numpy())
        else:
            del variables["final"]

        labels: dict[str, Any] = {"part": np.array(sums.parts, dtype=object)}
        if by_step:
            labels["step"] = np.concatenate([block.steps for block in blocks])
        if "group" in self.keep:
            labels["group"] = np.array(self.groups, dtype=object)
        if self._query is not None:
            told = self._query.token_labels()
            labels["token"] = told.pop("token")
            variables |= {name: ("token", values) for name, values in told.items()}
        span = {"first_step": sums.span.first, "last_step": sums.span.last, "steps": sums.span.steps}
        return Influence(xr.Dataset(variables, labels, {**attrs, **span}))

    def _summed(self) -> Row:
        """The sums over all steps as one row."""
        sums = self.sums
        return self._join(
            [self._reduce(sums.chunks[start].arranged(sums.parts), start) for start in sorted(sums.chunks)]
        )

    def _stacked(self, blocks: Sequence[Block]) -> Row:
        """The rows of all steps as one, with the step axis in its place."""
        values: Row = {}
        for name, axes in self.dims().items():
            if "part" in axes:
                rows = [arranged(block.values[name].movedim(1, 0), block.parts, self.sums.parts) for block in blocks]
                values[name] = torch.cat(rows, 1)
            else:
                values[name] = torch.cat([block.values[name] for block in blocks])
        return values
