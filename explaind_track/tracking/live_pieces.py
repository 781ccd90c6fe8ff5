"""Live influences where the parameters are in pieces: every process multiplies its own, and the sums are added up.

Ψ_s(part, Θ_g) ≈ ½ ⟨∇f(θ_s) + ∇f(θ_{s+1}), part restricted to Θ_g⟩: the trapezoid, for nothing can be put into the place
of parameters that nobody has whole. The model itself runs forward and backward, at θ_{s+1}, each process with its share
of the query's rows, and each gets its piece of the gradient, which serves this step and the next.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core import distributed
from explaind_track.core.groups import Groups
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.shards import Shards, local, local_like, reshard, whole
from explaind_track.core.step import Step
from explaind_track.core.tensors import explained_type, upcast
from explaind_track.engine.functional import evaluation
from explaind_track.engine.live_gradients import gradient_in_place
from explaind_track.engine.memory import CPU_PASS
from explaind_track.engine.path_integral import Quadrature, Terms
from explaind_track.engine.streaming import inner_product
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
    ) -> None:
        """Raises ValueError for a query that is no differentiable scalar."""
        self._model, self._shards, self._device = model, shards, shards.device
        self._place = {name: place for place, names in enumerate(groups.values()) for name in names}
        self._memory = memory
        self._feature: dict[str, Tensor] = {}
        """∇f where the last step has led to: this process's pieces, in the precision that they are explained in."""
        self._value: Tensor | None = None
        """f there; None where it is not known."""
        self._mark: object = None
        """That of the step."""
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

    def _pass(self, chunks: Sequence[Query], take: Any) -> Tensor:
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

    def forget(self) -> None:
        """Forgets all steps."""
        self._value = self._mark = None
        super().forget()

    def _terms(self, step: Step, parts: Sequence[str]) -> Terms:
        if self._value is None or step.follows is not self._mark:
            self._begin(step)
        before, self._value = self._value, None  # where something interrupts this, nothing is known
        assert before is not None  # known now

        # ½ ⟨∇f(θ_s) + ∇f(θ_{s+1}), part⟩, of this process's pieces
        products = torch.zeros(len(parts), len(self._groups), dtype=torch.float64)
        moved = {name for name in step.moved if name in self._shards.counted}

        def end(name: str, now: Tensor | None) -> None:
            ends = [one.reshape(-1) for one in (self._feature.pop(name, None), now) if one is not None]
            if name in moved and ends:
                slope = torch.stack(ends).sum(0) / 2
                for place, rows in step.pieces(name, parts, rest=False):
                    found = torch.stack([inner_product(slope[place], row) for row in rows])
                    products[:, self._place[name]] += found.cpu()
            if now is not None:
                later[name] = now

        later: dict[str, Tensor] = {}
        value = self._gradient(end)
        for name in list(self._feature):
            end(name, None)
        self._feature = later

        # one sum over the processes
        together = torch.cat([products.flatten(), value.flatten()])
        distributed.add_up(together)
        influence, after = together[:-1].reshape(len(parts), -1, 1, 1), together[-1:, None]
        terms = Terms.start(before, after, after, parts, len(self._groups), close=False, eps=self._eps)
        terms.add(influence, torch.zeros_like(after), 1.0)
        terms.finish()
        self._value, self._mark = after, step.mark
        return terms

    def _gradient(self, end: Any) -> Tensor:
        """The gradient of the model as it stands: `end(name, piece)` gets each parameter's once it is whole. Returns
        this process's share of the target's value, (1, 1) in float64."""
        gathered: dict[str, Tensor] = {}
        learning = self._learning

        def take(name: str, gradient: Tensor, is_last: bool) -> None:
            piece = upcast(local_like(gradient, learning[name]))
            gathered[name] = gathered[name] + piece if name in gathered else piece
            if is_last:
                end(name, gathered.pop(name))

        with evaluation(self._model, fused=True):
            value = self._pass(self._chunks(), take)
        for name in list(gathered):  # which the last rows have not come to
            end(name, gathered.pop(name))

        share = value.double().cpu() / self._shards.divisor
        return share if self._shards.counts_rows else torch.zeros_like(share)

    def _chunks(self) -> list[Query]:
        """The rows of each pass, as queries. Their targets are multiplied by what the sum of gradients is divided by;
        of a pass that is run for the others' sake, by 0."""

        def chunk(start: int, stop: int) -> Query:
            rows = self._asked.rows(start, max(stop, 1), self._device)
            factor, target = (self._shards.divisor if stop else 0.0), rows.target
            return replace(rows, target=lambda output, *labels: whole(target(output, *labels)) * factor)

        return [chunk(*rows) for rows in self._shards.rows(self._asked.size, self._rows)]

    def _begin(self, step: Step) -> None:
        """Finds the gradient at θ_s, with the parameters back there for one pass."""
        self._feature = {}
        pieces = {name: local(p).detach() for name, p in self._learning.items() if name in step.moved}
        now = {name: piece.clone() for name, piece in pieces.items()}
        try:
            for name, piece in pieces.items():
                piece.copy_(step.before.parameters[name])
            value = self._gradient(self._feature.__setitem__)
        finally:
            for name, piece in pieces.items():
                piece.copy_(now[name])
        distributed.add_up(value)
        self._value = value

    @property
    def _eps(self) -> float:
        """The relative rounding of the arithmetic that the model runs in."""
        types = [explained_type(p.dtype) for p in self._learning.values()]
        return max(torch.finfo(one).eps for one in (*types, *self._shards.computed_in))
