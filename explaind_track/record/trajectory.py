"""The record of a training run: full checkpoints every so often, and the gradients, batches and settings between them.

θ, the optimizer's state and with them every part of every step follow from a keyframe and the gradients after it, by
running the optimizer's own `step`; the next keyframe proves that they do, bit for bit. `schema` says what is in a file.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from explaind_track.core.checks import require_int
from explaind_track.core.modules import parameters_of
from explaind_track.core.step import Batch, State, Step
from explaind_track.core.summary import Summarized, Summary
from explaind_track.errors import TrajectoryError
from explaind_track.record.files import TensorFile, WrittenOnce, blaming_files, not_blaming_files
from explaind_track.record.manifest import Entry, Manifest
from explaind_track.record.remote import PREFIX, RemoteArtifact
from explaind_track.record.replay import Replay
from explaind_track.record.run_directory import trajectory_directory
from explaind_track.record.run_summary import run_summary
from explaind_track.record.schema import Keyframe, Segment, StepRecord, random_state_in
from explaind_track.record.signatures import is_low_precision, signature, stands_for


class Trajectory(Summarized):
    """A recorded run: the same steps as the live ones, as often as wanted.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Tracker, Trajectory
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(9, 2), torch.arange(9) % 3
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> directory = tempfile.TemporaryDirectory()
        >>> tracker = Tracker(model, optimizer, queries={}, trajectory=directory.name)
        >>> for index in torch.arange(9).split(3):
        ...     with tracker.step():
        ...         optimizer.zero_grad()
        ...         tracker.batch((x[index], y[index]), index=index)
        ...         torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        ...         optimizer.step()
        >>> tracker.finish()

        >>> trajectory = Trajectory.open(directory.name)
        >>> for step in trajectory.steps():
        ...     change = step.before.parameters["0.bias"] - step.after.parameters["0.bias"]
        ...     parts = sum(step.parts[part]["0.bias"] for part in ("kernel", "regularization", "rounding"))
        ...     print(step.number, torch.equal(parts, change), step.batches[0].index.tolist())
        0 True [0, 1, 2]
        1 True [3, 4, 5]
        2 True [6, 7, 8]
        >>> torch.equal(trajectory.state_dict(3)["0.bias"], model[0].bias)
        True
        >>> directory.cleanup()
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        remote: RemoteArtifact | None = None,
        recompute: Callable[[Replay, StepRecord], StepRecord] | None = None,
    ) -> None:
        """Use `open`, which checks what it opens.

        Args:
            directory: Where the files are; of a run at W&B, where its manifest is.
            manifest: The manifest there.
            remote: Where the other files come from, if they are not here.
            recompute: Gives a step that its replay is about to take the gradients that were not kept.
        """
        self.directory, self.manifest = directory, manifest
        self.artifact = None if remote is None else remote.name
        """The artifact of W&B that this was opened from."""
        self.segments = sorted((e for e in manifest.entries if not e.is_keyframe), key=lambda entry: entry.first)
        """The files that hold the steps, in their order."""
        self._keyframes = {entry.first: entry for entry in manifest.entries if entry.is_keyframe}
        self._remote, self._recompute = remote, recompute
        self._written_once = WrittenOnce(directory, lambda: map(self.read, self.segments))

    @classmethod
    def open(cls, directory: str | PathLike[str]) -> "Trajectory":
        """Reads the manifest and checks every file against its hash (about a second for a gigabyte).

        Args:
            directory: The trajectory, or a directory with one in `trajectory/` (a recipe's results; a run of W&B, also
                an offline one); or `wandb:entity/project/name:alias`, of which a file is fetched when it is first
                needed, checked, and kept under its hash for the next time.

        Raises:
            TrajectoryError: A file is missing, torn or altered, or steps are missing between two segments.

        Example:
            >>> import tempfile
            >>> from explaind_track import Trajectory
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     Trajectory.open(directory)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            explaind_track.errors.TrajectoryError: ... holds no trajectory: there is no manifest.json in it
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
        return trajectory

    def __len__(self) -> int:
        """The number of recorded steps."""
        return self.segments[-1].last if self.segments else 0

    def _summary(self) -> Summary:
        return run_summary(self.directory, self.manifest)

    @property
    def fingerprint(self) -> str:
        """A hash that tells this record from any other."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.manifest.entries).encode()).hexdigest()[:32]

    def check_model(self, model: nn.Module) -> None:
        """Compares a model with the one that was trained; in float32 it may be what was trained in bfloat16 or float16.

        Raises:
            ValueError: Its parameters differ from the recorded ones in name, shape or type.
        """
        expected, found = self.manifest.head["parameters"], signature(parameters_of(model))
        names = sorted(name for name in {*expected, *found} if not stands_for(found.get(name), expected.get(name)))
        if not names:
            return
        detail = "; ".join(f"{n}: recorded {expected.get(n)}, model {found.get(n)}" for n in names[:5])
        raise ValueError(f"the model is not the one that {self.directory} records: pass that one. {detail}")

    def steps(self, first: int = 0, last: int | None = None, lasting: bool = False) -> Iterator[Step]:
        """Replays the run from the last keyframe before step `first`, and gives its steps in order.

        Args:
            first: The first step that is given.
            last: The step to end before; all that were recorded, if None.
            lasting: Whether each step is given in tensors of its own; otherwise it is valid until the next.

        Returns:
            Steps first ≤ s < last. Replayed on the CPU. Where something has changed the model behind the record's last
            step, and the window ends there, that comes as a further entry, numbered `len(self)` and `closing`.

        Raises:
            ValueError: The window reaches out of the record.
            TrajectoryError: The replay misses a keyframe, or the files do not hold what they should.

        Example:
            >>> import tempfile, torch
            >>> from explaind_track import Tracker, Trajectory
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
            ...     for _ in range(3):
            ...         with tracker.step():
            ...             optimizer.zero_grad()
            ...             model(torch.ones(1, 2)).sum().backward()
            ...             optimizer.step()
            ...     tracker.finish()
            ...     for step in Trajectory.open(directory).steps(first=1):
            ...         print(step.number, step.parts["kernel"]["bias"].tolist())
            1 [0.5]
            2 [0.5]
        """
        first = require_int("first=", first, 0)
        last = len(self) if last is None else require_int("last=", last, 0)
        self._require(first <= last <= len(self), f"{first} to {last}")
        return self._steps(first, last, lasting)

    def _steps(self, first: int, last: int, lasting: bool) -> Iterator[Step]:
        with blaming_files(self.directory):
            replay = self._at_keyframe(first)
            for step in self._advance(replay, last):
                if step.number >= first:
                    yield replay.observer.lasting(step) if lasting else step

            if last == len(self):
                replay.change(self.outside(last))
                closing = replay.closing()
                if closing is not None:
                    yield replay.observer.lasting(closing) if lasting else closing

    def steps_back(self, first: int, last: int, memory: int) -> Iterator[Step]:
        """Gives the steps in reverse order, in tensors of their own.

        Replays piece by piece: from a keyframe to the next at most, and no more at once than fit into memory.

        Args:
            first: The first step, which is given last.
            last: The step to end before, so that the one before it is given first.
            memory: Bytes that the steps held at once may take; one step is held in any case.

        Returns:
            Steps last > s ≥ first, all of them the optimizer's.
        """
        stop = last
        while stop > first:
            start = self.keyframe(stop - 1)
            factor = 2 if is_low_precision(self.manifest.head["parameters"]) else 1  # a step is told in float32
            each = self._keyframes[start].size * 3 // 2 * factor  # with the gradient
            begin = max(start, first, stop - max(1, memory // each))

            held = [step for step in self.steps(begin, stop, lasting=True) if not step.closing]
            while held:
                yield held.pop()  # so that it is freed once it has served
            stop = begin

    def keyframe(self, step: int) -> int:
        """The last keyframe from which a step can be replayed: the number of the step that it is before."""
        return max(number for number in self._keyframes if number <= step)

    def outside(self, step: int) -> State:
        """Those parameters and buffers, as they were then, that something other than the optimizer has changed between
        the step before and this one; behind the last step (`len(self)`), up to where the record ends."""
        if step == len(self) and step in self._keyframes:
            return self._keyframe(step).outside(step)
        at = (entry for entry in self.segments if entry.first <= step < entry.last)
        return self.read_segment(next(at, self.segments[-1])).outside(step)

    def is_replaced(self, step: int) -> bool:
        """Whether the run went on to a step from a keyframe that does not follow from the steps before it."""
        return step > 0 and step in self._keyframes and not self._keyframe(step).continues

    def replay(self, number: int) -> Replay:
        """The run as it was before step `number` (after all steps, for `len(self)`), able to take that step.

        Raises:
            ValueError: The record does not reach that far.
            TrajectoryError: The replay misses a keyframe.
        """
        number = require_int("the step", number, 0)
        self._require(number <= len(self), str(number))
        with blaming_files(self.directory):
            replay = self._at_keyframe(number)
            for _ in self._advance(replay, number):
                pass
            replay.change(self.outside(number))
            return replay

    # ---------------------------------------------------------------------------------- checkpoints and batches

    def state_dict(self, step: int) -> dict[str, Tensor]:
        """The model's state before a step, as `load_state_dict` takes it.

        Args:
            step: The number of the step; `len(self)` for the state after all of them.

        Raises:
            ValueError: The record does not reach that far.
            TrajectoryError: The replay from the last keyframe misses the next.

        Example:
            >>> import tempfile, torch
            >>> from explaind_track import Tracker, Trajectory
            >>> model = torch.nn.Linear(2, 1)
            >>> _ = torch.nn.init.zeros_(model.bias)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
            ...     for _ in range(3):
            ...         with tracker.step():
            ...             optimizer.zero_grad()
            ...             model(torch.ones(1, 2)).sum().backward()
            ...             optimizer.step()
            ...     tracker.finish()
            ...     trajectory = Trajectory.open(directory)
            ...     [trajectory.state_dict(step)["bias"].item() for step in range(4)]
            [0.0, -0.5, -1.0, -1.5]
        """
        step = require_int("the step", step, 0)
        self._require(step <= len(self), str(step))
        if step in self._keyframes:
            keyframe, changed = self._keyframe(step), self.outside(step)
            tensors = {**keyframe.parameters, **keyframe.buffers, **changed.parameters, **changed.buffers}
        else:
            replay = self.replay(step)
            tensors = {**{name: value.detach() for name, value in replay.parameters.items()}, **replay.buffers}

        tensors |= {name: tensors[first] for name, first in self.manifest.head["aliases"].items()}
        return {name: tensors[name] for name in self.manifest.head["saved"]}

    def batches(self, step: int) -> tuple[Batch, ...]:
        """The batches of a step, with their indices and weights; where there was no index, with the samples themselves.

        Raises:
            ValueError: The record does not have that step.

        Example:
            >>> import tempfile, torch
            >>> from explaind_track import Tracker, Trajectory
            >>> model, x, index = torch.nn.Linear(2, 1), torch.ones(9, 2), torch.tensor([2, 7, 1])
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
            ...     with tracker.step():
            ...         tracker.batch(x[index], index=index)
            ...         model(x[index]).mean().backward()
            ...         optimizer.step()
            ...     tracker.finish()
            ...     (batch,) = Trajectory.open(directory).batches(0)
            >>> batch.index.tolist(), round(batch.weight, 4)
            ([2, 7, 1], 0.3333)
        """
        step = require_int("the step", step, 0)
        self._require(step < len(self), str(step))
        (entry,) = (entry for entry in self.segments if entry.first <= step < entry.last)
        with blaming_files(self.directory):
            return self.read_segment(entry).batches(step)

    def batches_before(self, last: int) -> Iterator[tuple[int, Batch]]:
        """Every batch before step `last`, with the number of its step."""
        with blaming_files(self.directory):
            for entry in self.segments:
                segment = self.read_segment(entry)
                for number in range(entry.first, min(entry.last, last)):
                    for batch in segment.batches(number):
                        yield number, batch

    def random_state(self, step: int | None = None) -> dict[str, Tensor]:
        """The state of the random generators before a step with a keyframe; None: where the record ends. By device."""
        keyframe = self._keyframes.get(len(self) if step is None else step)
        return dict(random_state_in(self.read(keyframe or self.segments[-1])))

    # ----------------------------------------------------------------------------------------------------- files

    def file(self, entry: Entry) -> Path:
        """The file on this disk; fetched, and checked, if it is not here yet."""
        return self.directory / entry.path if self._remote is None else self._remote.locate(entry)

    def read(self, entry: Entry) -> TensorFile:
        """The file, opened."""
        return TensorFile(self.file(entry), self.manifest.largest)

    def read_segment(self, entry: Entry) -> Segment:
        """The segment, opened."""
        file = self.read(entry)
        return Segment(file, entry.first, entry.last, partial(self._written_once.find, file))

    def _keyframe(self, number: int) -> Keyframe:
        file = self.read(self._keyframes[number])
        shapes = {name: shape for name, (shape, _) in self.manifest.head["parameters"].items()}
        if file.shapes("parameter:") != shapes:
            raise TrajectoryError(f"{file.path} has other parameters than its manifest says")
        return Keyframe(file)

    def _at_keyframe(self, step: int) -> Replay:
        """A replay that is to take step `step`, at the last keyframe before it."""
        # what led to a keyframe from outside shows from the step before
        start = self.keyframe(step - 1 if self.is_replaced(step) else step)
        return Replay(self.manifest.head["optimizer"], start, self._keyframe(start))

    def _advance(self, replay: Replay, last: int) -> Iterator[Step]:
        """Lets the replay take its steps up to `last`, and meet every keyframe on the way, that before `last` included.
        Each step is valid until the next is asked for."""
        for entry in self.segments:
            if entry.last <= replay.number or entry.first >= last:
                continue
            for record in self.read_segment(entry).records(replay.number, last):
                with not_blaming_files():
                    record = self.complete(replay, record)
                yield replay.take(record)
                replay.settle()
                if replay.number in self._keyframes:
                    replay.meet(self._keyframe(replay.number))

    def computing(self, recompute: Callable[[Replay, StepRecord], StepRecord]) -> "Trajectory":
        """The same record, with a way to the gradients that were not kept."""
        return Trajectory(self.directory, self.manifest, self._remote, recompute)

    def complete(self, replay: Replay, record: StepRecord) -> StepRecord:
        """The record of the step that the replay takes next, with gradients: computed again where none were kept.

        Raises:
            TrajectoryError: Nobody has said how; see `with_gradients`.
        """
        if record.hashed is None:
            return record
        if self._recompute is None:
            advice = "explaind_track.with_gradients(trajectory, model, sample_loss, data) computes them again"
            raise TrajectoryError(f"{self.directory} holds no gradients: {advice}; its keyframes are to be had without")
        replay.change(record.outside)
        return self._recompute(replay, record)

    def _require(self, inside: bool, asked: str) -> None:
        if not inside:
            raise ValueError(f"the trajectory has the steps 0 to {len(self)}, not {asked}")
