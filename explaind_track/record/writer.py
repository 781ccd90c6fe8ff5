"""Writes the record of a training run while it trains; see `trajectory` for what lies where."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.observer import StepObserver
from explaind_track.core.rng import random_state
from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import Tensors, tree_map
from explaind_track.errors import TrajectoryError
from explaind_track.record import files
from explaind_track.record.files import Entry

FORMAT = "explaind_track trajectory 2"
KEYFRAME_EVERY = 100
SEGMENT_BYTES = 2**26


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def signature(tensors: Tensors) -> dict[str, list[Any]]:
    """Shape and type of every tensor, as JSON has them."""
    return {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}


def _number(setting: Any) -> Any:
    """An optimizer's setting as JSON has it: a tensor (a learning rate may be one) as its number."""
    return setting.item() if isinstance(setting, Tensor) else setting


def head_of(model: nn.Module, observer: StepObserver) -> dict[str, Any]:
    """What a trajectory says of the run as a whole."""
    buffers = dict(model.named_buffers())
    everything = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in observer.parameters.items()}
    return {
        "format": FORMAT,
        "model": qualified(type(model)),
        "optimizer": qualified(type(observer.optimizer)),
        "parameters": signature(observer.parameters),
        "buffers": signature(buffers),
        "aliases": {name: names[id(p)] for name, p in everything.items() if name not in observer.parameters},
        "saved": [name for name in model.state_dict() if name in everything or name in buffers],
        "packages": {"torch": torch.__version__, "explaind_track": version("explaind_track")},
    }


