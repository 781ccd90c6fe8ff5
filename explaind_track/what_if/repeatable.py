"""What a record lacks for its steps to be taken again: said before any work."""

from explaind_track.explanation.sample_axis import Data
from explaind_track.record.schema import StepRecord
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.retraining import records
from explaind_track.what_if.step_gradients import AuxiliaryLosses


def require_repeatable(
    trajectory: Trajectory, start: int, stop: int, data: Data | None, auxiliary: AuxiliaryLosses, changed: bool
) -> set[int]:
    """The training samples of the steps start ≤ s < stop, by the numbers that stand for them.

    changed: whether the run would be another one, in which things from outside would not have been as they were.

    Raises ValueError where these steps cannot be taken again.
    """
    seen: set[int] = set()
    for number, record in enumerate(records(trajectory, start, stop), start):
        _require_step(number, record, data, auxiliary)
        for batch in record.batches:
            seen |= set() if batch.index is None else set(batch.index.tolist())

    replaced = [n for n in range(start + 1, stop) if trajectory.keyframe(n) == n and trajectory.is_replaced(n)]
    if replaced:
        raise ValueError(
            f"before step {replaced[0]} the optimizer's state was replaced by something other than its steps, which no "
            f"record can do again; begin there or later, or end there"
        )

    outside = sorted(number for number in _from_outside(trajectory) if start < number <= stop)
    if changed and outside:
        raise ValueError(
            f"something other than the optimizer changed the model before {len(outside)} of these steps (step "
            f"{outside[0]} is the first), and what it would have done to another run is not recorded; choose steps "
            "such that there are none after the first"
        )
    return seen


def _require_step(number: int, record: StepRecord, data: Data | None, auxiliary: AuxiliaryLosses) -> None:
    """Raises ValueError unless the gradient of step `number` can be computed again."""
    lacking = [loss for loss in record.auxiliary if loss not in auxiliary]
    if lacking:
        raise ValueError(f"the run had auxiliary losses, {lacking}: pass auxiliary=, as the Tracker was given it")
    if record.moved and not record.batches:
        raise ValueError(
            f"step {number} has no record of its batches; in training, call tracker.batch(batch, index=…) for each"
        )

    for batch in record.batches:
        if batch.data is None and data is None:
            raise ValueError(
                f"the record holds the indices of step {number}'s samples but not the samples; pass data=, a function "
                "from an index tensor (N,) to the batch of sample_loss, such as lambda index: (x[index], y[index])"
            )
        unknown = batch.clipped and batch.altered is None
        if unknown or (batch.altered and any(one.kind == "other" for one in batch.altered.changes)):
            raise ValueError(
                f"the loop altered the gradient of step {number} in a way that is not recorded, so that the step "
                "cannot be taken again; clip by tracker.clip_grad_norm_ or tracker.clip_grad_value_"
            )


def _from_outside(trajectory: Trajectory) -> set[int]:
    """The steps before which something other than the optimizer changed the model."""
    names = (name for entry in trajectory.segments for name in trajectory.read(entry).names)
    return {int(name.split(":")[1]) for name in names if name.startswith("outside:")}
