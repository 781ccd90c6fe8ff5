"""A record without gradients, as if it had them: they are computed again, and proved by their hashes."""

import warnings
from dataclasses import replace

from torch import nn

from explaind_track.core.checks import require_callable, require_instance
from explaind_track.core.step import State
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.errors import RerunWarning
from explaind_track.explanation.sample_axis import Data
from explaind_track.record.files import tensors_sha256
from explaind_track.record.replay import Replay
from explaind_track.record.schema import StepRecord
from explaind_track.record.signatures import environment
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.repeatable import require_repeatable
from explaind_track.what_if.step_gradients import AuxiliaryLosses, StepGradients


def with_gradients(
    trajectory: Trajectory,
    model: nn.Module,
    sample_loss: SampleLoss,
    data: Data | None = None,
    auxiliary: AuxiliaryLosses | None = None,
) -> Trajectory:
    """Gives a record that `Tracker(record="batches")` wrote its gradients back: each is computed again where it is
    asked for, at the cost of a training step, and compared with the hash of the one that the optimizer saw.

    On the same machine, with as many threads and the same torch, `explain` and everything else give from it what they
    give from a record of gradients, bit for bit. Elsewhere, a RerunWarning tells from which step on other bits came;
    the keyframes are the run's all the same, replays go on from each of them, and stop with a TrajectoryError where
    they miss one by more than rounding.

    Args:
        trajectory: The record.
        model: The module that was trained, in the mode that it was trained in; its own values are not touched.
        sample_loss: `(model, batch)` → unreduced losses (N,).
        data: From an index tensor (N,) to the batch that `sample_loss` takes; not needed where the trajectory holds
            the batches themselves.
        auxiliary: The auxiliary losses of the run, as the Tracker was given them.

    Returns:
        The same record, able to take its steps. A record that has gradients is given back as it is.

    Raises:
        ValueError: The model is not the one recorded; samples or auxiliary losses are missing.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Tracker, Trajectory, with_gradients
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory, record="batches")
        ...     for _ in range(3):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x, y), index=range(8))
        ...             loss(model, (x, y)).mean().backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     recorded = Trajectory.open(directory)
        ...     trajectory = with_gradients(recorded, model, loss, lambda index: (x[index], y[index]))
        ...     [step.number for step in trajectory.steps()]
        [0, 1, 2]
    """
    require_instance("the trajectory", trajectory, Trajectory, "write Trajectory.open(directory)")
    trajectory.check_model(model)
    require_callable("sample_loss=", sample_loss, "(model, batch) → unreduced losses (N,)")
    if trajectory.manifest.head.get("record") != "batches":
        return trajectory
    require_repeatable(trajectory, 0, len(trajectory), data, auxiliary or {}, changed=False)

    order = list(trajectory.manifest.head["parameters"])
    gradients = StepGradients(model, sample_loss, data, auxiliary or {}, order)
    return trajectory.computing(Recomputation(gradients, trajectory))


class Recomputation:
    """Gives a step's record its gradients."""

    def __init__(self, gradients: StepGradients, trajectory: Trajectory) -> None:
        self._gradients, self._head = gradients, trajectory.manifest.head
        self._warned = False

    def __call__(self, replay: Replay, record: StepRecord) -> StepRecord:
        """As the replay is about to take the step."""
        assert record.hashed is not None  # only then is it asked for
        found = self._gradients.at(State(replay.parameters, replay.buffers), record, record.batches)
        if tensors_sha256(found.gradients) != record.hashed.sha256 and not self._warned:
            self._warned = True
            self._warn(replay.number)
        return replace(record, gradients=found.gradients, auxiliary=found.auxiliary, hashed=None)

    def _warn(self, number: int) -> None:
        here = environment()
        then = {**here, **self._head.get("environment", {})}
        told = "; ".join(f"{key} {then[key]}, here {here[key]}" for key in here if then[key] != here[key])
        warnings.warn(
            f"from step {number} on, the gradients that are computed again have other bits than the run's "
            f"({told or 'no difference of the machines is known'}). Steps up to the next keyframe go by these, and "
            "from each keyframe on by the run's own state, which tells how far off they were. A loop that sums its "
            "losses in another way than Σ_k w_k L_k over each batch does so too (tracker.backward(), several "
            "processes); or sample_loss, data, auxiliary= or the model's mode are not those of the run",
            RerunWarning,
            stacklevel=6,
        )
