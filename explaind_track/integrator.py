"""Integrates a step's influences on one query: picks the nodes and the plan, and keeps memory within its setting."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from explaind_track.autodiff import Functional, activation_bytes, evaluation, vjp_rows
from explaind_track.groups import Groups
from explaind_track.path import Quadrature, Terms, gauss_legendre, interpolate
from explaind_track.plans import choose_plan, size_in_bytes, target_of
from explaind_track.queries import Query
from explaind_track.step import PARTS, SHARES, State, Step, Tensors

MEMORY = 2**28
"""Bytes that one pass over queries × directions may take, unless the caller says otherwise."""


class Integrator:
    """For one query and one set of groups; steps go through it one by one."""

    def __init__(
        self,
        model: nn.Module,
        query: Query,
        groups: Groups,
        parts: Sequence[str] | None = None,
        quadrature: Quadrature | None = None,
        memory: int = MEMORY,
    ) -> None:
        """parts: the step's parts (or shares of them) that get a row of their own for each group; None: every part
        but the rounding, which is always summed over the groups. memory: bytes that one pass may take, by which
        queries and directions are cut into chunks (a guide, not a hard bound)."""
        unknown = set(parts or ()) - set(PARTS) - set(SHARES)
        if unknown:
            raise ValueError(f"a step has the parts {PARTS} and the shares {tuple(SHARES)}, not {sorted(unknown)}")
        self.functional = Functional(model)
        self.query, self.groups, self.memory = query, groups, memory
        self.quadrature = quadrature or Quadrature()
        self._parts = parts
        self._activation_bytes: int | None = None
        self._outputs: int | None = None

    def for_query(self, query: Query) -> "Integrator":
        """The same integrator for another query."""
        return Integrator(self.functional.model, query, self.groups, self._parts, self.quadrature, self.memory)

    def parts(self, step: Step) -> tuple[str, ...]:
        """The names along the part axis."""
        own = (name for name in step.parts if name != "rounding" and name not in SHARES)
        return tuple(own if self._parts is None else (name for name in self._parts if name in step.parts))

    def _owned(self, step: Step) -> Tensor:
        """(P,): 1 for parts, 0 for shares of them, so that no sum counts twice."""
        like = next(iter(step.before.parameters.values()))
        return like.new_tensor([name not in SHARES for name in self.parts(step)])

    def nodes(self, step: Step) -> int:
        """How many nodes the step needs, found with one direction, that of the whole step."""
        rule = self.quadrature
        nodes = rule.nodes
        while nodes < rule.max_nodes:
            remainder, change, floor = self._total_residual(step, nodes)
            if remainder <= max(rule.tolerance * change, floor):
                break
            nodes = min(2 * nodes, rule.max_nodes)
        return nodes

    def terms(self, step: Step, nodes: int, close: bool = False) -> Iterator[tuple[int, Terms]]:
        """The step's influences, chunk by chunk of the queries: the chunk's first row, and its terms, which add up
        exactly if `close`."""
        parts = self.parts(step)
        with evaluation(self.functional.model):
            outputs = self._output_count(step)
            plan = choose_plan(self.functional, self.query, step, parts, self.groups, outputs, self.memory)

            def integrate(chunk: Query) -> Terms:
                terms = self._start(step, chunk, len(parts), len(self.groups))
                for time, weight in gauss_legendre(nodes):
                    plan.add(terms, chunk, interpolate(step, time), weight)
                return terms

            owned = self._owned(step)
            for start, terms in self._over_chunks(step, integrate, plan.rows, plan.held):
                terms.finish(owned, close)
                yield start, terms

    def gradient(self, step: Step, nodes: int) -> dict[str, Tensor]:
        """φ_s^test = ∫₀¹ ∇_θ f_{θ_s(t)} dt of a query with one target, by parameter (those that the step moved)."""
        total: dict[str, Tensor] = {}
        with evaluation(self.functional.model):
            for _, chunk in self._chunks(step, 1, 2 * size_in_bytes(step.before.parameters)):
                for time, weight in gauss_legendre(nodes):
                    state = interpolate(step, time)
                    primals = {name: state.parameters[name] for name in step.updates}
                    rows = vjp_rows(self.functional.at(state, target_of(self.query, chunk)), primals)
                    for name, row in rows.items():
                        value = row.sum((0, 1)) * weight
                        total[name] = total[name] + value if name in total else value
        return total

    def _total_residual(self, step: Step, nodes: int) -> tuple[float, float, float]:
        """‖remainder‖₂, ‖change‖₂, and the rounding floor of the first, from the direction of the whole step."""
        direction = {name: (step.before.parameters[name] - step.after.parameters[name])[None] for name in step.updates}

        def total(chunk: Query) -> Terms:
            terms = self._start(step, chunk, 0, 0)
            for time, weight in gauss_legendre(nodes):
                state = interpolate(step, time)
                function = self.functional.at(state, target_of(self.query, chunk))
                primals = {name: state.parameters[name] for name in step.updates}
                terms.rounding.add_(self.functional.jvp(function, primals, direction)[0], alpha=weight)
            return terms

        squares = torch.zeros(3, dtype=torch.float64)
        epsilon = 0.0
        with evaluation(self.functional.model):
            for _, terms in self._over_chunks(step, total, 1, 2 * size_in_bytes(step.before.parameters)):
                epsilon = torch.finfo(terms.change.dtype).eps
                for place, value in enumerate((terms.change + terms.rounding, terms.change, terms.after)):
                    squares[place] += value.square().sum().cpu()
        remainder, change, prediction = squares.sqrt().tolist()
        return remainder, change, 4 * epsilon * prediction

    def _start(self, step: Step, chunk: Query, parts: int, groups: int) -> Terms:
        target = target_of(self.query, chunk)
        before = self.functional.value(step.before, target)
        moved = self.functional.value(State(step.after.parameters, step.before.buffers), target)
        after = self.functional.value(step.after, target) if buffers_moved(step) else moved
        return Terms.start(before, moved, after, parts, groups)

    def _chunks(self, step: Step, rows: int, held: int) -> Iterator[tuple[int, Query]]:
        """The query in even chunks, such that `rows` copies of its activations and `held` bytes fit the memory."""
        device = next(iter(step.before.parameters.values())).device
        if self._activation_bytes is None:
            one = self.query.rows(0, 1, device)
            self._activation_bytes = max(1, activation_bytes(self.functional, step.before, one))
        room = max(self.memory - held, self.memory // 2)
        count = -(-self.query.size // max(1, room // (self._activation_bytes * (rows + 1))))
        size = -(-self.query.size // count)
        for start in range(0, self.query.size, size):
            yield start, self.query.rows(start, start + size, device)

    def _over_chunks(
        self, step: Step, compute: Callable[[Query], Terms], rows: int, held: int
    ) -> Iterator[tuple[int, Terms]]:
        """`compute` on every chunk; their sum where the query is reduced to one target."""
        total: Terms | None = None
        for start, chunk in self._chunks(step, rows, held):
            terms = compute(chunk)
            if self.query.reduction is None:
                yield start, terms
            elif total is None:
                total = terms
            else:
                total += terms
        if total is not None:
            yield 0, total

    def _output_count(self, step: Step) -> int:
        """O, the outputs of each query."""
        if self._outputs is None:
            one = self.query.rows(0, 1, next(iter(step.before.parameters.values())).device)
            self._outputs = self.functional.value(step.before, one).shape[1]
        return self._outputs


def buffers_moved(step: Step) -> bool:
    """Whether the step changed any of the model's buffers (the running statistics of batch norm, say)."""
    before: Tensors = step.before.buffers
    after: Tensors = step.after.buffers
    return any(before[name] is not after[name] and not torch.equal(before[name], after[name]) for name in before)
