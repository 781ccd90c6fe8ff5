"""Trains a recorded run again from one of its steps, with one thing or several done otherwise."""

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from explaind_track.core.checks import require_callable, require_instance, require_int, require_window
from explaind_track.core.faithfulness import faithfulness
from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.queries import Query
from explaind_track.core.step import State
from explaind_track.core.tensors import cuts
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.targets import fitted_query, target_of
from explaind_track.errors import RerunWarning
from explaind_track.explanation.sample_axis import Data
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.changes import Change
from explaind_track.what_if.recomputed import with_gradients
from explaind_track.what_if.recording import Recording
from explaind_track.what_if.repeatable import require_repeatable
from explaind_track.what_if.retraining import Proof, Retraining, records
from explaind_track.what_if.step_gradients import AuxiliaryLosses

INPUTS_AT_ONCE = 256


def rerun(
    trajectory: Trajectory,
    model: nn.Module,
    sample_loss: SampleLoss,
    data: Data | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    change: Change | Iterable[Change] = (),
    auxiliary: AuxiliaryLosses | None = None,
    out: str | PathLike[str] | None = None,
    progress: bool = True,
) -> "Rerun":
    """Trains a recorded run again from step `start`, with the recorded batches, weights, random states, rates and
    optimizer, and with some things done otherwise.

    Where nothing is changed it proves itself: each step's gradient, and the state at each keyframe, are those of the
    run bit for bit on the same machine with as many threads; what is not, a RerunWarning tells, and from which step.

    Args:
        trajectory: The record.
        model: The module that was trained, in the mode that it was trained in; its own values are not touched.
        sample_loss: `(model, batch)` → unreduced losses (N,).
        data: From an index tensor (N,) to the batch that `sample_loss` takes; not needed where the trajectory holds
            the batches themselves.
        start: The step to begin with.
        stop: The step to end before; None: where the record ends.
        change: What is done otherwise: one or several of `explaind_track.what_if`, or a `Change` of your own.
        auxiliary: The auxiliary losses of the run, as the Tracker was given them.
        out: A new or empty directory for the record of the rerun; None: only where it ends is kept.
        progress: False: show no bar.

    Returns:
        A `Rerun`.

    Raises:
        TypeError, ValueError: Before any work, for arguments that are not what they should be, and for steps that
            cannot be taken again: without batches, with a gradient that the loop altered in an unknown way, or, if
            something is changed, where something other than the optimizer moved the weights.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Tracker, Trajectory, rerun
        >>> from explaind_track.what_if import Reweighted
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
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
        ...     trajectory, data = Trajectory.open(directory), lambda index: (x[index], y[index])
        ...     same = rerun(trajectory, model, loss, data, progress=False)
        ...     without = rerun(trajectory, model, loss, data, change=Reweighted.without([2]), progress=False)
        >>> same.proof.exact, torch.equal(same.state_dict()["weight"], model.weight)
        (True, True)
        >>> torch.equal(without.state_dict()["weight"], model.weight)
        False
    """
    require_instance("the trajectory", trajectory, Trajectory, "write Trajectory.open(directory)")
    trajectory.check_model(model)
    require_callable("sample_loss=", sample_loss, "(model, batch) → unreduced losses (N,)")
    changes = (change,) if isinstance(change, Change) else tuple(change)
    for one in changes:
        require_instance("each change=", one, Change, "see explaind_track.what_if")
    start = require_int("start=", start, 0)
    stop = len(trajectory) if stop is None else require_int("stop=", stop, 0)
    if not start < stop <= len(trajectory):
        raise ValueError(f"start={start}, stop={stop}: the record has the steps 0 to {len(trajectory)}")
    seen = require_repeatable(trajectory, start, stop, data, auxiliary or {}, bool(changes))
    _check_changes(trajectory, start, stop, changes, seen)

    trajectory = with_gradients(trajectory, model, sample_loss, data, auxiliary)
    retraining = Retraining(trajectory, model, sample_loss, data, auxiliary or {}, changes, start)
    recording = None if out is None else Recording(trajectory, retraining.replay, changes, Path(out))
    with tqdm(total=stop - start, desc="rerun", unit="step", disable=not progress) as bar:
        for step, record in retraining.steps(stop, (lambda _: None) if recording is None else recording.begin):
            if recording is not None:
                recording.record(step, dict(record.auxiliary))
            bar.update()

    if not retraining.proof.exact:
        _warn(retraining.proof)
    own = None if recording is None else recording.close()
    return Rerun(trajectory, model, start, stop, changes, retraining.proof, retraining.state.copy(), own)