class TrajectoryWriter:
    """Writes the steps of a live run, segment by segment. What is on disk is a whole trajectory at any moment."""

    def __init__(
        self,
        directory: str | PathLike[str],
        model: nn.Module,
        observer: StepObserver,
        keyframe_every: int = KEYFRAME_EVERY,
        entries: Sequence[Entry] | None = None,
    ) -> None:
        """entries: the files of a trajectory in the directory that is to be gone on with; None: it begins here.

        Raises FileExistsError if one begins in a directory that holds anything: a run is never written over;
        TrajectoryError if another process is writing there, or if nothing can be written.
        """
        self.directory = Path(directory)
        if entries is None and self.directory.exists() and any(self.directory.iterdir()):
            raise FileExistsError(
                f"{self.directory} is not empty; name a new directory, remove that one first, or go on with the run in "
                "it by Tracker(…, resume=True)"
            )
        self._observer, self._every = observer, keyframe_every
        self._buffers = dict(model.named_buffers())
        self._device = next(model.parameters()).device
        self._head = head_of(model, observer)
        self._entries: list[Entry] = list(entries or ())
        self._keyframes = {entry.first for entry in self._entries if entry.path.startswith("keyframes/")}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._steps: list[dict[str, Any]] = []
        self._first = 0
        self._settings: Any = None
        self._seen: set[str] = set()
        self._random: Tensors = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrajectoryError(f"{self.directory} cannot be made: {error}") from error
        self._lock = files.Lock(self.directory)
        files.write_manifest(self.directory, self._head, self._entries)

    def begin(self) -> None:
        """As the next step begins, before anything random is drawn for it: this is where the run could be taken up."""
        self._random = random_state(self._device)

    def before(self, number: int, buffers: Tensors) -> None:
        """Right before the optimizer takes step `number`, with the observer ready: writes a keyframe where one is
        due, which is also the case where something other than the optimizer has changed the parameters since its last
        step. buffers: as they were at the start of the step."""
        continues = self._observer.continues
        if (number % self._every == 0 or not continues) and number not in self._keyframes:
            self.flush()
            self._write_keyframe(number, buffers, continues)

    def record(self, step: Step, buffers_moved: bool, auxiliary: Mapping[str, Tensors]) -> None:
        """Takes in the step that was just made. auxiliary: the gradients that went into the StepObserver before it."""
        if not self._steps:
            self._first = step.number
        settings = self._current_settings()
        entry: dict[str, Any] = {"settings": None if settings == self._settings and self._steps else settings}
        self._settings = settings
        for name in step.updates:
            gradient = self._observer.parameters[name].grad
            assert gradient is not None  # it has an update, so it had a gradient
            self._keep(f"gradient:{step.number}:{name}", gradient.detach().clone())
        for part, gradients in auxiliary.items():
            for name, gradient in gradients.items():
                self._keep(f"auxiliary:{step.number}:{part}:{name}", gradient)
        entry["auxiliary"] = list(auxiliary)
        if buffers_moved:
            for name, buffer in step.after.buffers.items():
                self._keep(f"buffer:{step.number}:{name}", buffer.detach().clone())
        entry["batches"] = [self._batch(f"batch:{step.number}:{place}", one) for place, one in enumerate(step.batches)]
        self._steps.append(entry)
        self.begin()
        if self._pending_bytes >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending; after it, nothing of the steps so far can be lost."""
        if not self._steps:
            return
        path, last = f"steps/{self._first:08}.safetensors", self._first + len(self._steps)
        tensors = {**self._pending, **{f"random:{device}": value for device, value in self._random.items()}}
        self._add(files.write_tensors(self.directory, path, self._first, last, tensors, {"steps": self._steps}))
        self._pending, self._pending_bytes, self._steps = {}, 0, []

    def close(self, number: int) -> None:
        """Ends the record behind step number − 1, with a keyframe that proves the last steps."""
        self.flush()
        if number not in self._keyframes:
            continues = self._observer.untouched(self._buffers)
            self._write_keyframe(number, self._buffers, continues)
        self._lock.release()

    def _add(self, entry: Entry) -> None:
        """Enters a file into the manifest; again, if an interruption came before the end of `flush`."""
        self._entries = [*(other for other in self._entries if other.path != entry.path), entry]
        files.write_manifest(self.directory, self._head, self._entries)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor
        self._pending_bytes += tensor.numel() * tensor.element_size()

    def _current_settings(self) -> list[dict[str, Any]]:
        names = {id(parameter): name for name, parameter in self._observer.parameters.items()}
        return [
            {
                **{key: _number(value) for key, value in group.items() if key != "params"},
                "params": [names[id(parameter)] for parameter in group["params"]],
            }
            for group in self._observer.optimizer.param_groups
        ]

    def _batch(self, name: str, batch: Batch) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": batch.size, "weight": batch.weight, "index": None, "data": None}
        entry["clipped"] = batch.clipped
        if isinstance(batch.weight, Tensor):
            entry["weight"] = self._once("weight", batch.weight)
        if batch.index is not None:
            entry["index"] = self._once("index", batch.index)
        elif batch.data is not None:
            count = 0

            def put(tensor: Tensor) -> dict[str, str]:
                nonlocal count
                count += 1
                self._keep(f"{name}:{count}", tensor.detach().clone())
                return {"tensor": f"{name}:{count}"}

            entry["data"] = tree_map(put, batch.data)
        entry["random"] = {device: f"{name}:random:{device}" for device in batch.random_state}
        for device, value in batch.random_state.items():
            self._keep(f"{name}:random:{device}", value)
        return entry

    def _once(self, kind: str, tensor: Tensor) -> str:
        """Keeps a tensor unless the trajectory has it already; returns its name, which is its content's hash."""
        content = tensor.detach().cpu().contiguous()
        name = f"{kind}:{hashlib.sha256(content.numpy().tobytes()).hexdigest()[:32]}"
        if name not in self._seen:
            self._seen.add(name)
            self._keep(name, content.clone())
        return name

    def _write_keyframe(self, number: int, buffers: Tensors, continues: bool) -> None:
        """continues: whether the keyframe follows from the steps before it, so that it can prove their replay."""
        observer = self._observer
        tensors = {f"parameter:{name}": value for name, value in observer.parameters.items()}
        tensors |= {f"buffer:{name}": value for name, value in buffers.items()}
        for part, held in observer.momentum_shares.items():
            tensors |= {f"share:{part}:{name}": value for name, value in held.items()}
        tensors |= {f"random:{device}": value for device, value in self._random.items()}
        plain: dict[str, dict[str, Any]] = {}
        for name, parameter in observer.parameters.items():
            for key, value in observer.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state:{key}:{name}"] = value
                else:
                    plain.setdefault(name, {})[key] = value
        header = {"state": plain, "settings": self._current_settings(), "continues": continues}
        path = f"keyframes/{number:08}.safetensors"
        self._add(files.write_tensors(self.directory, path, number, number, tensors, header))
        self._keyframes.add(number)
