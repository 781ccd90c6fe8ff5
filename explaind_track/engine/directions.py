"""Two ways to differentiate a step's targets in the directions of its parts and groups; `streaming` has the third.

*Forward*: one directional derivative for each (part, group) gives all outputs of all queries at once. *Reverse*: one
gradient for each output gives every direction, down to the single parameter. The counts decide, like an einsum path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor

from explaind_track.core.groups import Groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.core.tensors import Tensors, size_in_bytes
from explaind_track.engine.derivatives import vjp_rows
from explaind_track.engine.functional import Functional
from explaind_track.engine.targets import target_of

REVERSE_COST = 5
"""What one output's gradients cost, in units of one forward-mode direction; measured: 3 reduced, 5 query by query."""

PASS_ROWS = 5
"""Directions in one forward pass. Measured on the modulo-113 Transformer (6 groups × 2 parts, a whole live step): one
group at a time, 38 ms, since passes repeat each other's work; two, 27 ms; all at once, 28 ms: they carry zeros."""


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

    def fill(self, step: Change, parameter: str, rows: Sequence[Tensor]) -> None:
        """Writes the parts of one parameter's step, and last the rounding if it is wanted, into R rows of its shape."""
        for place, found in step.pieces(parameter, self.parts, self.rounding):
            for row, values in zip(rows, found, strict=True):
                row.view(-1)[place] = values


def choose_derivatives(
    functional: Functional, query: Query, step: Change, wanted: Wanted, outputs: int, memory: int
) -> DirectionalDerivatives:
    """The way that costs less. outputs: O, for each query."""
    reverse = prefers_reverse(outputs, len(wanted.parts), len(wanted.groups))
    mode = ReverseDerivatives if reverse else ForwardDerivatives
    return mode(functional, query, step, wanted, memory)


def prefers_reverse(outputs: int, parts: int, groups: int) -> bool:
    """Whether gradients of O outputs cost less than derivatives in the directions of all parts and groups."""
    return outputs * REVERSE_COST <= parts * groups + 1


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

    def __init__(self, functional: Functional, query: Query, step: Change, wanted: Wanted, memory: int) -> None:
        self._functional, self._query, self._step, self._wanted = functional, query, step, wanted
        self._bundles = self._bundle(memory // 2)
        self.copies = max(map(self._rows, self._bundles))

        # all passes' tangents are kept from node to node, or each is made anew
        sizes = [self._bytes(bundle) for bundle in self._bundles]
        keep = sum(sizes) <= memory // 2
        self.held = sum(sizes) if keep else max(sizes)
        self._kept = [self._pass(bundle) for bundle in self._bundles] if keep else None

    def _bundle(self, memory: int) -> list[dict[int, list[str]]]:
        """The groups of each pass, and their parameters that moved; as many as PASS_ROWS and the memory allow."""
        bundles: list[dict[int, list[str]]] = []
        for group, names in enumerate(self._wanted.groups.values()):
            moving = [name for name in names if name in self._step.moved]
            if not moving:
                continue
            larger = {**(bundles[-1] if bundles else {}), group: moving}
            if bundles and self._rows(larger) <= PASS_ROWS and self._bytes(larger) <= memory:
                bundles[-1] = larger
            else:
                bundles.append({group: moving})
        return bundles

    def _rows(self, bundle: dict[int, list[str]]) -> int:
        return len(bundle) * len(self._wanted.parts) + self._wanted.rounding

    def _bytes(self, bundle: dict[int, list[str]]) -> int:
        members = {name: self._step.before.parameters[name] for names in bundle.values() for name in names}
        return self._rows(bundle) * size_in_bytes(members)

    def _pass(self, bundle: dict[int, list[str]]) -> _Pass:
        parts, rows = len(self._wanted.parts), self._rows(bundle)
        tangents = {}
        for position, names in enumerate(bundle.values()):
            # a group's parameters move in the rows of its parts, and in the rounding's
            moving = [*range(position * parts, (position + 1) * parts), *range(len(bundle) * parts, rows)]
            for name in names:
                value = self._step.before.parameters[name]
                tangents[name] = value.new_zeros(rows, *value.shape)
                self._wanted.fill(self._step, name, [tangents[name][row] for row in moving])
        cells: list[tuple[int, int] | None] = [(part, group) for group in bundle for part in range(parts)]
        return _Pass(tangents, cells + [None] * self._wanted.rounding)

    def _passes(self) -> Iterator[_Pass]:
        yield from self._kept if self._kept is not None else map(self._pass, self._bundles)

    def at(self, state: State, chunk: Query) -> tuple[Tensor, Tensor]:
        function = self._functional.at(state, target_of(self._query, chunk))
        influence: Tensor | None = None
        rounding = torch.zeros(())
        for directions in self._passes():
            primals = {name: state.parameters[name] for name in directions.tangents}
            rows = self._functional.jvp(function, primals, directions.tangents)  # v → J v, (R, x, O)
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

    def __init__(self, functional: Functional, query: Query, step: Change, wanted: Wanted, memory: int) -> None:
        self._functional, self._query, self._wanted = functional, query, wanted
        self._directions = {}
        for name in step.moved:
            value = step.before.parameters[name]
            self._directions[name] = value.new_empty(wanted.rows, *value.shape)
            wanted.fill(step, name, list(self._directions[name]))

        # held: the directions, θ_s(t) and its gradients; and those of as many queries as go together
        size = size_in_bytes(step.before.parameters)
        self._at_once = max(1, memory // 2 // size)
        self.copies = 1
        self.held = (len(wanted.parts) + 3) * size + (0 if query.reduction else min(query.size, self._at_once) * size)

    def at(self, state: State, chunk: Query) -> tuple[Tensor, Tensor]:
        primals = {name: state.parameters[name] for name in self._directions}
        if self._query.reduction is not None:
            function = self._functional.at(state, target_of(self._query, chunk))
            products = self._products(vjp_rows(function, primals))
        else:
            device = next(iter(primals.values())).device
            pieces = (chunk.rows(start, start + self._at_once, device) for start in range(0, chunk.size, self._at_once))
            gradients = (self._functional.query_gradients(piece, state, primals) for piece in pieces)
            products = torch.cat([self._products(rows) for rows in gradients], dim=2)
        parts = len(self._wanted.parts)
        return products[:parts], products[parts:].sum((0, 1))

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
