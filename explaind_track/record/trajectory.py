"""The record of a training run: full checkpoints every so often, and the gradients, batches and settings between them.

θ, the optimizer's state and with them every part of every step follow from a keyframe and the gradients after it, by
running the optimizer's own `step`; the next keyframe proves that they do, bit for bit.

    manifest.json                       what was trained, and every other file with its hash
    keyframes/00000100.safetensors      parameters, buffers and optimizer state before step 100
    steps/00000100.safetensors          gradients, batches and settings of the steps from 100 on
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from explaind_track.core.step import Batch, Step
from explaind_track.errors import TrajectoryError
from explaind_track.record import files
from explaind_track.record.files import Entry, TensorFile
from explaind_track.record.remote import PREFIX, RemoteArtifact
from explaind_track.record.replay import Replay
from explaind_track.record.run_directory import trajectory_directory
from explaind_track.record.writer import FORMAT, signature


class Trajectory:
    """A recorded run: the same steps as the live ones, as often as wanted."""

    def __init__(
        self, directory: Path, head: Mapping[str, Any], entries: list[Entry], remote: RemoteArtifact | None = None
    ) -> None:
        self.directory = directory
        self.artifact = None if remote is None else remote.name
        """The artifact of W&B that this was opened from."""
        self._remote = remote
        self.head = head
        self.entries = entries
        self._keyframes = {entry.first: entry for entry in entries if entry.path.startswith("keyframes/")}
        self._segments = sorted((e for e in entries if e.path.startswith("steps/")), key=lambda entry: entry.first)
        self._shared: dict[str, Tensor] = {}

    @classmethod
    def open(cls, directory: str | PathLike[str]) -> "Trajectory":
        """Reads the manifest and checks every file against its hash (about a second for a gigabyte).

        directory: the trajectory, or a directory with one in `trajectory/` (a recipe's results; a run of W&B, also an
        offline one); or `wandb:entity/project/name:alias`, of which a file is fetched when it is first needed, checked,
        and kept under its hash for the next time.

        Raises TrajectoryError if a file is missing, torn or altered, or if steps are missing between two segments.
        """
        remote = RemoteArtifact(str(directory)) if str(directory).startswith(PREFIX) else None
        root = trajectory_directory(directory) if remote is None else remote.manifest_directory()
        head, entries = files.read_manifest(root, FORMAT)
        if remote is None:
            for entry in entries:
                files.verify(root, entry)
        trajectory = cls(root, head, entries, remote)
        if 0 not in trajectory._keyframes:
            raise TrajectoryError(f"{root} holds no step: the run ended before its first one was written")
        expected = 0
        for segment in trajectory._segments:
            if segment.first != expected:
                raise TrajectoryError(f"{root} lacks the steps {expected} to {segment.first - 1}")
            expected = segment.last
        return trajectory

    def __len__(self) -> int:
        """The number of recorded steps."""
        return self._segments[-1].last if self._segments else 0

    @property
    def fingerprint(self) -> str:
        """Tells one record from another."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.entries).encode()).hexdigest()[:32]

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError unless the model has the parameters that were trained, in name, shape and type."""
        expected, found = self.head["parameters"], signature(dict(model.named_parameters()))
        if expected != found:
            names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            detail = "; ".join(f"{n}: recorded {expected.get(n)}, model {found.get(n)}" for n in names[:5])
            raise ValueError(f"the model is not the one that {self.directory} records: pass that one. {detail}")

    def steps(self, first: int = 0, last: int | None = None, lasting: bool = False) -> Iterator[Step]:
        """Steps first ≤ s < last, replayed from the last keyframe before them, in order; each is valid until the next,
        or if `lasting`, in tensors of its own.

        Raises ValueError for a window outside of the record, TrajectoryError where the replay misses a keyframe.
        """
        last = len(self) if last is None else last
        if not 0 <= first <= last <= len(self):
            raise ValueError(f"the trajectory has the steps 0 to {len(self)}, not {first} to {last}")
        for step, replay in self._replayed(first, last):
            if step is not None and step.number >= first:
                yield replay.observer.lasting(step) if lasting else step

    def steps_back(self, first: int, last: int, memory: int) -> Iterator[Step]:
        """Steps last > s ≥ first, the last one first, in tensors of their own. Replays piece by piece: from a keyframe
        to the next at most, and no more at once than fit `memory` bytes (but at least one)."""
        stop = last
        while stop > first:
            start = self.keyframe(stop - 1)
            each = self._keyframes[start].size * 3 // 2  # with the gradient
            begin = max(start, first, stop - max(1, memory // each))
            held = list(self.steps(begin, stop, lasting=True))
            while held:
                yield held.pop()
            stop = begin

    def keyframe(self, step: int) -> int:
        """The last keyframe from which a step can be replayed: the number of the step that it is before."""
        return max(number for number in self._keyframes if number <= step)

    def replay(self, number: int) -> Replay:
        """The run as it was before step `number` (after all steps, for `len(self)`), able to take that step."""
        *_, (_, replay) = self._replayed(number, number)
        return replay

    def _replayed(self, first: int, last: int) -> Iterator[tuple[Step | None, Replay]]:
        """From the last keyframe before `first` on, every step with the replay that took it; at the end the replay as
        it is before step `last`, without a step."""
        try:
            yield from self._take_again(first, last)
        except TrajectoryError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            raise TrajectoryError(f"{self.directory} does not hold what a trajectory holds: {error!r}") from error

    def _take_again(self, first: int, last: int) -> Iterator[tuple[Step | None, Replay]]:
        start = self.keyframe(first)
        replay = Replay(self.head["optimizer"], self._keyframe(start))
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
                yield replay.take(number, settings, entry, file, self._batches(entry, file)), replay
                replay.settle()
        if last > start and last in self._keyframes:
            replay = self._go_on(replay, last)
        yield None, replay

    def _go_on(self, replay: "Replay", number: int) -> "Replay":
        """The replay from keyframe `number` on, which proves the steps before it if it follows from them."""
        keyframe = self._keyframe(number)
        if not keyframe.header["continues"]:
            return Replay(self.head["optimizer"], keyframe)
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

    def indices(self, last: int) -> Iterator[tuple[int, Batch]]:
        """Every batch before step `last`, with its step."""
        for segment in self._segments:
            file = self._open(segment)
            for number, entry in enumerate(file.header["steps"][: max(0, last - segment.first)], segment.first):
                for batch in self._batches(entry, file):
                    yield number, batch

    def _open(self, entry: Entry) -> TensorFile:
        return TensorFile(self.file(entry), torch.device("cpu"))

    def file(self, entry: Entry) -> Path:
        """The file on this disk; fetched, and checked, if it is not here yet."""
        return self.directory / entry.path if self._remote is None else self._remote.locate(entry)

    def random_state(self) -> dict[str, Tensor]:
        """The state of the random generators, by device, where the record ends."""
        last = self._open(self._segments[-1]) if self._segments else self._keyframe(0)
        return dict(last.prefixed("random:"))

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
            Batch(
                one["size"],
                shared(one["weight"]),
                shared(one["index"]),
                data(one["data"]),
                {device: file[name] for device, name in one["random"].items()},
                one["clipped"],
            )
            for one in entry["batches"]
        )

    def _find(self, name: str, file: TensorFile) -> Tensor:
        """A tensor that is written once: in this segment, or in an earlier one that used it first."""
        if name not in self._shared:
            files = itertools.chain([file], map(self._open, self._segments))  # one by one: each may be a download
            self._shared = {**self._shared, name: next(one for one in files if name in one.names)[name]}
        return self._shared[name]
