"""One entry for every decomposition: it picks the plan for the axes that are asked for."""

from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal, TypedDict, Unpack

from torch import nn

from explaind_track.core.checks import require_callable, require_int, require_names
from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query, require_query
from explaind_track.core.step import Step
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import Quadrature, require_quadrature
from explaind_track.engine.targets import fitted_query
from explaind_track.explanation.explainer import Explainer
from explaind_track.explanation.group_plan import GroupPlan
from explaind_track.explanation.plan import ExplanationPlan
from explaind_track.explanation.sample_axis import Data, choose_samples
from explaind_track.explanation.sample_plan import SamplePlan
from explaind_track.explanation.step_source import StepSource, Window
from explaind_track.record.trajectory import Trajectory

Accuracy = Literal["live", "1e-2", "1e-3"]


class ExplainOptions(TypedDict, total=False):
    """What can be said to `explain` and `plan_explanation` beside steps, model and query; `explain` tells of each."""

    groups: GroupSpec
    keep: Sequence[str]
    parts: Sequence[str] | None
    window: Window | None
    accuracy: Accuracy | None
    quadrature: Quadrature | None
    close: bool
    memory: int
    progress: bool
    out: str | PathLike[str] | None
    sample_loss: SampleLoss | None
    data: Data | None
    samples: Iterable[int | str] | None
    partition: Any


def explain(
    steps: Trajectory | Iterable[Step], model: nn.Module, query: Query, **options: Unpack[ExplainOptions]
) -> Influence:
    """Computes the influences of a training run on the query's targets, over the axes asked for.

    Ψ of §4 and Thm. 3.1: what is subtracted from the prediction. Under `torchrun`, each process does its share, and all
    get the whole result.

    Args:
        steps: A `Trajectory`; a list of steps that last (`trajectory.steps(lasting=True)`); or, where no samples are
            asked for, any stream of steps in their order, each of which need only be valid until the next.
        model: The module that was trained; its own values do not matter, and are not touched.
        query: Whose targets are explained: X inputs (or one reduction of them) with O outputs each.
        groups: See `resolve_groups`; None: by the first part of the module path.
        keep: Some of "step", "group", "query", "output", ("step", "group") if not given; all other axes are summed
            over. "token", of a `Query.tokens`, stands in the place of query and output. With "sample", the kernel part
            is split over the training samples by reverse replay, and "seen" is an axis beside "step": "step" is the
            step at which the influence acts, "seen" the one whose batch the sample was in.
        parts: Of the steps, one row each; what is not asked for is left to the remainder. None: all, the rounding
            summed over the groups. "momentum" is a share of "kernel"; "outside" is what something other than the
            optimizer did to the weights since the step before (clamps, masks, copies, another optimizer).
        window: `(first, last)`, steps first ≤ s < last; None: all. What changed the model behind the run's last step is
            an entry of its own, numbered like the step that would follow, in windows that end there.
        accuracy: How much of each step's change may be left over. "live": what one node leaves, as in a Tracker's
            panels, which is enough for sums over many steps and costs least; "1e-2" and "1e-3" begin with that node and
            double it until the residual is so small, up to 64 nodes, as networks with kinks (ReLU) may need. None:
            "1e-3".
        quadrature: How each step is integrated, in the place of `accuracy`, for nodes or tolerances of one's own.
        close: Share the remainder out over parts and groups, so that sums are exact; `residual` stays as it was.
        memory: Bytes that passes may take (2**28 if not given), beside θ_s(t), one direction (a copy of the parameters
            of a group) and the result: queries, outputs and directions are cut into chunks that fit, and of the ways to
            differentiate a step that fit, the one that costs least is taken, by the count of its passes and bytes.
            Where the directions of a reverse pass do not fit (models of more than 13 million parameters, if not given)
            and the query is reduced to one target, or to few, the streaming plan is taken: a backward pass whose
            gradients are multiplied and dropped one by one, with sums and the query's target in float64.
        progress: False: show no bar, and say nothing of work that will take more than a minute.
        out: A directory for a result that is larger than the memory: it is written there piece by piece, and an
            interrupted call goes on when it is made again. `open_influence` opens it later.
        sample_loss: For the axis "sample": `(model, batch)` → unreduced losses (N,); the model in the mode that it was
            trained in.
        data: For the axis "sample": from an index tensor (N,) to the batch that `sample_loss` takes; not needed where
            the trajectory holds the batches themselves.
        samples: For the axis "sample": the training indices asked for; None: all.
        partition: For the axis "sample": `partition[index]` is the label of the part that a sample is in; parts take
            the samples' place along the axis, and are summed before the product (Cor. F.2).

    Returns:
        An `Influence`. The sample axis's `influence` comes with `kernel`, what the optimizer's own state says of all
        samples together, and `mismatch` (walked), by how much each step's samples miss the gradient which the
        optimizer saw (NaN where nobody looked: with `samples`, every 50th step is compared); a SampleMismatchWarning
        warns of those that are not rounding.

    Raises:
        ValueError: Before any work, for groups that are no partition, axes that there are not, a query whose target is
            not differentiable, a window outside of the run, steps that are held and do not last, and a result that
            does not fit into memory.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory, explain
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(5):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x, y), index=torch.arange(8))
        ...             loss(model, (x, y)).mean().backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     trajectory, query = Trajectory.open(directory), Query.outputs(x[:4])
        ...     of_groups = explain(trajectory, model, query, progress=False)
        ...     of_samples = explain(
        ...         trajectory, model, query, keep=("query", "output", "sample"), progress=False,
        ...         sample_loss=loss, data=lambda index: (x[index], y[index]),
        ...     )
        >>> dict(of_groups.data["influence"].sizes)
        {'part': 2, 'step': 5, 'group': 2}
        >>> of_samples.data["influence"].shape
        (4, 2, 8)
        >>> bool(of_groups.residual.max() < 1e-3)  # so much of each step's change is not explained
        True
    """
    return plan_explanation(steps, model, query, **options).run()