@dataclass(frozen=True)
class Rerun:
    """A run that was trained again.

    Example:
        >>> from explaind_track import Rerun
        >>> Rerun.compare.__doc__.split(".")[0]
        'Compares the rerun with the run, where it ended or at some steps'
    """

    original: Trajectory
    """The run."""
    model: nn.Module
    """The module, whose own values do not matter."""
    start: int
    """Its first step."""
    stop: int
    """The step that it ends before."""
    changes: tuple[Change, ...]
    """What was done otherwise."""
    proof: Proof
    """How far it is the run, where nothing was changed."""
    state: State
    """Where it ended."""
    trajectory: Trajectory | None
    """Its record, which begins as that of the run: for `explain` and all else. Its manifest's head has the `lineage`.
    None without `out=`."""

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state where the rerun ended, as `load_state_dict` takes it."""
        head, tensors = self.original.manifest.head, {**self.state.parameters, **self.state.buffers}
        tensors |= {name: tensors[first] for name, first in head["aliases"].items()}
        return {name: tensors[name] for name in head["saved"]}

    def compare(self, query: Query, groups: GroupSpec = None, steps: Sequence[int] | None = None) -> xr.Dataset:
        """Compares the rerun with the run, where it ended or at some steps.

        Args:
            query: X inputs, and what is asked of the model for them.
            groups: See `resolve_groups`.
            steps: Before which steps, for a rerun with a record; None: where it ended.

        Returns:
            By step: `value` (run, query, output), the targets of the original and the rerun; `loss` and `accuracy`
            (run) where the query tells them; `agreement` and `kl` of the outputs where they score classes; `distance`
            (group), ‖θ' − θ‖₂, and `relative_distance`, divided by ‖θ − θ_start‖₂.

        Raises:
            ValueError: Steps are asked for, and there is no record.
        """
        if steps is not None and self.trajectory is None:
            raise ValueError("a rerun without a record only knows where it ended: pass out= to rerun")
        query = fitted_query(self.model, query)
        names = resolve_groups(groups, self.model)
        found = [self._at(step, query, names) for step in ([self.stop] if steps is None else steps)]
        return xr.concat(found, "step")

    def _at(self, step: int, query: Query, groups: dict[str, tuple[str, ...]]) -> xr.Dataset:
        start, run = (_state(self.original, number) for number in (self.start, step))
        own = self.state if step == self.stop or self.trajectory is None else _state(self.trajectory, step)
        values = torch.stack([targets_at(self.model, query, state) for state in (run, own)])

        found: dict[str, Any] = {"value": (("run", "query", "output"), values.numpy())}
        if query.is_loss:
            found["loss"] = ("run", values.mean((1, 2)).numpy())
        elif query.is_classified and query.reduction is None:
            y = query.labels[0].cpu()
            found["loss"] = ("run", [float(nn.functional.cross_entropy(one, y)) for one in values])
            found["accuracy"] = ("run", [float((one.argmax(-1) == y).double().mean()) for one in values])
        if query.is_classified:
            found |= {name: ((), value) for name, value in faithfulness(*values).items()}

        distance, way = _distances(own, run, groups), _distances(run, start, groups)
        found["distance"] = ("group", distance)
        found["relative_distance"] = (
            "group",
            [d / w if w else float("nan") for d, w in zip(distance, way, strict=True)],
        )
        return xr.Dataset(found, {"run": ["original", "rerun"], "group": list(groups), "step": step})


def _check_changes(
    trajectory: Trajectory, start: int, stop: int, changes: Sequence[Change], seen: Collection[int]
) -> None:
    """Raises ValueError for changes that cannot be made, and for those that would be made in no step."""
    shapes = {name: tuple(shape) for name, (shape, _) in trajectory.manifest.head["parameters"].items()}
    for change in changes:
        if change.window is not None:
            require_window(change.window)
        change.check(shapes, seen)

    idle = list(changes)
    for number, record in enumerate(records(trajectory, start, stop), start):
        idle = [change for change in idle if not change.acts(number, record.batches)]
        if not idle:
            return
    if idle:
        raise ValueError(f"{idle[0]!r} would change none of the steps {start} to {stop - 1}")


def _distances(one: State, two: State, groups: dict[str, tuple[str, ...]]) -> list[float]:
    """‖θ − θ'‖₂ of each group."""
    squares = {n: float((p - two.parameters[n]).double().square().sum()) for n, p in one.parameters.items()}
    return [sum(squares[name] for name in names) ** 0.5 for names in groups.values()]


def _state(trajectory: Trajectory, step: int) -> State:
    replay = trajectory.replay(step)
    return State({name: p.detach() for name, p in replay.parameters.items()}, replay.buffers)


def targets_at(model: nn.Module, query: Query, state: State) -> Tensor:
    """The query's targets, (X, O)."""
    device = next(iter(state.parameters.values())).device
    functional, upcast = Functional(model), state.upcast()
    chunks = [query.rows(part.start, part.stop, device) for part in cuts(0, query.size, INPUTS_AT_ONCE)]
    with evaluation(model):
        pieces = [functional.value(upcast, target_of(query, chunk)).flatten(1).cpu() for chunk in chunks]
    return torch.stack(pieces).sum(0) if query.reduction else torch.cat(pieces)


def _warn(proof: Proof) -> None:
    warnings.warn(
        f"trained again with nothing changed, the run has other bits from step {proof.first_other} on (at most "
        f"{proof.off:.1e} off, of a gradient's or the state's norm). Another machine, thread count or version of torch "
        "rounds otherwise, and so does a loop that sums its losses in another way than Σ_k w_k L_k over each batch "
        "(tracker.backward(), several processes); or sample_loss, data, auxiliary= or the model's mode are not those "
        "of the run, if it is far off",
        RerunWarning,
        stacklevel=3,
    )
