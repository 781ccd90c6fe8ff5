"""The model as the last step has left it, kept to tell what anything but the optimizer changes before the next one."""

from torch import Tensor

from explaind_track.core.step import State
from explaind_track.core.tensors import Tensors, same_bits


class KeptState:
    """Copies of a model's parameters and buffers, one of each: as the last step has left them, then as the next begins.

    Where these are the same, bit for bit, nothing is copied from the one to the other.
    """

    def __init__(self, parameters: Tensors) -> None:
        """parameters: the model's own, by name."""
        self.parameters = parameters
        self.start = State({}, {})
        """The beginning of the step at hand: the parameters right before the optimizer's step (copies), and the buffers
        before the forward pass."""
        self.changed = State({}, {})
        """What of `start` is not as the last step has left it."""
        self.restless = False
        """Whether anything but the optimizer has ever changed the model between its steps."""
        self._left: State | None = None
        self._passed = False
        """Whether the optimizer has taken a step since, after which nothing was kept."""

    @property
    def left(self) -> State:
        """The end of the last step, before anything else has changed it, or where the run began (copies)."""
        assert self._left is not None  # asked for only once the run has begun
        return self._left

    @property
    def is_known(self) -> bool:
        """Whether the end of the last step was kept."""
        return self._left is not None and not self._passed

    def restart(self, buffers: Tensors) -> None:
        """Takes the model of now for the end of the last step. buffers: the model's."""
        self._left = self.start = State(self.parameters, buffers).copy()
        self.changed, self._passed = State({}, {}), False

    def go_on(self, left: State, buffers: Tensors) -> None:
        """Keeps what another KeptState of the run has kept, on the devices of this model. buffers: the model's."""
        self._left = self.start = State(_beside(left.parameters, self.parameters), _beside(left.buffers, buffers))

    def changes(self, buffers: Tensors) -> State:
        """The parameters, and those of these buffers, that are not as the last step has left them; none where it has
        only just been taken."""
        if self._left is None or self._passed:
            return State({}, {})
        return State(_changed(self.parameters, self._left.parameters), _changed(buffers, self._left.buffers))

    def begin_step(self, buffers: Tensors) -> None:
        """Takes down where a step begins. buffers: see `start`; they have to last as long as the step."""
        changes = self.changes(buffers)
        self.changed = State({name: value.clone() for name, value in changes.parameters.items()}, changes.buffers)
        self.start = State({**self.left.parameters, **self.changed.parameters}, buffers)
        self.restless |= not changes.is_empty

    def pass_step(self) -> None:
        """Takes note that the optimizer has taken the step."""
        self._passed = True

    def end_step(self, buffers: Tensors) -> None:
        """Keeps the model of now as the step's end, in the place of its beginning. buffers: the model's."""
        for name, parameter in self.parameters.items():
            self.start.parameters[name].copy_(parameter.detach())
        self._left = State(self.start.parameters, State({}, buffers).copy().buffers)
        self._passed = False


def _changed(now: Tensors, left: Tensors) -> dict[str, Tensor]:
    values = {name: value.detach() for name, value in now.items()}
    return {name: value for name, value in values.items() if name not in left or not same_bits(left[name], value)}


def _beside(tensors: Tensors, others: Tensors) -> dict[str, Tensor]:
    """Copies, each on the device of the other tensor of its name."""
    return {name: tensors[name].detach().to(other.device, copy=True) for name, other in others.items()}
