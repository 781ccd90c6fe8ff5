"""Live influences where the parameters are in pieces: every process multiplies its own, and the sums are added up.

Ψ_s(part, Θ_g) ≈ ½ ⟨∇f(θ_s) + ∇f(θ_{s+1}), part restricted to Θ_g⟩: the trapezoid, for nothing can be put into the place
of parameters that nobody has whole. The model itself runs forward and backward, at θ_{s+1}, each process with its share
of the query's rows, and each gets its piece of the gradient, which serves this step and the next.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from explaind_track.core import distributed
from explaind_track.core.groups import Groups
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.shards import Shards, local, local_like, reshard, whole
from explaind_track.core.step import State, Step
from explaind_track.core.tensors import explained_type, upcast
from explaind_track.engine.carried_gradient import CarriedGradient
from explaind_track.engine.functional import evaluation
from explaind_track.engine.integrator import CARRIED
from explaind_track.engine.live_gradients import Take, gradient_in_place
from explaind_track.engine.memory import CPU_PASS
from explaind_track.engine.path_integral import Quadrature, Terms
from explaind_track.engine.targets import in_float64, refuse_nan
from explaind_track.explanation.explainer import Explainer, query_metrics
from explaind_track.explanation.step_rows import Row


class PiecesExplainer(Explainer):
    """Explains live steps on one scalar query. Every process calls everything, in the same order."""

    def __init__(
        self,
        model: nn.Module,
        query: Query,
        groups: Groups,
        keeps: Sequence[Sequence[str]],
        parts: Sequence[str],
        shards: Shards,
        memory: int,
        on_host: bool,
    ) -> None:
        """on_host: see `CarriedGradient`. Raises ValueError for a query that is no differentiable scalar."""
        self._model, self._shards, self._device = model, shards, shards.device
        self._places = {name: [one for one in own if one in shards.counted] for name, own in groups.items()}
        self._places["elsewhere"] = [one for own in groups.values() for one in own if one not in shards.counted]
        self._memory, self._on_host = memory, on_host
        self._start: State | None = None
        """Of the step at hand."""
        self._rows = 1
        super().__init__(model, query, groups, keeps, parts, Quadrature.trapezoid(), memory=memory, rows_in_file=True)

    def fitted(self, model: nn.Module, query: Query) -> Query:
        """The query, once a few of its rows have been through the model. Also finds how many go together."""
        refuse_nan(query)
        before = random_state(self._device)
        with replayed_random_state(before), evaluation(model, fused=True):
            self._asked = in_float64(query)
            try:
                needed = [self._needed(1)]
            except RuntimeError:  # a target that multiplies the output with matrices of its own
                self._asked = query
                needed = [self._needed(1)]
            if query.size > 1:
                needed.append(self._needed(2))
            if any(not torch.equal(now, before[name]) for name, now in random_state(self._device).items()):
                raise ValueError(
                    "the model draws random numbers in eval mode, so that its prediction is no function of its "
                    "parameters; draw them in training mode only (`if self.training:`)"
                )
        each = max(1, needed[-1] - needed[0])
        room = min(self._memory, CPU_PASS) if self._device.type == "cpu" else self._memory
        self._rows = min(distributed.gather(max(1, room // (2 * each))))
        return query

    def _needed(self, rows: int) -> int:
        """The bytes that a pass over the query's first rows keeps for its way back. Raises ValueError for a query that
        is no scalar, or has no gradient."""
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        found: set[str] = set()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            chunk = self._asked.rows(0, rows, self._device)
            value = self._pass([chunk], lambda name, gradient, is_last: found.add(name))
        if value.numel() != 1:
            raise ValueError(
                f"the query has {value.numel()} outputs, and parameters are in pieces: a scalar query is needed, as "
                "each would take a backward pass of its own. Let its function return one number for each input"
            )
        if not found:
            raise ValueError(
                "no parameter in pieces got a gradient of the query: its target has to depend differentiably on the "
                "model's parameters, and model.set_requires_gradient_sync(False) must not be in force between steps"
            )
        return sum(kept.values())

    @property
    def _learning(self) -> dict[str, Tensor]:
        """The parameters that learn, as the optimizer has them."""
        reshard(self._model)
        return {name: p for name, p in parameters_of(self._model).items() if p.requires_grad}

    def _pass(self, chunks: Sequence[Query], take: Take) -> Tensor:
        """The target's value over these rows, (1, O), times the divisor of gradients; see `gradient_in_place`."""
        try:
            return upcast(whole(gradient_in_place(self._model, self._asked, self._learning, chunks, take)))
        finally:
            reshard(self._model)

    def add(self, step: Step) -> list[Row]:
        """Takes one step in; see `Explainer.add`. The model is where it has led to."""
        step.require_valid()
        parts = self.integrator.parts(step)
        self.nodes, self.metrics = 2, {}
        for accumulator in self.accumulators:
            accumulator.begin(step.number, self.nodes, parts)

        terms = self._terms(step, parts)
        self.metrics = query_metrics(self.integrator.query, 0, terms)
        for accumulator in self.accumulators:
            accumulator.add(0, terms)
        rows = [accumulator.end() for accumulator in self.accumulators]
        self.residual = next((float(row["residual"]) for row in rows if row), float("nan"))
        return rows

    @property
    def mode(self) -> str:
        """Without a pass of the model, which one process alone cannot take."""
        return f"{CARRIED}; of parameters in pieces"

    def forget(self) -> None:
        """Forgets all steps."""
        self._carried = CarriedGradient(self._gradient_at, self._places, self._on_host)
        super().forget()

    def _terms(self, step: Step, parts: Sequence[str]) -> Terms:
        self._start = step.before
        products, before, after = self._carried.along(step, self._chunks(), parts, rest=False, buffers_move=False)

        # one sum over the processes, of what is counted here
        counted = products[:, : len(self._groups)]
        together = torch.cat([counted.flatten(), before.flatten(), after.flatten()])
        distributed.add_up(together)

        cells, ends = together[:-2], together[-2:, None, None]
        terms = Terms.start(ends[0], ends[1], ends[1], parts, len(self._groups), close=False, eps=self._eps)
        terms.add(cells.reshape(len(parts), -1, 1, 1), torch.zeros_like(ends[0]), 1.0)
        terms.finish()
        return terms

    def _gradient_at(self, state: State, names: Collection[str], chunks: Sequence[Query], take: Take) -> Tensor:
        """This process's pieces of the gradient, at the beginning of the step or where the model stands, behind it.
        Returns this process's share of the target's value, (1, 1) in float64."""
        learning = self._learning

        def of_pieces(name: str, gradient: Tensor, is_last: bool) -> None:
            take(name, upcast(local_like(gradient, learning[name])).contiguous(), is_last)

        with self._back_at(state) if state is self._start else nullcontext(), evaluation(self._model, fused=True):
            value = self._pass(chunks, of_pieces)
        share = value.double().cpu() / self._shards.divisor
        return share if self._shards.counts_rows else torch.zeros_like(share)

    @contextmanager
    def _back_at(self, state: State) -> Iterator[None]:
        """Within, the parameters are those of this state; behind it, bit for bit what they were."""
        pieces = {name: local(p).detach() for name, p in self._learning.items()}
        now = {name: piece.clone() for name, piece in pieces.items()}
        try:
            for name, piece in pieces.items():
                piece.copy_(state.parameters[name])
            yield
        finally:
            for name, piece in pieces.items():
                piece.copy_(now[name])

    def _chunks(self) -> list[Query]:
        """The rows of each pass, as queries. Their targets are multiplied by what the sum of gradients is divided by;
        of a pass that is run for the others' sake, by 0."""

        def chunk(start: int, stop: int) -> Query:
            rows = self._asked.rows(start, max(stop, 1), self._device)
            factor, target = (self._shards.divisor if stop else 0.0), rows.target
            return replace(rows, target=lambda output, *labels: whole(target(output, *labels)) * factor)

        return [chunk(*rows) for rows in self._shards.rows(self._asked.size, self._rows)]

    @property
    def _eps(self) -> float:
        """The relative rounding of the arithmetic that the model runs in."""
        types = [explained_type(p.dtype) for p in self._learning.values()]
        return max(torch.finfo(one).eps for one in (*types, *self._shards.computed_in))
