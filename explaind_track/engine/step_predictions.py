"""Predictions at both ends of a step, each computed once: for the next step too, and for other queries' same inputs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.core.tensors import Tensors
from explaind_track.engine.functional import Functional
from explaind_track.engine.targets import target_of


class SharedOutputs:
    """The model's outputs for the inputs that several queries have, at the ends of the step at hand."""

    def __init__(self) -> None:
        self._mark: object = None
        self._known: dict[Any, Any] = {}

    def of(self, functional: Functional, step: Change, state: State, which: Any, chunk: Query) -> Any:
        """The model's output at a state, for a chunk of the inputs. which: of the step's states, of the inputs and of
        the kernels."""
        if step.mark is not self._mark:
            self._known, self._mark = {}, step.mark
        if which not in self._known:
            self._known[which] = functional.value(state, chunk.output)
        return self._known[which]


class StepPredictions:
    """The predictions at both ends of the step at hand: where a step follows on the one before, it starts from that
    one's last."""

    def __init__(self, functional: Functional) -> None:
        self._functional = functional
        self.shared: SharedOutputs | None = None
        """The outputs that other queries on the same inputs have, too; None: there are none."""
        self._mark: object = None
        self._now: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._known: dict[tuple[int, int], Tensor] = {}

    def of(self, step: Change, start: int, query: Query, chunk: Query, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """f(θ_s, b_s), f(θ_{s+1}, b_s) and f(θ_{s+1}, b_{s+1}) for the chunk of the query from row `start` on.

        fused: whether attention is by the fused kernels.
        """
        if step.mark is not self._mark:
            follows = step.follows is not None and step.follows is self._mark
            self._known = {rows: after for rows, (_, _, after) in self._now.items()} if follows else {}
            self._now, self._mark = {}, step.mark

        def value(end: str, state: State) -> Tensor:
            if self.shared is None:
                return self._functional.value(state, target_of(query, chunk))
            output = self.shared.of(self._functional, step, state, (end, *rows, fused), chunk)
            with torch.no_grad():
                return target_of(query, chunk)(self._functional.model, output)

        rows = (start, chunk.size)
        if rows not in self._now:
            before = self._known.pop(rows) if rows in self._known else value("before", step.before)
            stays = step.after is step.before
            moved = before if stays else value("moved", step.point(1))
            self._now[rows] = before, moved, value("after", step.after) if buffers_moved(step) else moved
        return self._now[rows]


def share_outputs(predictions: Iterable[tuple[Query, StepPredictions]]) -> None:
    """Lets queries that ask the same model for the same inputs' outputs compute them together."""
    met: list[tuple[Query, StepPredictions]] = []
    for query, own in predictions:
        for other, others in met:
            if own.shared is None and query.module == other.module and _are_same(query.inputs, other.inputs):
                others.shared = own.shared = others.shared or SharedOutputs()
        met.append((query, own))


def _are_same(one: Any, other: Any) -> bool:
    """Whether two queries' inputs are the same tensors, or hold the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return one is other or (alike and torch.equal(one, other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_are_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_same(one[key], other[key]) for key in one)
    return False


def buffers_moved(step: Change) -> bool:
    """Whether the step changed any of the model's buffers (the running statistics of batch norm, say)."""
    before: Tensors = step.before.buffers
    after: Tensors = step.after.buffers
    return any(before[name] is not after[name] and not torch.equal(before[name], after[name]) for name in before)
