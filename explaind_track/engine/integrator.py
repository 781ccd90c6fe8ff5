"""Integrates a step's influences on one query: picks the nodes and the mode of differentiation, and keeps memory within
its setting."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from explaind_track.core.groups import Groups
from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.step import PARTS, SHARES, Change, State, Step
from explaind_track.core.tensors import explained_bytes, explained_type, size_in_bytes
from explaind_track.engine.carried_gradient import CarriedGradient
from explaind_track.engine.directions import DirectionalDerivatives, Wanted, derivatives_by
from explaind_track.engine.functional import Functional, evaluation, writable
from explaind_track.engine.live_gradients import Take, gradient_at
from explaind_track.engine.memory import MEMORY, QueryChunks
from explaind_track.engine.path_integral import Nodes, Quadrature, Terms
from explaind_track.engine.plan_choice import Counts, Way, choose
from explaind_track.engine.step_predictions import StepPredictions, buffers_moved
from explaind_track.engine.streaming import StreamingDerivatives, streamed
from explaind_track.engine.targets import in_float64, output_count, target_of

Chunk = tuple[int, Query]
"""Some of the query's inputs: the row of the first, and the query of them alone."""

OWN_PARTS = ("kernel", "regularization")
"""The parts of a step that has no other: what the counts are taken of before one is seen."""

