"""One entry for every decomposition: steps go in, from a live run or from its record, and an `Influence` comes out."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.autodiff import Functional, evaluation
from explaind_track.groups import Groups, GroupSpec, resolve_groups
from explaind_track.influence import Accumulator, Influence
from explaind_track.integrator import MEMORY, Integrator
from explaind_track.path import Quadrature, Terms
from explaind_track.queries import Query
from explaind_track.step import State, Step

if TYPE_CHECKING:
    from explaind_track.trajectory import Trajectory


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


def check_query(model: nn.Module, query: Query) -> None:
    """Raises ValueError if the query's targets cannot be differentiated with respect to the model's parameters."""
    parameters = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    device = next(iter(parameters.values())).device
    one = query.rows(0, 1, device)
    with evaluation(model), torch.enable_grad():
        value: Tensor = Functional(model)(State(parameters, dict(model.named_buffers())), one)
    if not value.dtype.is_floating_point:
        raise ValueError(f"the query's target is of type {value.dtype}: only real numbers have a derivative")
    if not value.requires_grad:
        raise ValueError(
            "the query's target does not depend differentiably on the model's parameters: it must not detach its "
            "input, leave torch, or go through argmax, comparison or rounding"
        )


def explain(
    steps: "Trajectory | Iterable[Step]",
    model: nn.Module,
    query: Query,
    *,
    groups: GroupSpec = None,
    keep: Sequence[str] = ("step", "group"),
    parts: Sequence[str] | None = None,
    window: tuple[int, int] | None = None,
    quadrature: Quadrature | None = None,
    close: bool = False,
    memory: int = MEMORY,
    progress: bool = True,
) -> Influence:
    """The influences of a training run on the query's targets, over the axes asked for.

    steps:      a `Trajectory`, or any steps in their order.
    model:      the module that was trained; its own values do not matter, and are not touched.
    groups:     see `resolve_groups`; None: by the first part of the module path.
    keep:       some of "step", "group", "query", "output"; all other axes are summed over.
    parts:      of the steps, one row each; what is not asked for is left to the remainder. None: all, the rounding
                summed over the groups. "momentum" is a share of "kernel".
    window:     steps first ≤ s < last of a trajectory; None: all.
    quadrature: how each step is integrated; None: until the residual is at most 1e-3, with at most 64 nodes.
    close:      share the remainder out over parts and groups, so that sums are exact; `residual` stays as it was.
    memory:     bytes one pass may take: a guide by which queries and directions are cut into chunks.

    Raises ValueError, before any work, for groups that are no partition, axes that there are not, and a query whose
    target is not differentiable.
    """
    from explaind_track.trajectory import Trajectory  # it is heavier, and needs what is above

    names = dict(model.named_parameters())
    explainer = Explainer(model, query, resolve_groups(groups, names), [keep], parts, quadrature, close, memory)
    total: int | None = None
    if isinstance(steps, Trajectory):
        steps.check_model(model)
        first, last = window or (0, len(steps))
        total, steps = last - first, steps.steps(first, last)
    elif window is not None:
        raise ValueError("a window is for trajectories; pass the steps that you want")
    with tqdm(steps, "explain", total, unit="step", disable=not progress) as bar:
        for step in bar:
            explainer.add(step)
    return explainer.results()[0]
