"""One entry for every decomposition: it picks the plan for the axes that are asked for."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from os import PathLike
from typing import Any, ParamSpec

from torch import nn

from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.functional import SampleLoss
from explaind_track.engine.integrator import MEMORY
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.targets import check_query
from explaind_track.explanation.explainer import Explainer
from explaind_track.explanation.group_plan import GroupPlan
from explaind_track.explanation.plan import ExplanationPlan
from explaind_track.explanation.sample_axis import Data
from explaind_track.explanation.sample_plan import SamplePlan
from explaind_track.explanation.step_source import StepStream, choose_samples, source_of
from explaind_track.record.trajectory import Trajectory

Arguments = ParamSpec("Arguments")


def plan_explanation(
    steps: Trajectory | Iterable[Step],
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
    data: Data | None = None,
    samples: Iterable[int] | None = None,
    partition: Any = None,
) -> ExplanationPlan:
    """The influences of a training run on the query's targets, over the axes asked for.

    `explain` computes them, an `Influence`. `plan_explanation` with the same arguments gives the plan: `describe()`
    tells what it takes, `run()` does it.

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
    looked: with `samples`, every 50th step is compared); a SampleMismatchWarning warns of those that are not rounding.

    Under `torchrun`, each process does its share, and all get the whole result.

    Raises ValueError, before any work, for groups that are no partition, axes that there are not, a query whose target
    is not differentiable, a window outside of the record, and a result that does not fit into memory.
    """
    resolved = resolve_groups(groups, dict(model.named_parameters()))
    if not {"sample", "seen"} & set(keep):
        make = partial(Explainer, model, query, resolved, [keep], parts, quadrature, close, memory)
        if isinstance(steps, Trajectory):
            source_of(steps, model, window)
            return GroupPlan(steps, make, window, memory, progress, out)
        if window is not None:
            raise ValueError("a window is for trajectories; pass the steps that you want")
        return GroupPlan(StepStream(steps), make, None, memory, progress, out)
    source = source_of(steps, model, window)
    if close:
        raise ValueError("close= shares the remainder out over parts and groups, not over samples")
    if parts is not None and tuple(parts) != ("kernel",):
        raise ValueError(f"samples act through the kernel part alone; parts={tuple(parts)} cannot be kept with them")
    check_query(model, query)
    last = window[1] if window else len(source)
    chosen = choose_samples(source, last, sample_loss, data, samples, partition)
    return SamplePlan(
        source, model, query, resolved, keep, window, chosen, quadrature, memory, progress, out
    )  # fmt: skip


def _at_once(plan: Callable[Arguments, ExplanationPlan]) -> Callable[Arguments, Influence]:
    """A function that plans, and does it."""

    @wraps(plan)
    def explain(*arguments: Arguments.args, **named: Arguments.kwargs) -> Influence:
        return plan(*arguments, **named).run()

    explain.__name__ = explain.__qualname__ = "explain"
    explain.__signature__ = inspect.signature(plan).replace(return_annotation=Influence)  # type: ignore[attr-defined]
    return explain


explain = _at_once(plan_explanation)
