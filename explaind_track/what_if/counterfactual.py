"""The exact derivative of where a run ended with respect to its samples' weights, rates, decays and beginning."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, TypedDict, Unpack

from torch import nn

from explaind_track.core.checks import require_callable, require_instance, require_int, require_names
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query, require_query
from explaind_track.core.tensors import low_precision
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.targets import fitted_query
from explaind_track.explanation.sample_axis import Data, choose_samples
from explaind_track.explanation.step_source import StepSource, Window
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.counterfactual_plan import AXES, CounterfactualPlan
from explaind_track.what_if.optimizer_steps import require_differentiable
from explaind_track.what_if.recomputed import with_gradients
from explaind_track.what_if.repeatable import require_repeatable
from explaind_track.what_if.step_gradients import AuxiliaryLosses


class CounterfactualOptions(TypedDict, total=False):
    """What can be said to `counterfactual` and `plan_counterfactual` beside trajectory, model and query."""

    sample_loss: SampleLoss
    data: Data | None
    keep: Sequence[str]
    window: Window | None
    samples: Iterable[int | str] | None
    partition: Any
    auxiliary: AuxiliaryLosses | None
    initial: bool
    memory: int
    progress: bool
    out: str | PathLike[str] | None


def counterfactual(
    trajectory: Trajectory, model: nn.Module, query: Query, **options: Unpack[CounterfactualOptions]
) -> Influence:
    """Differentiates where a run ended by its samples' weights, exactly, through the whole of training.

    With a factor w_k on sample k's loss wherever it was seen, 1 in the run, `effect` is ∂f(θ_N)/∂w_k: what a query's
    target would gain per unit of more of that sample. Leaving the sample out changes the target by about −effect, as
    far as training is smooth: `smoothness` measures how far. It is no part of the split that `explain` gives: that one
    tells what samples did in this run (Ψ, which is subtracted), this one what would be otherwise (effects, which add).

    The adjoint of the targets is carried back over the recorded steps, through the optimizer's own arithmetic with all
    its state, through clipping, and through one Hessian-vector product a step and target (Engstrom et al. 2025; Ilyas
    and Engstrom 2025). Under `torchrun`, the targets are shared out.

    Args:
        trajectory: The record.
        model: The module that was trained, in the mode that it was trained in; its own values are not touched.
        query: Whose targets are differentiated: X inputs (or one reduction of them) with O outputs each.
        sample_loss: `(model, batch)` → unreduced losses (N,); has to be given.
        data: From an index tensor (N,) to the batch that `sample_loss` takes; not needed where the trajectory holds
            the batches themselves.
        keep: Some of "seen", "query", "output" and "sample", ("query", "sample") if not given; all other axes are
            summed over. "seen" is the step in whose batch the sample was.
        window: `(first, last)`: the factors count in the steps first ≤ s < last only; None: in all.
        samples: The training indices asked for; None: all.
        partition: `partition[index]` is the label of the part that a sample is in; parts take the samples' place.
        auxiliary: The auxiliary losses of the run, as the Tracker was given them.
        initial: Whether to give the derivatives by every parameter at the window's beginning, too: a copy of the
            parameters for each target.
        memory: Bytes one pass may take (2**28 if not given): how many targets go together.
        progress: False: show no bar.
        out: A directory for a result that is larger than the memory, where an interrupted call goes on when it is made
            again. `open_influence` opens it later.

    Returns:
        An `Influence` whose `data` has `effect` over the axes kept; `rate` and `decay` (step, settings, query, output),
        the derivatives by the learning rate and the weight decay of each of the optimizer's groups in each step;
        `initial:NAME`, if asked for; and `mismatch` (walked), by how much each step's samples miss the gradient which
        the optimizer saw: a SampleMismatchWarning warns where that is no rounding.

    Raises:
        TypeError: For an optimizer whose step cannot be differentiated; see `what_if.differentiable_step`.
        ValueError: Before any work, for steps that cannot be taken again, parameters in bfloat16 or float16, running
            statistics that moved, and steps between which something other than the optimizer changed the weights.
        UnexplainedUpdateError: The differentiable step of an optimizer does not do what that did.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory, counterfactual
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for index in torch.arange(8).repeat(2).split(4):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x[index], y[index]), index=index)
        ...             loss(model, (x[index], y[index])).mean().backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     found = counterfactual(
        ...         Trajectory.open(directory), model, Query.loss(x[:3], y[:3]), sample_loss=loss,
        ...         data=lambda index: (x[index], y[index]), progress=False,
        ...     )
        >>> dict(found.data["effect"].sizes), dict(found.data["rate"].sizes)
        ({'query': 3, 'sample': 8}, {'step': 4, 'settings': 1, 'query': 3})
    """
    return plan_counterfactual(trajectory, model, query, **options).run()


def plan_counterfactual(
    trajectory: Trajectory,
    model: nn.Module,
    query: Query,
    *,
    sample_loss: SampleLoss | None = None,
    data: Data | None = None,
    keep: Sequence[str] = ("query", "sample"),
    window: Window | None = None,
    samples: Iterable[int | str] | None = None,
    partition: Any = None,
    auxiliary: AuxiliaryLosses | None = None,
    initial: bool = False,
    memory: int = MEMORY,
    progress: bool = True,
    out: str | PathLike[str] | None = None,
) -> CounterfactualPlan:
    """Plans what `counterfactual` computes at once, with the same arguments.

    Returns:
        A plan: `describe()` tells what it takes, `run()` does it and returns the `Influence`.

    Raises:
        TypeError, ValueError: As `counterfactual` does.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory
        >>> from explaind_track.what_if import plan_counterfactual
        >>> model, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: model(batch).square().mean(1)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     with tracker.step():
        ...         tracker.batch(x, index=range(4))
        ...         loss(model, x).mean().backward()
        ...         optimizer.step()
        ...     tracker.finish()
        ...     trajectory, query = Trajectory.open(directory), Query.outputs(x)
        ...     plan = plan_counterfactual(trajectory, model, query, sample_loss=loss, data=lambda index: x[index])
        ...     print(plan.describe())  # doctest: +ELLIPSIS
        influences: 4 query × 4 sample, 0.0 MB
        work:       1 steps in 1 pass(es), with about ... MB
        mode:       reverse, an adjoint and a Hessian-vector product for each target
        time:       about ... s
    """
    require_instance("the trajectory", trajectory, Trajectory, "write Trajectory.open(directory)")
    trajectory.check_model(model)
    if sample_loss is not None:
        trajectory = with_gradients(trajectory, model, sample_loss, data, auxiliary)
    source = StepSource.of(trajectory, model, window).repeatable()
    require_query(query)
    if sample_loss is None:
        raise ValueError("effects of samples need sample_loss=: (model, batch) → unreduced losses (N,)")
    require_callable("sample_loss=", sample_loss, "(model, batch) → unreduced losses (N,)")
    keep = require_names("keep=", keep, "axis", some=False)
    if set(keep) - set(AXES):
        raise ValueError(f"keep takes some of {AXES}, got {tuple(keep)}")
    memory = require_int("memory= (bytes)", memory, 1)

    if low_precision(trajectory.replay(0).parameters) is not None:
        raise ValueError(
            "training in bfloat16 or float16 is a chain of roundings, which has no derivative; train in float32, under "
            "autocast if need be, or change the run and take it again: explaind_track.rerun"
        )
    require_differentiable(trajectory.replay(0).optimizer)
    query = fitted_query(model, query)
    chosen = choose_samples(source, sample_loss, data, samples, partition)
    require_repeatable(trajectory, source.first, len(trajectory), data, auxiliary or {}, changed=True)
    return CounterfactualPlan(
        trajectory, source, model, query, keep, chosen, auxiliary or {}, initial, memory, progress, out
    )
