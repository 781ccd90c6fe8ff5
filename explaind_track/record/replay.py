"""Replays a recorded run: the optimizer takes its steps again, and keyframes prove that they are the same."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.observer import StepObserver
from explaind_track.core.rules import update_rule
from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.errors import ReplayWarning, TrajectoryError
from explaind_track.record.files import TensorFile
from explaind_track.record.writer import qualified

REPLAY_TOLERANCE = 1e-4


class Replay:
    """The optimizer of the run, taking its steps again."""

    def __init__(self, optimizer: str, keyframe: TensorFile) -> None:
        classes = _known_optimizers()
        if optimizer not in classes:
            raise TrajectoryError(
                f"the run was trained by {optimizer}, which has no update rule here; import and register it first "
                f"(there are rules for {', '.join(sorted(classes))})"
            )
        self.parameters = {name: nn.Parameter(value) for name, value in keyframe.prefixed("parameter:")}
        self.buffers: Tensors = dict(keyframe.prefixed("buffer:"))
        settings = self._groups(keyframe.header["settings"])
        self.optimizer: torch.optim.Optimizer = classes[optimizer](settings)  # type: ignore[call-arg]
        for name, state in _optimizer_state(keyframe).items():
            self.optimizer.state[self.parameters[name]] = state
        self.observer = StepObserver(self.optimizer, self.parameters)
        self.observer.adopt(_shares(keyframe))

    def _groups(self, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **{key: tuple(value) if isinstance(value, list) else value for key, value in group.items()},
                "params": [self.parameters[name] for name in group["params"]],
            }
            for group in settings
        ]

    def take(
        self,
        number: int,
        settings: list[dict[str, Any]],
        entry: Mapping[str, Any],
        file: TensorFile,
        batches: tuple[Batch, ...],
    ) -> Step:
        """Takes step `number` from its settings, its entry in the log, and its gradients in `file`."""
        current = self._groups(settings)
        for added in current[len(self.optimizer.param_groups) :]:
            self.optimizer.add_param_group(added)
        for group, values in zip(self.optimizer.param_groups, current, strict=True):
            group.update(values)
        for name, parameter in self.parameters.items():
            key = f"gradient:{number}:{name}"
            parameter.grad = file[key] if key in file.names else None
        buffers = {**self.buffers, **dict(file.prefixed(f"buffer:{number}:"))}
        auxiliary = {name: dict(file.prefixed(f"auxiliary:{number}:{name}:")) for name in entry["auxiliary"]}
        self.observer.before(self.buffers, auxiliary)
        self.optimizer.step()
        step = self.observer.after(number, buffers, batches)
        self.buffers = buffers
        return step

    def settle(self) -> None:
        """Ends the validity of the step that was taken last."""
        self.observer.settle()

    def prove(self, number: int, keyframe: TensorFile) -> None:
        """Compares everything with the keyframe before step `number`, bit for bit, and goes on from the keyframe.

        Other bits but the same numbers (to `REPLAY_TOLERANCE`, as another machine may give them) are told of by a
        ReplayWarning; other numbers raise TrajectoryError.
        """
        recorded: dict[str, Tensor] = {}
        for prefix in ("parameter:", "buffer:", "share:", "state:"):
            recorded |= {prefix + name: value for name, value in keyframe.prefixed(prefix)}
        found = {f"parameter:{name}": value.detach() for name, value in self.parameters.items()}
        found |= {f"buffer:{name}": value for name, value in self.buffers.items()}
        for part, held in self.observer.momentum_shares.items():
            found |= {f"share:{part}:{name}": value for name, value in held.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"state:{key}:{name}"] = value
        if recorded.keys() != found.keys():
            raise TrajectoryError(f"the replay up to step {number} has not the tensors of the keyframe there")
        other = {name for name, value in recorded.items() if not same_bits(value, found[name])}
        if not other:
            return
        error = max(float((found[n] - recorded[n]).norm() / recorded[n].norm().clamp(min=1e-30)) for n in other)
        if not error <= REPLAY_TOLERANCE:
            raise TrajectoryError(
                f"the replay up to step {number} is off by {error:.1e} (of the norm) from the keyframe there, in "
                f"{', '.join(sorted(other)[:5])}; the run must have done something between its steps that was not seen"
            )
        warnings.warn(
            f"the replay up to step {number} has other bits than the run had (off by {error:.1e}), as another machine "
            "or version of torch may give; it goes on from the keyframe",
            ReplayWarning,
            stacklevel=2,
        )
        with torch.no_grad():
            for name in other:
                found[name].copy_(recorded[name])


def _optimizer_state(keyframe: TensorFile) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter."""
    state: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in keyframe.header["state"].items()}
    for name, value in keyframe.prefixed("state:"):
        key, parameter = name.split(":", 1)
        state.setdefault(parameter, {})[key] = value
    return state


def _shares(keyframe: TensorFile) -> dict[str, dict[str, Tensor]]:
    """The shares of the momentum buffers by part and parameter."""
    shares: dict[str, dict[str, Tensor]] = {}
    for name, value in keyframe.prefixed("share:"):
        part, parameter = name.split(":", 1)
        shares.setdefault(part, {})[parameter] = value
    return shares


def _known_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer that a rule is registered for, and their subclasses, by qualified name."""
    classes = [cls for cls in update_rule.registry if issubclass(cls, torch.optim.Optimizer)]
    for cls in classes:  # grows as it goes
        classes += [sub for sub in cls.__subclasses__() if sub not in classes]
    return {qualified(cls): cls for cls in classes}
