"""Two ways to differentiate a step's targets in the directions of its parts and groups; `streaming` has the third.

*Forward*: one directional derivative for each (part, group) gives all outputs of all queries at once. *Reverse*: one
gradient for each output gives every direction, down to the single parameter. `plan_choice` decides, by counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor

from explaind_track.core.groups import Groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.core.tensors import Tensors, cuts, size_in_bytes
from explaind_track.engine.derivatives import vjp_rows
from explaind_track.engine.functional import Functional
from explaind_track.engine.plan_choice import Counts, Way
from explaind_track.engine.shared_passes import SharedPasses
from explaind_track.engine.targets import some_outputs, target_of


class DirectionalDerivatives(Protocol):
    """⟨∇_θ f_{θ_s(t)}(x)_j, part restricted to Θ_g⟩ of one step, for every part and group."""

    copies: int
    """How many copies of a pass's activations are alive at once."""
    held: int
    """The bytes that are held beside them."""

    def at(self, state: State, chunk: Query) -> tuple[Tensor, Tensor]:
        """At the node θ_s(t): those of each part and group, (P, G, x, O), and of the rounding, (x, O), for a chunk of
        queries (its share of the one target where the query is reduced)."""


@dataclass(frozen=True)
class Wanted:
    """The directions asked for: P parts of a step in each of G groups, and if `rounding`, what those parts leave over
    of the step, in all groups together."""

    parts: tuple[str, ...]
    groups: Groups
    rounding: bool

    @property
    def rows(self) -> int:
        """R, the directions of one group: one for each part, and one more if the rounding is wanted."""
        return len(self.parts) + self.rounding

    def fill(self, step: Change, parameter: str, rows: Sequence[Tensor], places: range) -> None:
        """Writes some of the directions of one parameter's step, of which the parts come first and then the rounding,
        into rows of its shape. places: which of all R."""
        rounding = len(self.parts) in places
        parts, found_at = (self.parts, places) if rounding else (self.parts[places.start : places.stop], None)
        for piece, found in step.pieces(parameter, parts, rounding):
            for row, place in zip(rows, found_at or range(len(found)), strict=True):
                row.view(-1)[piece] = found[place]


def derivatives_by(
    way: Way, functional: Functional, query: Query, step: Change, wanted: Wanted, counts: Counts
) -> DirectionalDerivatives:
    """The derivatives, in the forward or the reverse way."""
    return (ReverseDerivatives if way == "reverse" else ForwardDerivatives)(functional, query, step, wanted, counts)


@dataclass(frozen=True)
class _Bundle:
    """What a pass differentiates."""

    groups: dict[int, list[str]]
    """The groups, and their parameters that moved."""
    rows: range
    """Which of the R directions of each: all, unless those of a single group do not fit the memory together."""
    parts: int
    """P, behind which the rounding is."""

    @property
    def count(self) -> int:
        """The directions: one of each group for each part, and one for the rounding of all of them."""
        rounding = self.parts in self.rows
        return len(self.groups) * (len(self.rows) - rounding) + rounding


@dataclass(frozen=True)
class _Pass:
    """Directions that are differentiated together, (R, *shape) for each of the parameters they share."""

    tangents: dict[str, Tensor]
    cells: list[tuple[int, int] | None]
    """Of each row its (part, group), or None for the rounding."""


