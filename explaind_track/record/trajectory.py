"""The record of a training run: full checkpoints every so often, and the gradients, batches and settings between them.

θ, the optimizer's state and with them every part of every step follow from a keyframe and the gradients after it, by
running the optimizer's own `step`; the next keyframe proves that they do, bit for bit.

    manifest.json                       what was trained, and every other file with its hash
    keyframes/00000100.safetensors      parameters, buffers and optimizer state before step 100
    steps/00000100.safetensors          gradients, batches and settings of the steps from 100 on
"""

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from explaind_track.core.step import Batch, Step
from explaind_track.errors import TrajectoryError
from explaind_track.record.files import TensorFile
from explaind_track.record.manifest import Entry, Manifest
from explaind_track.record.remote import PREFIX, RemoteArtifact
from explaind_track.record.replay import Replay
from explaind_track.record.run_directory import trajectory_directory
from explaind_track.record.schema import Keyframe, Segment, random_state_in, signature


class Trajectory:
    """A recorded run: the same steps as the live ones, as often as wanted."""

    def __init__(self, directory: Path, manifest: Manifest, remote: RemoteArtifact | None = None) -> None:
        self.directory = directory
        self.manifest = manifest
        self.artifact = None if remote is None else remote.name
        """The artifact of W&B that this was opened from."""
        self.segments = sorted((e for e in manifest.entries if not e.is_keyframe), key=lambda entry: entry.first)
        """The files that hold the steps, in their order."""
        self._keyframes = {entry.first: entry for entry in manifest.entries if entry.is_keyframe}
        self._remote = remote
        self._written_once: dict[str, Tensor] = {}

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
        manifest = Manifest.read(root)
        if remote is None:
            for entry in manifest.entries:
                entry.verify(root)

        trajectory = cls(root, manifest, remote)
        if 0 not in trajectory._keyframes:
            raise TrajectoryError(f"{root} holds no step: the run ended before its first one was written")
        expected = 0
        for segment in trajectory.segments:
            if segment.first != expected:
                raise TrajectoryError(f"{root} lacks the steps {expected} to {segment.first - 1}")
            expected = segment.last
        return trajectory

    def __len__(self) -> int:
        """The number of recorded steps."""
        return self.segments[-1].last if self.segments else 0

    @property
    def fingerprint(self) -> str:
        """Tells one record from another."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.manifest.entries).encode()).hexdigest()[:32]

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError unless the model has the parameters that were trained, in name, shape and type."""
        expected, found = self.manifest.head["parameters"], signature(dict(model.named_parameters()))
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
        self._require(0 <= first <= last <= len(self), f"{first} to {last}")
        with self._blaming_the_files():
            replay = self._at_keyframe(first)
            for step in self._advance(replay, last):
                if step.number >= first:
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
        self._require(0 <= number <= len(self), str(number))
        with self._blaming_the_files():
            replay = self._at_keyframe(number)
            for _ in self._advance(replay, number):
                pass
            return replay

    def state_dict(self, step: int) -> dict[str, Tensor]:
        """The model's state before step `step` (after all steps, for `len(self)`), as `load_state_dict` takes it."""
        if step in self._keyframes:
            keyframe = self._keyframe(step)
            tensors = {**keyframe.parameters, **keyframe.buffers}
        else:
            replay = self.replay(step)
            tensors = {**{name: value.detach() for name, value in replay.parameters.items()}, **replay.buffers}

        tensors |= {name: tensors[own] for name, own in self.manifest.head["aliases"].items()}
        return {name: tensors[name] for name in self.manifest.head["saved"]}

    def batches(self, step: int) -> tuple[Batch, ...]:
        """The batches of one step: their indices and weights, or where there was no index, the samples themselves."""
        self._require(0 <= step < len(self), str(step))
        (segment,) = (segment for segment in self.segments if segment.first <= step < segment.last)
        with self._blaming_the_files():
            return self.read_segment(segment).batches(step)

    def indices(self, last: int) -> Iterator[tuple[int, Batch]]:
        """Every batch before step `last`, with its step."""
        with self._blaming_the_files():
            for entry in self.segments:
                segment = self.read_segment(entry)
                for number in range(entry.first, min(entry.last, last)):
                    for batch in segment.batches(number):
                        yield number, batch

    def random_state(self) -> dict[str, Tensor]:
        """The state of the random generators, by device, where the record ends."""
        last = self.segments[-1] if self.segments else self._keyframes[0]
        return dict(random_state_in(self.read(last)))

    def file(self, entry: Entry) -> Path:
        """The file on this disk; fetched, and checked, if it is not here yet."""
        return self.directory / entry.path if self._remote is None else self._remote.locate(entry)

    def read(self, entry: Entry) -> TensorFile:
        """The file, opened."""
        return TensorFile(self.file(entry))

    def read_segment(self, entry: Entry) -> Segment:
        """The segment, opened."""
        file = self.read(entry)
        return Segment(file, entry.first, partial(self._find, file))

    def _at_keyframe(self, step: int) -> Replay:
        """A replay that is to take step `step`, at the last keyframe before it."""
        start = self.keyframe(step)
        return Replay(self.manifest.head["optimizer"], start, self._keyframe(start))

    def _advance(self, replay: Replay, last: int) -> Iterator[Step]:
        """Lets the replay take its steps up to `last`, and meet every keyframe on the way, that before `last` included.
        Each step is valid until the next is asked for."""
        for segment in self.segments:
            if segment.last <= replay.number or segment.first >= last:
                continue
            for record in self.read_segment(segment).records(replay.number, last):
                yield replay.take(record)
                replay.settle()
                if replay.number in self._keyframes:
                    replay.meet(self._keyframe(replay.number))

    def _keyframe(self, number: int) -> Keyframe:
        return Keyframe(self.read(self._keyframes[number]))

    def _find(self, file: TensorFile, name: str) -> Tensor:
        """An index or weights, which are written once for all steps: in this segment, or in an earlier one that used
        them first. Kept, so that steps share them."""
        if name not in self._written_once:
            files = itertools.chain([file], map(self.read, self.segments))  # one by one: each may be a download
            holder = next((one for one in files if name in one), None)
            if holder is None:
                raise TrajectoryError(f"{self.directory} lacks {name!r}, which its steps refer to")
            self._written_once[name] = holder[name]
        return self._written_once[name]

    def _require(self, inside: bool, found: str) -> None:
        if not inside:
            raise ValueError(f"the trajectory has the steps 0 to {len(self)}, not {found}")

    @contextmanager
    def _blaming_the_files(self) -> Iterator[None]:
        """Files with the right hashes may still say anything: whatever that leads to is their fault."""
        try:
            yield
        except TrajectoryError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            raise TrajectoryError(f"{self.directory} does not hold what a trajectory holds: {error!r}") from error