CARRIED = "streaming reverse mode: one pass at each step's end, whose gradient serves the next step too"


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
        microbatch: int | None = None,
        keep_on_host: bool = False,
    ) -> None:
        """parts: the step's parts (or shares of them) that get a row of their own for each group; whatever is not
        among them is left to the remainder. None: all of the step, the rounding summed over the groups.
        memory: bytes that one pass may take, by which queries and directions are cut into chunks (a guide, not a hard
        bound). microbatch: how many of the query's inputs go together; None: as many as the memory allows.
        keep_on_host: whether a gradient that is carried from step to step lies in the host's memory meanwhile."""
        self.functional = Functional(model)
        self.query, self.groups, self.memory = query, groups, memory
        self.quadrature = quadrature or Quadrature()
        self.wanted_parts = parts
        self._terms_chunk = microbatch
        self.predictions = StepPredictions(self.functional)
        self._carried = CarriedGradient(self._gradient_at, groups, keep_on_host)

    @cached_property
    def _outputs(self) -> int:
        """O, the targets of each query."""
        return output_count(self.functional.model, self.query)

    def counts(self, parts: int) -> Counts:
        """What a step with so many parts costs follows from these."""
        return Counts(
            queries=self.query.size,
            outputs=self._outputs,
            reduced=self.query.reduction is not None,
            parts=parts,
            groups=len(self.groups),
            parameters=self._parameters,
            activations=self._of_one[0],
            operations=self._of_one[1],
            memory=self.memory,
        )

    @cached_property
    def _parameters(self) -> int:
        """Bytes of the parameters."""
        return explained_bytes(parameters_of(self.functional.model))

    @cached_property
    def _of_one(self) -> tuple[int, int]:
        """The bytes that a pass writes for one input, and the operations it calls."""
        model = self.functional.model
        state = State({name: value.detach() for name, value in parameters_of(model).items()}, buffers_of(model))
        with evaluation(model):
            return QueryChunks(self.functional, self.query, self.memory).of_one(writable(state.upcast()))

    @cached_property
    def way(self) -> Way:
        """How steps are differentiated that have the parts they are expected to have."""
        return choose(self.counts(len(self.wanted_parts or OWN_PARTS)))

    @property
    def streams(self) -> bool:
        """Whether the streaming plan takes the steps."""
        return self.way == "streaming"

    @property
    def can_carry(self) -> bool:
        """Whether by the trapezoid, the gradient at a step's end would be carried to the step that follows."""
        return self.streams and self._outputs == 1

    @cached_property
    def carries(self) -> bool:
        """Whether it is."""
        return self.quadrature.is_trapezoid and self.can_carry

    @property
    def mode(self) -> str:
        """How steps are differentiated, in words."""
        if self.carries:
            return CARRIED
        if self.streams:
            return "streaming reverse mode: gradients are multiplied and dropped parameter by parameter"
        return f"{self.way} mode"

    @cached_property
    def _asked(self) -> Query:
        """The query as it is differentiated: its target in float64 where steps are streamed and it can be."""
        if not self.streams:
            return self.query
        precise = in_float64(self.query)
        first = precise.rows(0, 1, next(self.functional.model.parameters()).device)
        try:
            with evaluation(self.functional.model, fused=True):
                self.functional.value(State(parameters_of(self.functional.model), {}).upcast(), first)
        except RuntimeError:  # a target that multiplies the output with matrices of its own
            return self.query
        return precise

    @cached_property
    def _chunks(self) -> QueryChunks:
        return QueryChunks(self.functional, self._asked, self.memory)

    def _evaluation(self) -> AbstractContextManager[None]:
        """The model as it is differentiated."""
        return evaluation(self.functional.model, fused=self.streams)

    def parts(self, step: Step) -> tuple[str, ...]:
        """The names along the part axis, of the step and of what led to it from outside. Raises ValueError for parts
        that the step does not have."""
        unknown = set(self.wanted_parts or ()) - {*step.parts, *PARTS}
        if unknown and not step.closing:
            raise ValueError(f"step {step.number} has the parts {tuple(step.parts)}, not {sorted(unknown)}")

        own, more = self._parts_of(step), () if step.outside is None else self._parts_of(step.outside)
        return tuple(name for name in self.wanted_parts or (*own, *more) if name in (*own, *more))

    def _parts_of(self, change: Change) -> tuple[str, ...]:
        if self.wanted_parts is None:
            return tuple(name for name in change.parts if name != "rounding" and name not in SHARES)
        return tuple(name for name in self.wanted_parts if name in change.parts)

    def nodes(self, step: Change) -> int:
        """How many nodes the step needs, found with one direction, that of the whole step."""
        rule = self.quadrature
        nodes = rule.nodes
        while step.moved and nodes < rule.max_nodes:
            remainder, change, floor = self._total_residual(step, nodes)
            if remainder <= max(rule.tolerance * change, floor):
                break
            nodes = min(2 * nodes, rule.max_nodes)
        return nodes

    def path(self, step: Change) -> Nodes:
        """The times and weights of these nodes."""
        return self.quadrature.at(self.nodes(step))

    def _total_residual(self, step: Change, nodes: int) -> tuple[float, float, float]:
        """‖remainder‖₂, ‖change‖₂, and the rounding floor of the first, from the direction of the whole step."""
        slope = self._slope(step)
        squares = torch.zeros(3, dtype=torch.float64)
        with self._evaluation():
            size = self._chunks.size(step.before, copies=1, held=2 * size_in_bytes(step.before.parameters))
            for together in self._together(step, size):
                terms = self._start(step, together, (), close=False)

                # [f(θ_{s+1}) − f(θ_s)] + Σ_t w_t ⟨∇f_{θ_s(t)}, θ_s − θ_{s+1}⟩
                remainder = terms.change
                for time, weight in self.quadrature.at(nodes):
                    state = step.point(time)
                    for _, chunk in together:
                        remainder = remainder + slope(state, chunk) * weight
                    del state  # before the next one is made

                for place, value in enumerate((remainder, terms.change, terms.after)):
                    squares[place] += value.square().sum().cpu()
        remainder_norm, change, prediction = squares.sqrt().tolist()
        return remainder_norm, change, 4 * terms.eps * prediction

    def _slope(self, step: Change) -> Callable[[State, Query], Tensor]:
        """From a node and a chunk of the queries to ⟨∇f_{θ_s(t)}, θ_s − θ_{s+1}⟩, (x, O)."""
        if self.streams:
            derivatives = StreamingDerivatives(self.functional, self._asked, step, Wanted((), self.groups, True))
            return lambda state, chunk: derivatives.at(state, chunk)[1]

        direction = {name: (step.before.parameters[name] - step.after.parameters[name])[None] for name in step.moved}

        def slope(state: State, chunk: Query) -> Tensor:
            primals = {name: state.parameters[name] for name in step.moved}
            function = self.functional.at(state, target_of(self._asked, chunk))
            return self.functional.jvp(function, primals, direction)[0]

        return slope

    def terms(self, step: Change, nodes: int, close: bool = False) -> Iterator[tuple[int, Terms]]:
        """The influences of a step, or of a change from outside, chunk by chunk of the queries (always the same
        chunks): the chunk's first row, and its terms, which add up exactly if `close`. One chunk where the query is
        reduced to one target."""
        parts = self._parts_of(step)
        if self.carries and step.moved and not close:
            yield 0, self._carried_terms(step, parts)
            return

        with self._evaluation():
            derivatives = self._derivatives(step, parts)
            for together in self._together(step, self._chunk_size(step, derivatives)):
                terms = self._start(step, together, parts, close)
                if derivatives is not None:
                    self._integrate(step, derivatives, together, nodes, terms)
                terms.finish()
                yield together[0][0], terms

    def _carried_terms(self, step: Change, parts: Sequence[str]) -> Terms:
        """The influences of a step by the trapezoid, from its end and the gradient that is kept of its beginning."""
        rest, moves = self._wants_rounding(step), buffers_moved(step)
        with self._evaluation():
            (together,) = self._together(step, self._chunk_size(step, None))
            chunks = [chunk for _, chunk in together]
            sums, before, moved = self._carried.along(step, chunks, parts, rest, moves)
            after = moved
            if moves:
                first, *more = (self.functional.value(step.after, target_of(self._asked, chunk)) for chunk in chunks)
                after = sum(more, first)

        terms = Terms.start(before, moved, after, parts, len(self.groups), False, self._eps(step, before))
        terms.influence = sums[: len(parts), :, None, None].to(before)
        terms.rounding = sums[len(parts) :].sum().reshape(1, 1).to(before)
        terms.finish()
        return terms

    def _gradient_at(self, state: State, names: Collection[str], chunks: Sequence[Query], take: Take) -> Tensor:
        return gradient_at(self.functional, self._asked, state, names, chunks, take)

    def feature(self, step: Change, nodes: int) -> dict[str, Tensor]:
        """φ_s^test = ∫₀¹ ∇_θ f_{θ_s(t)} dt of a query's one target, by parameter: one copy of them, and no other."""
        total = {name: torch.zeros_like(step.before.parameters[name]) for name in step.moved}
        with self._evaluation():
            (together,) = self._together(step, self._chunk_size(step, None))
            for time, weight in self.quadrature.at(nodes):
                state = step.point(time)
                leaves = {name: state.parameters[name].detach().requires_grad_() for name in step.moved}

                def take(name: str, gradient: Tensor, weight: float = weight) -> None:
                    total[name].add_(gradient, alpha=weight)

                with streamed(leaves, take):
                    for _, chunk in together:
                        function = self.functional.at(state, target_of(self._asked, chunk))
                        function.held(leaves, lambda target: target.sum().backward())
        return total

    def fix_chunks(self, step: Step) -> None:
        """Cuts the query by what the step takes, before what led to it from outside is cut as well."""
        if self._terms_chunk is None:
            with self._evaluation():
                self._chunk_size(step, self._derivatives(step, self._parts_of(step)))

    def _chunk_size(self, step: Change, derivatives: DirectionalDerivatives | None) -> int:
        """Found once: all steps are cut alike."""
        if self._terms_chunk is None and self.carries:
            self._terms_chunk = self._chunks.size_of_pass(step.before)
        elif self._terms_chunk is None:
            copies, held = (derivatives.copies, derivatives.held) if derivatives else (1, 0)
            self._terms_chunk = self._chunks.size(step.before, copies, held, self._bytes_each)
        return self._terms_chunk

    @property
    def _bytes_each(self) -> int:
        """Of an input's results: three predictions and the terms, which a node's are added to; of a reduced query, all
        inputs have the same."""
        if self.query.reduction is not None:
            return 0
        cells = len(self.wanted_parts or OWN_PARTS) * len(self.groups)
        widest = max(explained_type(p.dtype).itemsize for p in parameters_of(self.functional.model).values())
        return (3 * cells + 6) * self._outputs * widest

    def _derivatives(self, step: Change, parts: Sequence[str]) -> DirectionalDerivatives | None:
        """Differentiates the step's targets; None where it moved no parameter, or nobody wants a part of it."""
        rounding = self._wants_rounding(step)
        if not step.moved or not (parts or rounding):
            return None
        wanted = Wanted(tuple(parts), self.groups, rounding)
        counts = self.counts(len(parts))
        way = self.way if self.streams else choose(counts)
        if way == "streaming":
            return StreamingDerivatives(self.functional, self._asked, step, wanted)
        return derivatives_by(way, self.functional, self.query, step, wanted, counts)

    def _wants_rounding(self, step: Change) -> bool:
        return self.wanted_parts is None and "rounding" in step.parts

    def _integrate(
        self, step: Change, derivatives: DirectionalDerivatives, together: Sequence[Chunk], nodes: int, terms: Terms
    ) -> None:
        for time, weight in self.quadrature.at(nodes):
            state = step.point(time)
            influence, rounding = derivatives.at(state, together[0][1])
            for _, chunk in together[1:]:
                more_influence, more_rounding = derivatives.at(state, chunk)
                influence, rounding = influence + more_influence, rounding + more_rounding
            terms.add(influence, rounding, weight)
            del state  # before the next one is made

    def _together(self, step: Change, size: int) -> list[list[Chunk]]:
        """The query's chunks; all of them together where they are shares of the same targets, else each by itself."""
        chunks = list(self._chunks.cut(size, next(iter(step.before.parameters.values())).device))
        return [chunks] if self.query.reduction else [[chunk] for chunk in chunks]

    def _start(self, step: Change, together: Sequence[Chunk], parts: Sequence[str], close: bool) -> Terms:
        """Terms without influences, for these chunks."""
        predictions = [self.predictions.of(step, start, self._asked, chunk, self.streams) for start, chunk in together]
        before, moved, after = (sum(more, first) for first, *more in zip(*predictions, strict=True))

        return Terms.start(before, moved, after, parts, len(self.groups), close, self._eps(step, before))

    def _eps(self, step: Change, prediction: Tensor) -> float:
        """The relative rounding of a prediction."""
        if self.streams:  # a target in float64 knows the model's output to the parameters' precision only
            return max(torch.finfo(value.dtype).eps for value in step.before.parameters.values())
        return torch.finfo(prediction.dtype).eps
