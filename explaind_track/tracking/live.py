"""The explaining of live steps: influences on each query of a Tracker, and the row of metrics that shows them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from explaind_track.analysis.parameter_scores import ParameterScores
from explaind_track.core.checks import require_known
from explaind_track.core.groups import Groups
from explaind_track.core.influence import Influence
from explaind_track.core.modules import keeping_modes, parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.shards import Shards
from explaind_track.core.step import Step
from explaind_track.core.switches import keeping_switches
from explaind_track.core.tensors import low_precision, upcast
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.step_predictions import share_outputs
from explaind_track.explanation.explainer import Explainer
from explaind_track.record import history
from explaind_track.tracking.live_pieces import PiecesExplainer
from explaind_track.tracking.metrics import change_row, importance_row

NEVER = -1

LIVE_AXES = (("step", "group"), ("query", "output"))
TOKEN_AXES = (("step", "group"), ("group", "token"))
"""The choices of axes that live influences keep, and those of a query of tokens."""

RESIDUAL_LIMIT = 0.5
"""Above it a step's split says little: half of the change is not in it. Where the quadrature has a tolerance, that
counts instead."""

JUMP = 5
"""A residual so many times that of the step before has a reason, which may be an optimizer that does something else."""


def live_parts(query: Query, auxiliary: Iterable[str], is_low_precision: bool) -> tuple[str, ...]:
    """The names of the parts that a step is split into on the query.

    The rounding is left to the remainder, which it cannot be told from (both are of the size of float rounding), and a
    live step costs a tenth less. A loss is cheap to split (one gradient serves every part), so there the momentum share
    is told as well. In bfloat16 and float16 the rounding may be as large as the step, and is told.
    """
    momentum = ("momentum",) if query.is_loss else ()
    rounding = ("rounding",) if is_low_precision else ()
    return ("kernel", *momentum, "regularization", *auxiliary, "past", "outside", *rounding)


def axes_of(query: Query) -> tuple[tuple[str, ...], ...]:
    """The choices of axes that are kept of a query."""
    return LIVE_AXES if query.token_text is None else TOKEN_AXES


class Live:
    """Explains the steps it is given, in their order, on several queries at once."""

    def __init__(
        self,
        model: nn.Module,
        queries: Mapping[str, Query],
        groups: Groups,
        auxiliary: Iterable[str],
        quadrature: Quadrature | None,
        memory: int,
        scores: str | None,
        shards: Shards | None,
        keep_before: str,
    ) -> None:
        """auxiliary: the names of the auxiliary losses; scores: the query whose parameters' influences are summed up;
        shards: where the parameters are in pieces. quadrature: None: the trapezoid, if that is one pass a step for each
        of the queries, else the midpoint. keep_before: "host", if what is kept from before a step lies in its memory.

        Raises ValueError for queries that cannot be differentiated.
        """
        self._model, self.groups, self._shards, self._keep_before = model, groups, shards, keep_before
        self.quadrature = quadrature or Quadrature.fixed(1)
        is_low_precision = low_precision(parameters_of(model)) is not None
        self.parts = {name: live_parts(query, auxiliary, is_low_precision) for name, query in queries.items()}
        """By query: the names of the parts that a step is split into."""
        self.explainers = {name: self._explainer(name, query, memory) for name, query in queries.items()}
        if quadrature is None and shards is None:
            self._choose_trapezoid()
        integrators = [explainer.integrator for explainer in self.explainers.values()]
        share_outputs((integrator.query, integrator.predictions) for integrator in integrators)
        self._scores: Callable[[], ParameterScores] | None = None
        if scores is not None:
            scored = self.explainers[scores].integrator.query
            self._scores = partial(ParameterScores, model, scored, quadrature=self.quadrature, memory=memory)
        self.scores = None if self._scores is None else self._scores()

        self.residual_jumped = False
        """Whether the residual of the last step is far above that of the one before, on any of the queries."""
        self._residuals: dict[str, float] = {}
        self.upto = 0
        """All steps before this one are in what was summed up, as far as they were to be explained."""
        self.losses = [name for name, query in queries.items() if query.is_loss]

    def _explainer(self, name: str, query: Query, memory: int) -> Explainer:
        model, groups, axes, parts = self._model, self.groups, axes_of(query), self.parts[name]
        if self._shards is not None:
            on_host = self._keep_before == "host"
            return PiecesExplainer(model, query, groups, axes, parts, self._shards, memory, on_host)
        return Explainer(
            model, query, groups, axes, parts, self.quadrature, memory=memory, rows_in_file=True,
            keep_on_host=self._keep_before == "host",
        )  # fmt: skip

    def _choose_trapezoid(self) -> None:
        """Takes the trapezoid where it is one pass a step for each of the queries."""
        integrators = [explainer.integrator for explainer in self.explainers.values()]
        if integrators and all(integrator.can_carry for integrator in integrators):
            self.quadrature = Quadrature.trapezoid()
            for integrator in integrators:
                integrator.quadrature = self.quadrature

    @property
    def carries(self) -> bool:
        """Whether each query's gradient at a step's end is kept for the step that follows, so that nobody needs a copy
        of the parameters between them."""
        own = [] if self._shards is not None else [one.integrator for one in self.explainers.values()]
        return bool(own) and all(integrator.carries for integrator in own)

    def add(self, step: Step) -> tuple[dict[str, float], list[str]]:
        """Explains a step. Returns its row of metrics, and what is to be doubted about it."""
        metrics: dict[str, float] = {}
        doubts: list[str] = []
        now: dict[str, float] = {}

        # where something interrupts this, half a step is in the sums; and an interruption may come to where a query
        # gives the modules their modes back, or torch its switches, too
        upto, self.upto = self.upto, NEVER
        with keeping_switches(), keeping_modes(self._model):
            for name, explainer in self.explainers.items():
                row, _ = explainer.add(step)
                metrics |= self._metrics(name, explainer.integrator.parts(step), row)
                doubts += self._doubts(name, step.number, row)
                now[name] = float(row["residual"])
            if self.scores is not None:
                self.scores.add(step)
        self.residual_jumped = any(now[name] > JUMP * before for name, before in self._residuals.items())
        self._residuals = now
        self.upto = upto
        return metrics, doubts

    def pass_by(self, number: int) -> None:
        """Takes note that all that was to be explained of step `number` is."""
        if self.upto == number:
            self.upto += 1

    def forget(self) -> None:
        """Forgets all steps, to be given them again from the first on."""
        self.upto = 0
        for explainer in self.explainers.values():
            explainer.forget()
        self.scores = None if self._scores is None else self._scores()

    def _metrics(self, name: str, parts: Sequence[str], row: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers of a query; row: the step's, of its explainer."""
        explainer, first = self.explainers[name], next(iter(self.explainers))
        query, groups = explainer.integrator.query, list(self.groups)

        # a loss is shown by its signed change, and the first query by its importances whatever it is
        metrics: dict[str, float] = {}
        if name == first or not query.is_loss:
            metrics |= importance_row(parts, groups, row, "" if name == first else name)
        if query.is_loss:
            loss = history.LOSS if name == self.losses[0] else name
            metrics |= change_row(parts, groups, row, 1.0 / query.loss_count, loss)

        for measure, value in explainer.metrics.items():
            metrics[history.measure_key(name, measure)] = value
        metrics[history.residual_key(name)] = float(row["residual"])
        metrics[history.NODES] = explainer.nodes
        return metrics

    def _doubts(self, name: str, number: int, row: Mapping[str, Tensor]) -> list[str]:
        """A sentence, where the residual of a query is above its limit."""
        residual, rule = float(row["residual"]), self.quadrature
        limit = max(rule.tolerance or RESIDUAL_LIMIT, 2 * float(row["residual_floor"]))
        if residual <= limit or float(row["change"].abs().sum()) == 0:
            return []
        finer = (
            "Tracker(quadrature=Quadrature(tolerance=…, max_nodes=…)) takes more nodes"
            if self._shards is None
            else "Of parameters in pieces there are no others: explain_checkpoints takes more, of the run's checkpoints"
        )
        return [
            f"step {number}: the split of '{name}' leaves {residual:.2g} of the change over, more than {limit:.2g} "
            f"({self.explainers[name].nodes} nodes). {finer}"
        ]

    def explainer(self, query: str) -> Explainer:
        """The explainer of a query. Raises ValueError for one that there is not."""
        require_known("query", query, self.explainers)
        return self.explainers[query]

    def is_of_tokens(self, query: str) -> bool:
        """Whether the query is one of tokens."""
        return axes_of(self.explainer(query).integrator.query) is TOKEN_AXES

    def influence(self, query: str, keep: Sequence[str]) -> Influence:
        """See `Tracker.influence`."""
        explainer, axes = self.explainer(query), tuple(keep)
        known = axes_of(explainer.integrator.query)
        if axes not in known:
            raise ValueError(f"live influences keep {known[0]} or {known[1]}, not {keep!r}; explain() the rest")
        return explainer.results()[known.index(axes)]

    def parameter_scores(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the scores so far, for all `parameters`: 0 for those that were never moved."""
        if self.scores is None:
            raise ValueError("parameter scores were not asked for: pass scores= and a query's name to the Tracker")
        rows = self.scores.rows
        return {
            name: rows[name][0].clone() if name in rows else torch.zeros_like(upcast(parameter.detach()))
            for name, parameter in parameters.items()
        }
