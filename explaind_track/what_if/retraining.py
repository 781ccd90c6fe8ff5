"""The run, trained again: each step's gradient computed anew from its batches, and the optimizer's own step with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.step import Batch, State, Step
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.explanation.sample_axis import Data
from explaind_track.record.files import tensors_sha256
from explaind_track.record.replay import Replay
from explaind_track.record.schema import Settings, StepRecord, checkpoint_tensors
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.changes import Change
from explaind_track.what_if.step_gradients import AuxiliaryLosses, StepGradients


@dataclass
class Proof:
    """How far the rerun is the run, where nothing is changed."""

    keyframes: list[int] = field(default_factory=list)
    """Those that it has met, bit for bit."""
    first_other: int | None = None
    """The first step whose gradient has other bits than the run's; None: none has."""
    off: float = 0.0
    """The largest difference of a step's gradient, or of the state at a keyframe, of its norm."""

    @property
    def exact(self) -> bool:
        """Whether all that was compared is the same bit for bit."""
        return self.first_other is None


class Retraining:
    """A run that is trained again from a step on, with some things changed."""

    def __init__(
        self,
        trajectory: Trajectory,
        model: nn.Module,
        sample_loss: SampleLoss,
        data: Data | None,
        auxiliary: AuxiliaryLosses,
        changes: Sequence[Change],
        start: int,
    ) -> None:
        order = list(trajectory.manifest.head["parameters"])
        self._gradients = StepGradients(model, sample_loss, data, auxiliary, order)
        self._trajectory, self._changes = trajectory, changes
        self._keyframes = {entry.first for entry in trajectory.manifest.entries if entry.is_keyframe}
        self._own_settings = any(type(change).settings is not Change.settings for change in changes)

        self.replay: Replay = trajectory.replay(start)
        """Holds parameters, buffers and the optimizer."""
        self.changed = False
        """Whether anything has been changed so far."""
        self.proof = Proof()
        if self._own_settings:  # which may differ between parameters of one group
            groups = self.replay.optimizer.param_groups
            groups[:] = [{**group, "params": [p]} for group in groups for p in group["params"]]

    @property
    def state(self) -> State:
        """The model as it is now."""
        return State({name: p.detach() for name, p in self.replay.parameters.items()}, self.replay.buffers)

    def steps(self, stop: int, begun: Callable[[int], None] = lambda number: None) -> Iterator[tuple[Step, StepRecord]]:
        """Takes the steps up to `stop`, each with what it was made of; it is valid until the next is asked for.

        begun: called with the number of each step as it begins.
        """
        for recorded in records(self._trajectory, self.replay.number, stop):
            number = self.replay.number
            acting = [change for change in self._changes if change.acts(number, recorded.batches)]
            self.changed |= bool(acting)

            # what comes before the forward pass
            self.replay.change(recorded.outside)
            self._prove_at_keyframe()
            with torch.no_grad():
                for change in acting:
                    change.begin(number, self.replay.parameters)
            begun(number)

            # the step
            record = self._anew(recorded, acting)
            step = self.replay.take(record)
            yield step, record

            # what comes behind it: to the observer, something from outside
            after = self._behind(step, acting)
            self.replay.settle()
            self.replay.change(State(after, {}))

        if not self.changed:
            self.replay.change(self._trajectory.outside(stop))
        self._prove_at_keyframe()

    def _behind(self, step: Step, acting: Sequence[Change]) -> dict[str, Tensor]:
        changes = [change for change in acting if type(change).end is not Change.end]
        if not changes:
            return {}
        parameters = {name: p.detach().clone() for name, p in self.replay.parameters.items()}
        with torch.no_grad():
            for change in changes:
                change.end(step, parameters)
        return parameters

    def _anew(self, record: StepRecord, acting: Sequence[Change]) -> StepRecord:
        """The step's record with everything in it that follows from where the parameters are now."""
        batches = [_weighted(batch, acting) for batch in record.batches]
        found = self._gradients.at(State(self.replay.parameters, self.replay.buffers), record, batches)
        if not self.changed:
            self._compare(found.gradients, record)
        for change in acting:
            change.gradients(self.replay.number, found.gradients)
        settings = record.settings if not self._own_settings else list(_by_parameter(record.settings, acting))
        return replace(
            record, settings=settings, gradients=found.gradients, auxiliary=found.auxiliary, buffers=found.buffers,
            batches=found.batches, outside=State({}, {}), hashed=None,
        )  # fmt: skip

    # ------------------------------------------------- the proof

    def _compare(self, gradients: Tensors, record: StepRecord) -> None:
        """Notes where a gradient is not that of the run."""
        if record.hashed is not None:
            if tensors_sha256(gradients) != record.hashed.sha256 and self.proof.first_other is None:
                self.proof.first_other = self.replay.number  # by how much, the next keyframe tells
            return
        run = record.gradients.items()
        self._note({name: (gradients[name], value) for name, value in run if not same_bits(gradients[name], value)})

    def _prove_at_keyframe(self) -> None:
        """Compares parameters, buffers and the optimizer's state with the run's, as long as nothing is changed."""
        number = self.replay.number
        if self.changed or number not in self._keyframes:
            return
        wanted = self._trajectory.replay(number)
        found = checkpoint_tensors(self.replay.observer, self.state)
        run = checkpoint_tensors(wanted.observer, State(wanted.parameters, wanted.buffers))
        other = {n: (found[n], value) for n, value in run.items() if not same_bits(found[n], value)}
        self._note(other)
        if not other:
            self.proof.keyframes.append(number)

    def _note(self, other: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        if not other:
            return
        if self.proof.first_other is None:
            self.proof.first_other = self.replay.number
        off = sum(float((one.double() - two.double()).square().sum()) for one, two in other.values()) ** 0.5
        size = sum(float(two.double().square().sum()) for _, two in other.values()) ** 0.5
        self.proof.off = max(self.proof.off, off / max(size, 1e-300))


def records(trajectory: Trajectory, first: int, last: int) -> Iterator[StepRecord]:
    """What the run has recorded of the steps first ≤ s < last."""
    for entry in trajectory.segments:
        if entry.last > first and entry.first < last:
            yield from trajectory.read_segment(entry).records(first, last)


def _weighted(batch: Batch, acting: Sequence[Change]) -> Batch:
    """The batch with its samples' weights in the loss as the changes have them."""
    for change in acting:
        factors = change.factors(batch)
        if factors is None:
            continue
        if batch.altered is None:
            batch = replace(batch, weight=factors * batch.weight)
        else:
            batch = replace(batch, altered=replace(batch.altered, loss_weight=factors * batch.altered.loss_weight))
    return batch


def _by_parameter(settings: Settings, acting: Sequence[Change]) -> Iterator[dict[str, Any]]:
    """The optimizer's settings with a group for each parameter, as the changes have them."""
    for group in settings:
        for name in group["params"]:
            own = {**group, "params": [name]}
            for change in acting:
                change.settings(name, own)
            yield own
