"""The Explainer: steps go in, from a live run or from its record, and `Influence`s come out."""

from collections.abc import Sequence
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn

from explaind_track.core.groups import Groups
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import Quadrature, Terms
from explaind_track.engine.targets import fitted_query
from explaind_track.explanation.accumulator import Accumulator
from explaind_track.explanation.step_rows import FiledRows, Row


class Explainer:
    """Takes steps one by one and sums their influences on one query, for one or several choices of kept axes.

    What `Tracker` and `explain` run inside; for training loops of one's own, with a `StepObserver`.

    Args:
        model: The module that is trained.
        query: Whose targets are explained: X inputs (or one reduction of them) with O outputs each.
        groups: The names of each group's parameters, as `resolve_groups` gives them.
        keeps: One choice of axes for each influence that `results` gives.
        parts: As in `explain`.
        quadrature: As in `explain`.
        close: As in `explain`.
        memory: Bytes one pass may take.
        rows_in_file: Keep the rows of steps in a temporary file, for as many as a run may have, not in memory.
        keep_on_host: Where the gradient at a step's end serves the next step too, keep it in the host's memory.

    Raises:
        ValueError: For axes that there are not, and a query whose target is not differentiable.

    Example:
        >>> import torch
        >>> from explaind_track import Explainer, Query, StepObserver, resolve_groups
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> parameters = dict(model.named_parameters())
        >>> observer = StepObserver(optimizer, parameters)
        >>> explainer = Explainer(model, Query.loss(x, y), resolve_groups(None, parameters), [("step", "group")])
        >>> for number in range(3):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     observer.before({})
        ...     optimizer.step()
        ...     (row,) = explainer.add(observer.after(number, {}))
        ...     observer.settle()
        >>> row["influence"].shape  # of the last step: parts, groups
        torch.Size([2, 2])
        >>> (influence,) = explainer.results()
        >>> influence.data["step"].values.tolist()
        [0, 1, 2]
    """

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
        rows_in_file: bool = False,
        keep_on_host: bool = False,
    ) -> None:
        query = self.fitted(model, query)
        if not any("group" in keep for keep in keeps):
            groups = {"all": [name for names in groups.values() for name in names]}
        self._groups, self._keeps, self._parts, self._rows_in_file = list(groups), keeps, parts, rows_in_file
        self._query = query
        self.forget()
        self.integrator = Integrator(model, query, groups, parts, quadrature, memory, keep_on_host=keep_on_host)
        self.close = close

        self.nodes = 0
        """After a step: the quadrature nodes it took."""
        self.residual = float("nan")
        """After a step: its ‖remainder‖₂ / ‖change‖₂, where a choice of axes keeps the step."""
        self.metrics: dict[str, float] = {}
        """After a step: the query's mean `loss` and `accuracy`, where it has labels to tell."""

    def fitted(self, model: nn.Module, query: Query) -> Query:
        """The query as the model takes it; see `fitted_query`."""
        return fitted_query(model, query)

    def add(self, step: Step) -> list[Row]:
        """Takes one step in.

        Returns:
            For each choice of axes that keeps the step, the step's row: the variables of its `Influence` by name,
            without the step axis; an empty row for the others.

        Raises:
            ValueError: For a step that is not valid any more, and for one that lacks the parts that were asked for.
        """
        step.require_valid()
        parts = self.integrator.parts(step)
        outside, outside_nodes = self._from_outside(step)
        nodes = self.integrator.nodes(step)
        self.nodes, self.metrics = max(nodes, outside_nodes), {}
        for accumulator in self.accumulators:
            accumulator.begin(step.number, self.nodes, parts)

        for start, own_terms in self.integrator.terms(step, nodes, self.close):
            terms = own_terms.arranged(parts)
            if start in outside:  # the step leads on from there
                first = outside.pop(start).arranged(parts)
                first += terms
                terms = first
            for name, value in query_metrics(self.integrator.query, start, terms).items():
                self.metrics[name] = self.metrics.get(name, 0.0) + value
            for accumulator in self.accumulators:
                accumulator.add(start, terms)

        rows = [accumulator.end() for accumulator in self.accumulators]
        self.residual = next((float(row["residual"]) for row in rows if row), float("nan"))
        return rows

    def forget(self) -> None:
        """Forgets all steps."""
        self.accumulators = []
        for keep in self._keeps:
            rows = FiledRows() if self._rows_in_file and "step" in keep else None
            self.accumulators.append(Accumulator(keep, self._groups, self._parts, rows, self._query))

    def _from_outside(self, step: Step) -> tuple[dict[int, Terms], int]:
        """The terms of what else changed the model since the step before, by the chunk's first row; and their nodes."""
        if step.outside is None:
            return {}, 0
        self.integrator.fix_chunks(step)
        nodes = self.integrator.nodes(step.outside)
        return dict(self.integrator.terms(step.outside, nodes, self.close)), nodes

    @property
    def mode(self) -> str:
        """How steps are differentiated, in words."""
        return self.integrator.mode

    def results(self) -> list[Influence]:
        """One influence for each choice of kept axes, over the steps so far."""
        rule = self.integrator.quadrature
        attrs = {
            "tolerance": rule.tolerance,
            "min_nodes": rule.nodes,
            "max_nodes": rule.max_nodes,
            **({"rule": rule.rule} if rule.is_trapezoid else {}),
            "closed": int(self.close),
            "mode": self.mode,
            "torch": torch.__version__,
            "explaind_track": version("explaind_track"),
        }
        return [accumulator.result(attrs) for accumulator in self.accumulators]


def query_metrics(query: Query, start: int, terms: Terms) -> dict[str, float]:
    """This chunk's share of the query's mean loss and accuracy; nothing where the query has no labels to tell."""
    after = terms.after
    if query.is_loss:
        return {"loss": float(after.sum()) / query.loss_count}

    if query.is_classified and query.reduction is None:
        y = query.labels[0][start : start + len(after)].to(after.device)
        right = float((after.argmax(-1) == y).sum())
        return {"loss": float(F.cross_entropy(after, y, reduction="sum")) / len(query), "accuracy": right / len(query)}
    return {}