def plan_explanation(
    steps: Trajectory | Iterable[Step],
    model: nn.Module,
    query: Query,
    *,
    groups: GroupSpec = None,
    keep: Sequence[str] = ("step", "group"),
    parts: Sequence[str] | None = None,
    window: Window | None = None,
    accuracy: Accuracy | None = None,
    quadrature: Quadrature | None = None,
    close: bool = False,
    memory: int = MEMORY,
    progress: bool = True,
    out: str | PathLike[str] | None = None,
    sample_loss: SampleLoss | None = None,
    data: Data | None = None,
    samples: Iterable[int | str] | None = None,
    partition: Any = None,
) -> ExplanationPlan:
    """Plans what `explain` computes at once, with the same arguments.

    Returns:
        An `ExplanationPlan`: `describe()` tells what it takes, `run()` does it and returns the `Influence`.

    Raises:
        ValueError: As `explain` does, but for a result that does not fit into memory, which `describe()` tells of and
            `run()` refuses.

    Example:
        >>> import torch
        >>> from explaind_track import Query, StepObserver, plan_explanation
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> observer, steps = StepObserver(optimizer, dict(model.named_parameters())), []
        >>> for number in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     observer.before(buffers={})
        ...     optimizer.step()
        ...     steps.append(observer.lasting(observer.after(number, buffers={})))
        >>> plan = plan_explanation(steps, model, Query.outputs(torch.ones(4, 3)), keep=("step", "group", "query"))
        >>> plan.shape
        {'part': 2, 'step': 5, 'group': 2, 'query': 4}
        >>> print(plan.describe())  # doctest: +ELLIPSIS
        influences: 2 part × 5 step × 2 group × 4 query, 0.0 MB
        work:       5 steps in 1 pass(es), with about 268 MB
        mode:       forward mode
        time:       about ... s
        >>> influence = plan.run()
    """
    source = StepSource.of(steps, model, window)
    require_query(query)
    require_quadrature(quadrature)
    if accuracy is not None:
        if quadrature is not None:
            raise ValueError("accuracy= and quadrature= both say how finely steps are integrated: pass one of them")
        quadrature = Quadrature.of(accuracy)
    keep = require_names("keep=", keep, "axis", some=False)
    parts = None if parts is None else require_names("parts=", parts, "part")
    memory = require_int("memory= (bytes)", memory, 1)
    resolved = resolve_groups(groups, model)
    if not {"sample", "seen"} & set(keep):
        make = partial(Explainer, model, query, resolved, [keep], parts, quadrature, close, memory)
        return GroupPlan(source, make, memory, progress, out)

    if close:
        raise ValueError("close= shares the remainder out over parts and groups, not over samples")
    if parts is not None and tuple(parts) != ("kernel",):
        raise ValueError(f"samples act through the kernel part alone; parts={tuple(parts)} cannot be kept with them")
    if sample_loss is None:
        raise ValueError("influences of samples need sample_loss=: (model, batch) → unreduced losses (N,)")
    require_callable("sample_loss=", sample_loss, "(model, batch) → unreduced losses (N,)")
    query = fitted_query(model, query)
    whole = source.repeatable()
    chosen = choose_samples(whole, sample_loss, data, samples, partition)
    return SamplePlan(whole, model, query, resolved, keep, chosen, quadrature, memory, progress, out)
