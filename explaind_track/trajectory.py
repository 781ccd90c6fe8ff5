"""The record of a training run: full checkpoints every so often, and the gradients, batches and settings between them.

θ, the optimizer's state and with them every part of every step follow from a keyframe and the gradients after it, by
running the optimizer's own `step`; the next keyframe proves that they do, bit for bit.

    manifest.json                       what was trained, and every other file with its hash
    keyframes/00000100.safetensors      parameters, buffers and optimizer state before step 100
    steps/00000100.safetensors          gradients, batches and settings of the steps from 100 on
"""

import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track import storage
from explaind_track.recorder import FORMAT, qualified, signature
from explaind_track.rules import update_rule
from explaind_track.step import Batch, Step, Stepper, Tensors, same_bits
from explaind_track.storage import Entry, TensorFile, TrajectoryError

REPLAY_TOLERANCE = 1e-4


class ReplayWarning(UserWarning):
    """Replaying gave other bits than the run that was recorded: another machine or version of torch."""


class Trajectory:
    """A recorded run: the same steps as the live ones, as often as wanted."""

    def __init__(self, directory: Path, head: Mapping[str, Any], entries: list[Entry]) -> None:
        self.directory = directory
        self.head = head
        self.entries = entries
        self._keyframes = {entry.first: entry for entry in entries if entry.path.startswith("keyframes/")}
        self._segments = sorted((e for e in entries if e.path.startswith("steps/")), key=lambda entry: entry.first)
        self._shared: dict[str, Tensor] = {}

    @classmethod
    def open(cls, directory: str | PathLike[str]) -> "Trajectory":
        """Reads the manifest and checks every file against its hash (about a second for a gigabyte).

        Raises TrajectoryError if a file is missing, torn or altered, or if steps are missing between two segments.
        """
        root = Path(directory)
        head, entries = storage.read_manifest(root, FORMAT)
        for entry in entries:
            storage.verify(root, entry)
        trajectory = cls(root, head, entries)
        expected = 0
        for segment in trajectory._segments:
            if segment.first != expected:
                raise TrajectoryError(f"{root} lacks the steps {expected} to {segment.first - 1}")
            expected = segment.last
        return trajectory

    def __len__(self) -> int:
        """The number of recorded steps."""
        return self._segments[-1].last if self._segments else 0

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError unless the model has the parameters that were trained, in name, shape and type."""
        expected, found = self.head["parameters"], signature(dict(model.named_parameters()))
        if expected != found:
            names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            detail = "; ".join(f"{n}: recorded {expected.get(n)}, model {found.get(n)}" for n in names[:5])
            raise ValueError(f"the model is not the one of {self.directory}. {detail}")

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[Step]:
        """Steps first ≤ s < last, replayed from the last keyframe before them, in order; each is valid until the next.

        Raises ValueError for a window outside of the record, TrajectoryError where the replay misses a keyframe.
        """
        last = len(self) if last is None else last
        if not 0 <= first <= last <= len(self):
            raise ValueError(f"the trajectory has the steps 0 to {len(self)}, not {first} to {last}")
        start = max(number for number in self._keyframes if number <= first)
        replay = _Replay(self.head["optimizer"], self._keyframe(start))
        for segment in self._segments:
            if segment.last <= start or segment.first >= last:
                continue
            file = self._open(segment)
            settings: Any = None
            for number in range(segment.first, min(segment.last, last)):
                entry = file.header["steps"][number - segment.first]
                settings = entry["settings"] or settings
                if number < start:
                    continue
                if number > start and number in self._keyframes:
                    replay = self._go_on(replay, number)
                step = replay.take(number, settings, file, self._batches(entry, file))
                if number >= first:
                    yield step
                replay.settle()
        if last > start and last in self._keyframes:
            self._go_on(replay, last)

    def _go_on(self, replay: "_Replay", number: int) -> "_Replay":
        """The replay from keyframe `number` on, which proves the steps before it if it follows from them."""
        keyframe = self._keyframe(number)
        if not keyframe.header["continues"]:
            return _Replay(self.head["optimizer"], keyframe)
        replay.prove(number, keyframe)
        return replay

    def state_dict(self, step: int) -> dict[str, Tensor]:
        """The model's state before step `step` (after all steps, for `len(self)`), as `load_state_dict` takes it."""
        if step in self._keyframes:
            file = self._keyframe(step)
            tensors = {**dict(file.prefixed("parameter:")), **dict(file.prefixed("buffer:"))}
        else:
            state = next(self.steps(step, step + 1)).before if step < len(self) else self._last().after
            tensors = {name: value.clone() for name, value in (*state.parameters.items(), *state.buffers.items())}
        tensors |= {name: tensors[own] for name, own in self.head["aliases"].items()}
        return {name: tensors[name] for name in self.head["saved"]}

    def _last(self) -> Step:
        return next(self.steps(len(self) - 1))

    def batches(self, step: int) -> tuple[Batch, ...]:
        """The batches of one step: their indices and weights, or where there was no index, the samples themselves."""
        for segment in self._segments:
            if segment.first <= step < segment.last:
                file = self._open(segment)
                return self._batches(file.header["steps"][step - segment.first], file)
        raise ValueError(f"the trajectory has the steps 0 to {len(self)}, not {step}")

    def _open(self, entry: Entry) -> TensorFile:
        return TensorFile(self.directory, entry, torch.device("cpu"))

    def _keyframe(self, number: int) -> TensorFile:
        return self._open(self._keyframes[number])

    def _batches(self, entry: Mapping[str, Any], file: TensorFile) -> tuple[Batch, ...]:
        def data(tree: Any) -> Any:
            if isinstance(tree, dict) and set(tree) == {"tensor"}:
                return file[tree["tensor"]]
            if isinstance(tree, dict):
                return {key: data(item) for key, item in tree.items()}
            return tuple(map(data, tree)) if isinstance(tree, list) else tree

        def shared(value: Any) -> Any:
            return self._find(value, file) if isinstance(value, str) else value

        return tuple(
            Batch(one["size"], shared(one["weight"]), shared(one["index"]), data(one["data"]))
            for one in entry["batches"]
        )

    def _find(self, name: str, file: TensorFile) -> Tensor:
        """A tensor that is written once: in this segment, or in an earlier one that used it first."""
        if name not in self._shared:
            files = (file, *map(self._open, self._segments))
            self._shared = {**self._shared, name: next(one for one in files if name in one.names)[name]}
        return self._shared[name]


