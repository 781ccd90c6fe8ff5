"""The model as the last step has left it, kept to tell what anything but the optimizer changes before the next one."""

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from explaind_track.core.fingerprint import fingerprint
from explaind_track.core.step import State
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.errors import UnseenChangeWarning


class KeptState:
    """Copies of a model's parameters and buffers, one of each: as the last step has left them, then as the next begins.

    Where these are the same, bit for bit, nothing is copied from the one to the other. With `keeps_copies` off, it has
    one copy of the parameters during a step, and between steps only fingerprints: it tells which of them was changed,
    not what it was before, and from the first such change on, keeps copies.
    """

    def __init__(self, parameters: Tensors) -> None:
        """parameters: the model's own, by name; or what this process holds of them."""
        self.parameters = parameters
        self.start = State({}, {})
        """The beginning of the step at hand: the parameters right before the optimizer's step (copies), and the buffers
        before the forward pass."""
        self.changed = State({}, {})
        """What of `start` is not as the last step has left it."""
        self.restless = False
        """Whether anything but the optimizer has ever changed the model between its steps."""
        self._seen: dict[str, Tensor] | None = None
        """What was changed already as the step's first forward pass began; None: nobody looked."""
        self._late: list[str] = []
        """The parameters that were changed between that and the optimizer's step."""
        self.keeps_copies = True
        """Whether parameters are copied for the time between steps."""
        self._prints: dict[str, Tensor] = {}
        """Their fingerprints, where they are not."""
        self.is_lost = False
        """Whether something has changed parameters before the step at hand of which there was no copy."""
        self._left: State | None = None
        self._passed = False
        """Whether the optimizer has taken a step since, after which nothing was kept."""

    @property
    def left(self) -> State:
        """The end of the last step, before anything else has changed it, or where the run began (copies; without them,
        the model's own parameters)."""
        assert self._left is not None  # asked for only once the run has begun
        return State({**self._now(), **self._left.parameters}, self._left.buffers)

    def _now(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    @property
    def is_known(self) -> bool:
        """Whether the end of the last step was kept."""
        return self._left is not None and not self._passed

    def restart(self, buffers: Tensors) -> None:
        """Takes the model of now for the end of the last step. buffers: the model's."""
        self._left = self.start = self._kept(buffers)
        self.changed, self._passed = State({}, {}), False

    def _kept(self, buffers: Tensors) -> State:
        """What is to be kept of the model of now."""
        if self.keeps_copies:
            return State(self.parameters, buffers).copy()
        self._prints = {name: fingerprint(value) for name, value in self.parameters.items()}
        return State({}, buffers).copy()

    def go_on(self, left: State, buffers: Tensors) -> None:
        """Keeps what another KeptState of the run has kept, on the devices of this model. buffers: the model's."""
        self._left = self.start = State(_beside(left.parameters, self.parameters), _beside(left.buffers, buffers))

    def changes(self, buffers: Tensors) -> State:
        """The parameters, and those of these buffers, that are not as the last step has left them; none where it has
        only just been taken."""
        if self._left is None or self._passed:
            return State({}, {})
        return State(self._changed_parameters(), _changed(buffers, self._left.buffers))

    def _changed_parameters(self) -> dict[str, Tensor]:
        assert self._left is not None  # there is something to compare with
        if not self._prints:
            return _changed(self.parameters, self._left.parameters)
        prints = self._prints
        return {name: p for name, p in self._now().items() if not torch.equal(prints[name], fingerprint(p))}

    def look_before_forward(self) -> None:
        """Takes down what is changed already as the step's first forward pass begins."""
        if not self._prints:
            self._seen = {name: value.clone() for name, value in self.changes({}).parameters.items()}

    def forget_forward(self) -> None:
        """Forgets the forward pass of a step that was not taken."""
        self._seen = None

    def begin_step(self, buffers: Tensors, moving: Collection[str]) -> None:
        """Takes down where a step begins.

        A parameter that was changed between the step's forward pass and the optimizer's step, as another optimizer does
        after a backward pass for both, is left as the forward pass saw it where this optimizer does not move it: so the
        samples' gradients are taken where training took them, and the change comes behind this step.

        Args:
            buffers: See `start`; they have to last as long as the step.
            moving: The parameters that the optimizer is about to move.
        """
        changes, seen = self.changes(buffers), self._seen
        self._late = []
        self.note_loss(changes)
        if seen is not None:
            still = [name for name in {**changes.parameters, **seen} if name not in moving]
            self._late = [name for name in still if self._differs(name, seen.get(name, self.left.parameters[name]))]

        now = {name: value.clone() for name, value in changes.parameters.items() if name not in self._late}
        before = {name: value for name, value in (seen or {}).items() if name in self._late}
        self.changed = State({**now, **before}, changes.buffers)
        started = {name: value.clone() for name, value in self._now().items()} if self._prints else self.left.parameters
        self.start = State({**started, **self.changed.parameters}, buffers)
        self.restless |= not changes.is_empty

    def note_loss(self, changes: State) -> None:
        """Takes note of parameters that were changed while there was no copy of them: warns, and keeps copies from now
        on."""
        names = list(changes.parameters)
        self.is_lost = bool(self._prints and names)
        if not self.is_lost:
            return
        self.keeps_copies = True
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"something other than the optimizer has changed {', '.join(names[:3])}{more} since the last step, of "
            "which no copy was kept: that change is in no influence, those of the steps are exact. From now on, copies "
            "are kept, and such changes explained as the part 'outside', for one more copy of the parameters. "
            "Tracker(trajectory=…) keeps them from the start",
            UnseenChangeWarning,
            stacklevel=3,
        )

    def _differs(self, name: str, value: Tensor) -> bool:
        return not same_bits(self.parameters[name].detach(), value)

    def now(self) -> dict[str, Tensor]:
        """The parameters behind the optimizer's step, without what was changed from outside since the forward pass."""
        kept = self.start.parameters
        return {name: kept[name] if name in self._late else value.detach() for name, value in self.parameters.items()}

    def pass_step(self) -> None:
        """Takes note that the optimizer has taken the step."""
        self._passed = True

    def forget_step(self) -> None:
        """Takes note that nobody has seen the step that the optimizer has taken: what it did shows as changes since the
        last that was seen."""
        self._passed = False

    def end_step(self, buffers: Tensors) -> None:
        """Keeps the model of now as the step's end, in the place of its beginning. buffers: the model's."""
        if self._prints or not self.keeps_copies:  # copies are made anew, or none
            self._prints, self.start = {}, State({}, {})
            self._left = self._kept(buffers)
        else:
            for name, parameter in self.parameters.items():
                if name not in self._late:
                    self.start.parameters[name].copy_(parameter.detach())
            self._left = State(self.start.parameters, State({}, buffers).copy().buffers)
        self._passed = False


def _changed(now: Tensors, left: Tensors) -> dict[str, Tensor]:
    values = {name: value.detach() for name, value in now.items()}
    return {name: value for name, value in values.items() if name not in left or not same_bits(left[name], value)}


def _beside(tensors: Tensors, others: Tensors) -> dict[str, Tensor]:
    """Copies, each on the device of the other tensor of its name."""
    return {name: tensors[name].detach().to(other.device, copy=True) for name, other in others.items()}
