"""The Explainer: steps go in, from a live run or from its record, and `Influence`s come out."""

from collections.abc import Sequence
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.core.groups import Groups
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.integrator import MEMORY, Integrator
from explaind_track.engine.path_integral import Quadrature, Terms
from explaind_track.engine.targets import check_query
from explaind_track.explanation.accumulator import Accumulator


class Explainer:
    """Takes steps one by one and sums their influences on one query, for one or several choices of kept axes."""

    def __init__(
        self,
        model: nn.Module,
        query: Query,
        groups: Groups,
        keeps: Sequence[Sequence[str]],
        parts: Sequence[str] | None = None,
        quadrature: Quadrature | None = None,
        close: bool = False,
        memory: int = MEMORY,
    ) -> None:
        """Arguments as in `explain`; keeps: one choice of axes for each influence that `results` gives."""
        check_query(model, query)
        if not any("group" in keep for keep in keeps):
            groups = {"all": [name for names in groups.values() for name in names]}
        self.accumulators = [Accumulator(keep, list(groups)) for keep in keeps]
        self.integrator = Integrator(model, query, groups, parts, quadrature, memory)
        self.close = close
        self.nodes = 0
        """After a step: the quadrature nodes it took."""
        self.residual = float("nan")
        """After a step: its ‖remainder‖₂ / ‖change‖₂, where a choice of axes keeps the step."""
        self.metrics: dict[str, float] = {}
        """After a step: the query's mean `loss` and `accuracy`, where it has labels to tell."""

    def add(self, step: Step) -> list[dict[str, Tensor]]:
        """Takes one step in. Returns, for each choice of axes that keeps the step, the step's own row of it."""
        nodes, parts = self.integrator.nodes(step), self.integrator.parts(step)
        self.nodes = nodes
        for accumulator in self.accumulators:
            accumulator.begin(step.number, nodes, parts)
        self.metrics = {}
        for start, terms in self.integrator.terms(step, nodes, self.close):
            for name, value in _metrics(self.integrator.query, start, terms).items():
                self.metrics[name] = self.metrics.get(name, 0.0) + value
            for accumulator in self.accumulators:
                accumulator.add(start, terms)
        rows = [accumulator.end() for accumulator in self.accumulators]
        self.residual = next((float(row["residual"]) for row in rows if row), float("nan"))
        return rows

    def results(self) -> list[Influence]:
        """One influence for each choice of kept axes, over the steps so far."""
        rule = self.integrator.quadrature
        attrs = {
            "tolerance": rule.tolerance,
            "min_nodes": rule.nodes,
            "max_nodes": rule.max_nodes,
            "closed": int(self.close),
            "torch": torch.__version__,
            "explaind_track": version("explaind_track"),
        }
        return [accumulator.result(attrs) for accumulator in self.accumulators]


def _metrics(query: Query, start: int, terms: Terms) -> dict[str, float]:
    """This chunk's share of the query's mean loss and accuracy."""
    after = terms.after
    if query.is_loss:
        scale = 1 if query.reduction == "mean" else query.size
        return {"loss": float(after.sum()) / scale}
    if query.is_classified and query.reduction is None:
        y = query.labels[0][start : start + len(after)].to(after.device)
        right = float((after.argmax(-1) == y).sum())
        return {"loss": float(F.cross_entropy(after, y, reduction="sum")) / len(query), "accuracy": right / len(query)}
    return {}
