"""One entry for every decomposition: steps go in, from a live run or from its record, and an `Influence` comes out."""

from collections.abc import Iterable, Sequence
from functools import partial
from importlib.metadata import version
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.autodiff import Functional, SampleLoss, evaluation
from explaind_track.groups import Groups, GroupSpec, resolve_groups
from explaind_track.influence import Accumulator, Influence
from explaind_track.integrator import MEMORY, Integrator
from explaind_track.path import Quadrature, Terms
from explaind_track.planning import Plan
from explaind_track.queries import Query
from explaind_track.step import State, Step

if TYPE_CHECKING:
    from explaind_track.sample_axis import Data
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
    out: str | PathLike[str] | None = None,
    sample_loss: SampleLoss | None = None,
    data: "Data | None" = None,
    samples: Iterable[int] | None = None,
    partition: Any = None,
) -> Influence:
    """The influences of a training run on the query's targets, over the axes asked for.

    steps:      a `Trajectory`, or any steps in their order.
    model:      the module that was trained; its own values do not matter, and are not touched.
    groups:     see `resolve_groups`; None: by the first part of the module path.
    keep:       some of "step", "group", "query", "output"; all other axes are summed over. With "sample", the
                kernel part is split over the training samples by reverse replay, and "seen" is an axis beside "step":
                "step" is the step at which the influence acts, "seen" the one whose batch the sample was in.
    parts:      of the steps, one row each; what is not asked for is left to the remainder. None: all, the rounding
                summed over the groups. "momentum" is a share of "kernel".
    window:     steps first ≤ s < last of a trajectory; None: all.
    quadrature: how each step is integrated; None: until the residual is at most 1e-3, with at most 64 nodes.
    close:      share the remainder out over parts and groups, so that sums are exact; `residual` stays as it was.
    memory:     bytes one pass may take: a guide by which queries and directions are cut into chunks.

    out:        a directory for a result that is larger than the memory: it is written there piece by piece, and an
                interrupted call goes on when it is made again. `Influence.load` opens it later.

    For the axis "sample":

    sample_loss: `(model, batch)` → unreduced losses (N,); the model in the mode that it was trained in.
    data:        from an index tensor (N,) to the batch that `sample_loss` takes; not needed where the trajectory
                 holds the batches themselves.
    samples:     the training indices asked for; None: all.
    partition:   `partition[index]` is the label of the part that a sample is in; parts take the samples' place along
                 the axis, and are summed before the product (Cor. F.2).

    The sample axis's `influence` comes with `kernel`, what the optimizer's own state says of all samples together, and
    `mismatch` (walked), by how much each step's samples miss the gradient which the optimizer saw (NaN where nobody
    looked: with `samples`, every 50th step is compared); a SampleMismatch warns of those that are not rounding.

    Under `torchrun`, each process does its share, and all get the whole result.

    Raises ValueError, before any work, for groups that are no partition, axes that there are not, a query whose target
    is not differentiable, a window outside of the record, and a result that does not fit into memory.
    """
    plan = plan_explanation(
        steps, model, query, groups=groups, keep=keep, parts=parts, window=window, quadrature=quadrature, close=close,
        memory=memory, sample_loss=sample_loss, data=data, samples=samples, partition=partition,
    )  # fmt: skip
    if out is None:
        plan.refuse_what_does_not_fit()
    return plan.run(progress, out)


def plan_explanation(
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
    sample_loss: SampleLoss | None = None,
    data: "Data | None" = None,
    samples: Iterable[int] | None = None,
    partition: Any = None,
) -> Plan:
    """What `explain` would do with these arguments: `describe()` tells what it takes, `run()` does it."""
    from explaind_track.group_explain import GroupExplanation  # they need what is above
    from explaind_track.sample_explain import SampleExplanation
    from explaind_track.sources import StepStream, choose_samples, source_of
    from explaind_track.trajectory import Trajectory

    resolved = resolve_groups(groups, dict(model.named_parameters()))
    if not {"sample", "seen"} & set(keep):
        make = partial(Explainer, model, query, resolved, [keep], parts, quadrature, close, memory)
        if isinstance(steps, Trajectory):
            source_of(steps, model, window)
            return GroupExplanation(steps, make, window, memory)
        if window is not None:
            raise ValueError("a window is for trajectories; pass the steps that you want")
        return GroupExplanation(StepStream(steps), make, None, memory)
    source = source_of(steps, model, window)
    if close:
        raise ValueError("close= shares the remainder out over parts and groups, not over samples")
    if parts is not None and tuple(parts) != ("kernel",):
        raise ValueError(f"samples act through the kernel part alone; parts={tuple(parts)} cannot be kept with them")
    check_query(model, query)
    last = window[1] if window else len(source)
    chosen = choose_samples(source, last, sample_loss, data, samples, partition)
    return SampleExplanation(source, model, query, resolved, keep, window, chosen, quadrature, memory)