class _Replay:
    """The optimizer of the run, taking its steps again."""

    def __init__(self, optimizer: str, keyframe: TensorFile) -> None:
        classes = _known_optimizers()
        if optimizer not in classes:
            raise TrajectoryError(
                f"the run was trained by {optimizer}, which has no update rule here; import and register it first "
                f"(there are rules for {', '.join(sorted(classes))})"
            )
        self._parameters = {name: nn.Parameter(value) for name, value in keyframe.prefixed("parameter:")}
        self._buffers: Tensors = dict(keyframe.prefixed("buffer:"))
        settings = self._groups(keyframe.header["settings"])
        self._optimizer: torch.optim.Optimizer = classes[optimizer](settings)  # type: ignore[call-arg]
        for name, state in _optimizer_state(keyframe).items():
            self._optimizer.state[self._parameters[name]] = state
        self._stepper = Stepper(self._optimizer, self._parameters)
        self._stepper.adopt(_shares(keyframe))

    def _groups(self, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **{key: tuple(value) if isinstance(value, list) else value for key, value in group.items()},
                "params": [self._parameters[name] for name in group["params"]],
            }
            for group in settings
        ]

    def take(self, number: int, settings: list[dict[str, Any]], file: TensorFile, batches: tuple[Batch, ...]) -> Step:
        """Takes step `number` from its gradients and settings."""
        for group, current in zip(self._optimizer.param_groups, self._groups(settings), strict=True):
            group.update(current)
        for name, parameter in self._parameters.items():
            key = f"gradient:{number}:{name}"
            parameter.grad = file[key] if key in file.names else None
        buffers = {**self._buffers, **dict(file.prefixed(f"buffer:{number}:"))}
        self._stepper.before(self._buffers)
        self._optimizer.step()
        step = self._stepper.after(number, buffers, batches)
        self._buffers = buffers
        return step

    def settle(self) -> None:
        """Ends the validity of the step that was taken last."""
        self._stepper.settle()

    def prove(self, number: int, keyframe: TensorFile) -> None:
        """Compares everything with the keyframe before step `number`, bit for bit, and goes on from the keyframe.

        Other bits but the same numbers (to `REPLAY_TOLERANCE`, as another machine may give them) are told of by a
        ReplayWarning; other numbers raise TrajectoryError.
        """
        recorded: dict[str, Tensor] = {}
        for prefix in ("parameter:", "buffer:", "share:", "state:"):
            recorded |= {prefix + name: value for name, value in keyframe.prefixed(prefix)}
        found = {f"parameter:{name}": value.detach() for name, value in self._parameters.items()}
        found |= {f"buffer:{name}": value for name, value in self._buffers.items()}
        for part, held in self._stepper.buffers.items():
            found |= {f"share:{part}:{name}": value for name, value in held.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
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
