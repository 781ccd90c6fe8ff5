"""Replays a recorded run: the optimizer takes its steps again, and keyframes prove that they are the same."""

import warnings

import torch
from torch import Tensor, nn

from explaind_track.core.observer import StepObserver
from explaind_track.core.rules import update_rule
from explaind_track.core.step import State, Step
from explaind_track.core.tensors import Tensors, low_precision, same_bits, upcast
from explaind_track.errors import ReplayWarning, TrajectoryError
from explaind_track.record.schema import Keyframe, StepRecord, checkpoint_tensors, groups_of, qualified, share_tensors
from explaind_track.record.signatures import refuse_other_shapes, refuse_spreading

REPLAY_TOLERANCE = 1e-4
"""What other bits may differ by, of the norm; in bfloat16 and float16 an eps of theirs, by which a number moves where
it is rounded to the other side."""


class Replay:
    """The optimizer of the run, taking its steps again. Begins at a keyframe, the one before step `number`."""

    def __init__(self, optimizer: str, number: int, keyframe: Keyframe) -> None:
        """optimizer: its class, by its qualified name. Raises TrajectoryError if no rule is registered for that."""
        classes = _known_optimizers()
        if optimizer not in classes:
            raise TrajectoryError(
                f"the run was trained by {optimizer}, which has no update rule here; import and register it first "
                f"(there are rules for {', '.join(sorted(classes))})"
            )
        self._class = classes[optimizer]
        self.number = number
        """The step that comes next."""
        self._start(keyframe)

    def _start(self, keyframe: Keyframe) -> None:
        self.parameters = {name: nn.Parameter(value) for name, value in keyframe.parameters.items()}
        self.buffers: Tensors = dict(keyframe.buffers)
        self.optimizer: torch.optim.Optimizer = self._class(groups_of(keyframe.settings, self.parameters))  # type: ignore[call-arg]
        for name, state in keyframe.optimizer_state().items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    refuse_spreading(value, self.parameters[name], f"the optimizer's {key!r} of {name!r}")
            self.optimizer.state[self.parameters[name]] = state

        self.observer = StepObserver(self.optimizer, self.parameters)
        shares = keyframe.shares()
        for part, tensors in shares.items():
            refuse_other_shapes(tensors, self.parameters, f"the share {part!r}")
        self.observer.adopt(shares)
        self.observer.begin(self.buffers)

    @torch.no_grad()
    def change(self, outside: State) -> None:
        """Changes the model as something other than the optimizer did, before the next step."""
        refuse_other_shapes(outside.parameters, self.parameters, "a change from outside")
        for name, value in outside.parameters.items():
            self.parameters[name].copy_(value)
        self.buffers = {**self.buffers, **outside.buffers}

    def take(self, record: StepRecord) -> Step:
        """Takes the next step from what the run has recorded of it. The step is valid until `settle`."""
        self.optimizer.param_groups = groups_of(record.settings, self.parameters)
        for name, parameter in self.parameters.items():
            parameter.grad = record.gradients.get(name)
            parameter.requires_grad_(name not in record.frozen)

        for loss, gradients in record.auxiliary.items():
            refuse_other_shapes(gradients, self.parameters, f"the gradient by {loss!r}")
        self.change(record.outside)

        # the buffers move in the forward pass, which is not taken again
        buffers = {**self.buffers, **record.buffers}
        self.observer.before(self.buffers, record.auxiliary)
        self.optimizer.step()
        step = self.observer.after(self.number, buffers, record.batches)
        self.buffers = buffers
        return step

    def settle(self) -> None:
        """Ends the validity of the step that was taken, and goes on to the next."""
        self.observer.settle()
        self.number += 1

    def closing(self) -> Step | None:
        """Behind the last step: what has changed the model since, if anything has; valid until the next one."""
        return self.observer.closing(self.number, self.buffers)

    def meet(self, keyframe: Keyframe) -> None:
        """Goes on from the keyframe before the next step. It proves the steps up to here, if it follows from them.

        Raises TrajectoryError if it shows that they are not those of the run.
        """
        if keyframe.continues:
            self._prove(keyframe)
            return

        watched = self.observer
        self._start(keyframe)
        shares = self.observer.momentum_shares
        self.observer.go_on(watched, self.buffers)
        self.observer.adopt(shares)

    def _prove(self, keyframe: Keyframe) -> None:
        """Compares everything with the keyframe, bit for bit.

        Other bits but the same numbers (to `REPLAY_TOLERANCE`, as another machine may give them) are told of by a
        ReplayWarning; other numbers raise TrajectoryError.
        """
        found = checkpoint_tensors(self.observer, State(self.parameters, self.buffers)) | share_tensors(self.observer)
        if keyframe.state_names() != found.keys():
            raise TrajectoryError(f"the replay up to step {self.number} has not the tensors of the keyframe there")
        other: dict[str, Tensor] = {}
        for name, value in found.items():
            recorded = keyframe[name]
            if not same_bits(recorded, value):
                other[name] = recorded
        if not other:
            return

        error = max(_relative_error(found[name], recorded) for name, recorded in other.items())
        coarsest = low_precision(other)
        if not error <= (REPLAY_TOLERANCE if coarsest is None else torch.finfo(coarsest).eps):
            raise TrajectoryError(
                f"the replay up to step {self.number} is off by {error:.1e} (of the norm) from the keyframe there, in "
                f"{', '.join(sorted(other)[:5])}; the run must have done something between its steps that was not "
                "seen"
            )
        warnings.warn(
            f"the replay up to step {self.number} has other bits than the run had (off by {error:.1e}), as another "
            "machine or version of torch may give; it goes on from the keyframe",
            ReplayWarning,
            stacklevel=2,
        )
        with torch.no_grad():
            for name, recorded in other.items():
                found[name].copy_(recorded)
        self.observer.restart(self.buffers)


def _relative_error(found: Tensor, recorded: Tensor) -> float:
    found, recorded = upcast(found), upcast(recorded)
    return float((found - recorded).norm() / recorded.norm().clamp(min=1e-30))


def _known_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer that a rule is registered for, and their subclasses, by qualified name."""
    classes = [cls for cls in update_rule.registry if issubclass(cls, torch.optim.Optimizer)]
    for cls in classes:  # grows as it goes
        classes += [sub for sub in cls.__subclasses__() if sub not in classes]
    return {qualified(cls): cls for cls in classes}