class ForwardDerivatives:
    """Passes over the queries, of neighbouring groups together. A pass differentiates with respect to its own groups'
    parameters only, so what lies before them in the model carries no derivative. The rounding is spread over the
    passes, since only its sum is asked for."""

    def __init__(self, functional: Functional, query: Query, step: Change, wanted: Wanted, counts: Counts) -> None:
        self._functional, self._query, self._step, self._wanted = functional, query, step, wanted
        self._bundles = list(self._bundled(counts.pass_rows, counts.memory // 2))
        self.copies = max(bundle.count for bundle in self._bundles)

        # values that passes share are kept in all of their activations' memory
        self._shares = counts.shares and len(self._bundles) > 1
        self.copies += 2 * self._shares

        # all passes' tangents are kept from node to node, or each is made anew
        sizes = [self._bytes(bundle) for bundle in self._bundles]
        keep = sum(sizes) <= counts.memory // 2
        self.held = sum(sizes) if keep else max(sizes)
        self._kept = [self._pass(bundle) for bundle in self._bundles] if keep else None

    def _bundled(self, pass_rows: int, memory: int) -> Iterator[_Bundle]:
        """The passes: as many groups in each as its rows and the memory allow, or some directions of one group."""
        parts, all_rows = len(self._wanted.parts), range(self._wanted.rows)
        last: _Bundle | None = None
        for group, names in enumerate(self._wanted.groups.values()):
            moving = [name for name in names if name in self._step.moved]
            if not moving:
                continue

            larger = _Bundle({**(last.groups if last else {}), group: moving}, all_rows, parts)
            if last and larger.count <= pass_rows + self._wanted.rounding and self._bytes(larger) <= memory:
                last = larger
                continue
            if last:
                yield from self._cut(last, memory)
            last = _Bundle({group: moving}, all_rows, parts)
        if last:
            yield from self._cut(last, memory)

    def _cut(self, bundle: _Bundle, memory: int) -> Iterator[_Bundle]:
        """The bundle, or as few of its directions at a time as fit."""
        at_once = max(1, memory // max(1, self._bytes(bundle) // bundle.count))
        if bundle.count <= at_once or len(bundle.groups) > 1:
            yield bundle
            return
        for rows in cuts(0, len(bundle.rows), at_once):
            yield replace(bundle, rows=bundle.rows[rows])

    def _bytes(self, bundle: _Bundle) -> int:
        members = {name: self._step.before.parameters[name] for names in bundle.groups.values() for name in names}
        return bundle.count * size_in_bytes(members)

    def _pass(self, bundle: _Bundle) -> _Pass:
        rounding = bundle.parts in bundle.rows
        parts = bundle.rows[: len(bundle.rows) - rounding]
        tangents = {}
        for position, names in enumerate(bundle.groups.values()):
            # a group's parameters move in the rows of its parts, and in the rounding's
            own = range(position * len(parts), (position + 1) * len(parts))
            moving = [*own, *range(bundle.count - rounding, bundle.count)]
            for name in names:
                value = self._step.before.parameters[name]
                tangents[name] = value.new_zeros(bundle.count, *value.shape)
                self._wanted.fill(self._step, name, [tangents[name][row] for row in moving], bundle.rows)
        cells: list[tuple[int, int] | None] = [(part, group) for group in bundle.groups for part in parts]
        return _Pass(tangents, cells + [None] * rounding)

    def _passes(self) -> Iterator[_Pass]:
        yield from self._kept if self._kept is not None else map(self._pass, self._bundles)

    def at(self, state: State, chunk: Query) -> tuple[Tensor, Tensor]:
        function = self._functional.at(state, target_of(self._query, chunk))
        shared = SharedPasses() if self._shares else None
        influence: Tensor | None = None
        rounding = torch.zeros(())
        for directions in self._passes():
            primals = {name: state.parameters[name] for name in directions.tangents}
            # v → J v, (R, x, O)
            rows = self._functional.jvp(function, primals, directions.tangents, shared=shared)
            if influence is None:
                influence = rows.new_zeros(len(self._wanted.parts), len(self._wanted.groups), *rows.shape[1:])
                rounding = torch.zeros_like(rows[0])
            for cell, row in zip(directions.cells, rows, strict=True):
                if cell is None:
                    rounding += row
                else:
                    influence[cell] = row
        assert influence is not None  # a step that moves nothing is not differentiated
        return influence, rounding


class ReverseDerivatives:
    """A gradient for each output, of all queries together where they are reduced to one target, else of each."""

    def __init__(self, functional: Functional, query: Query, step: Change, wanted: Wanted, counts: Counts) -> None:
        self._functional, self._query, self._wanted = functional, query, wanted
        self._directions = {}
        for name in step.moved:
            value = step.before.parameters[name]
            self._directions[name] = value.new_empty(wanted.rows, *value.shape)
            wanted.fill(step, name, list(self._directions[name]), range(wanted.rows))

        # held: the directions, θ_s(t) and its gradients; and those of as many outputs and queries as go together
        size = size_in_bytes(step.before.parameters)
        fitting = max(1, counts.memory // 2 // (2 * size))
        self._outputs_at_once = min(counts.outputs, fitting)
        self._queries_at_once = min(query.size, max(1, fitting // self._outputs_at_once))
        together = self._outputs_at_once * (1 if query.reduction else self._queries_at_once)
        self.copies, self._outputs = 1, counts.outputs
        self.held = (wanted.rows + 1 + 2 * together) * size

    def at(self, state: State, chunk: Query) -> tuple[Tensor, Tensor]:
        primals = {name: state.parameters[name] for name in self._directions}
        products = []
        for some in cuts(0, self._outputs, self._outputs_at_once):
            if self._query.reduction is not None:
                function = self._functional.at(state, target_of(self._query, chunk))
                products.append(self._products(vjp_rows(function, primals, some)))
                continue
            device = next(iter(primals.values())).device
            pieces = (chunk.rows(rows.start, rows.stop, device) for rows in cuts(0, chunk.size, self._queries_at_once))
            products.append(torch.cat([self._of_each(piece, some, state, primals) for piece in pieces], dim=2))

        parts, found = len(self._wanted.parts), torch.cat(products, dim=3)
        return found[:parts], found[parts:].sum((0, 1))

    def _of_each(self, piece: Query, some: slice, state: State, primals: Tensors) -> Tensor:
        """The products (R, G, x, O') with the gradients of some outputs of each of the queries."""
        if some != slice(0, self._outputs):
            piece = some_outputs(piece, some.start, some.stop)
        return self._products(self._functional.query_gradients(piece, state, primals))

    def _products(self, gradients: Tensors) -> Tensor:
        """The gradients' inner products with each part, and last the rounding if wanted, by group: (R, G, x, O)."""
        example = next(iter(gradients.values()))
        products = example.new_zeros(self._wanted.rows, len(self._wanted.groups), *example.shape[:2])
        for group, names in enumerate(self._wanted.groups.values()):
            for name in names:
                if name in self._directions:
                    # Σ_{θ of this parameter} φ(x)_{j,θ} part_θ
                    direction = rearrange(self._directions[name], "r ... -> r (...)")
                    gradient = gradients[name].reshape(*example.shape[:2], -1)
                    products[:, group] += einsum(gradient, direction, "x o d, r d -> r x o")
        return products
