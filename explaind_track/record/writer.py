"""Writes the record of a training run while it trains; `schema` says what is in its files."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from explaind_track.core.modules import buffers_of
from explaind_track.core.observer import StepObserver
from explaind_track.core.rng import random_state
from explaind_track.core.step import State, Step
from explaind_track.core.tensors import Tensors
from explaind_track.errors import TrajectoryError
from explaind_track.record.draft import ONCE, SegmentDraft
from explaind_track.record.files import REMEMBERED, Lock, make_directory
from explaind_track.record.manifest import KEYFRAMES, STEPS, Entry, Manifest
from explaind_track.record.schema import (
    StepRecord,
    checkpoint_tensors,
    head_of,
    keyframe_header,
    outside_tensors,
    random_tensors,
    settings_of,
    share_tensors,
)

KEYFRAME_EVERY = 100
SEGMENT_BYTES = 2**26


@dataclass(frozen=True)
class TakeUpPoint:
    """Where the run could be taken up."""

    number: int
    """Of the step that would come next: all before it are behind."""
    random: Tensors
    """The state of the random generators."""
    buffers: Tensors
    """The model's."""
    changed: State | None
    """What had been changed from outside since the last step; None: what is changed now."""


class TrajectoryWriter:
    """Writes the steps of a live run, segment by segment. What is on disk is a whole trajectory at any moment.

    So is what is in memory, between any two instructions, whatever interrupts them: a step that is added is not written
    before the take-up point is behind it, and that is moved by a single assignment.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        model: nn.Module,
        observer: StepObserver,
        keyframe_every: int = KEYFRAME_EVERY,
        entries: Sequence[Entry] | None = None,
        head: Mapping[str, Any] | None = None,
        gradients: bool = True,
        compress: bool = False,
    ) -> None:
        """entries: the files of a trajectory in the directory that is to be gone on with; None: it begins here. head:
        what the manifest says of the run as a whole; None: what model and observer tell. gradients: whether they are
        kept of every step; else only a hash is, where they can be computed again from the step's batches. compress:
        whether gradients are packed.

        Raises FileExistsError if one begins in a directory that holds anything: a run is never written over;
        TrajectoryError if another process is writing there, or if nothing can be written.
        """
        self.directory = Path(directory)
        if entries is None and self.directory.exists() and any(self.directory.iterdir()):
            Lock(self.directory).release()  # where it is being written, that is what to tell of
            raise FileExistsError(
                f"{self.directory} is not empty; name a new directory, remove that one first, or go on with the run in "
                "it by Tracker(…, resume=True)"
            )
        self._observer, self._every = observer, keyframe_every
        self.keeps_gradients, self._compress = gradients, compress
        self._model = model
        self._device = next(model.parameters()).device

        kind = {} if gradients else {"record": "batches"}
        self._manifest = Manifest({**(head or head_of(model, observer)), **kind}, tuple(entries or ()))
        self._keyframes = {entry.first for entry in self._manifest.entries if entry.is_keyframe}
        self._written_once: dict[str, None] = {}
        """The names of the last indices and weights that were written."""
        self._draft = SegmentDraft(self._manifest.steps, self._written_once)
        """Steps that are not written yet. Where something else changes the model between steps, the last is behind the
        take-up point only when the next begins."""
        self._point = TakeUpPoint(self._manifest.steps, random_state(self._device), self._model_buffers, None)

        try:
            make_directory(self.directory)
        except OSError as error:
            raise TrajectoryError(f"{self.directory} cannot be made: {error}") from error
        whose = f"{type(model).__name__} with {type(observer.optimizer).__name__}"
        self._lock = Lock(self.directory, f"call finish() on the Tracker of {whose}, made at {datetime.now():%H:%M:%S}")
        self._manifest.write(self.directory)

    @property
    def _model_buffers(self) -> Tensors:
        """The model's as they are now; it may have been given others (averaging weights resets batch norms so)."""
        return buffers_of(self._model)

    def begin(self, number: int, buffers: Tensors) -> None:
        """As step `number` begins, before anything random is drawn for it: this is where the run could be taken up.

        buffers: as they are now; they have to last as long as the step.
        """
        # a sweep over the parameters that is paid only where something is written, or something was changed before
        kept = self._observer.kept
        looks = kept.restless or self._is_due(number)
        self._take_up_at(number, buffers, kept.changes(buffers).copy() if looks else None)
        if self._draft.size >= SEGMENT_BYTES:
            self._write_segment()

    def pass_over(self, number: int, buffers: Tensors) -> None:
        """As `begin`, where the optimizer has moved since step `number` − 1 in a step that is not recorded: the run can
        be taken up from where that has led to, and no more as it was before."""
        self._write_segment()
        self._take_up_at(number, buffers, self._observer.kept.changes(buffers).copy())
        self._write_keyframe(continues=False)

    def _take_up_at(self, number: int, buffers: Tensors, changed: State | None = None) -> None:
        """Lets the run be taken up here, behind the steps before `number`."""
        self._point = TakeUpPoint(number, random_state(self._device), buffers, changed)

    def _is_due(self, number: int) -> bool:
        return number % self._every == 0 and number not in self._keyframes

    def before(self, number: int) -> None:
        """Right before the optimizer takes step `number`, with the observer ready: writes a keyframe where one is due,
        or where the optimizer's state may have been changed since its last step."""
        changed = self._observer.kept.changed
        if self._point.changed is None:
            self._point = replace(self._point, changed=changed)

        continues = self._observer.continues(changed)
        if number in self._keyframes:
            is_wanted = not self._observer.keeps_state(changed)  # something has changed it since that was written
        else:
            is_wanted = self._is_due(number) or not continues
        if is_wanted:
            self._write_segment()
            self._write_keyframe(continues)

    def add(self, step: Step, buffers_moved: bool, auxiliary: Mapping[str, Tensors]) -> None:
        """Takes in the step that was just made; it counts once `reach` is told of it. auxiliary: the gradients that
        went into the StepObserver before it."""
        gradients = {}
        for name in step.updates:
            gradient = self._observer.parameters[name].grad
            assert gradient is not None  # it has an update, so it had a gradient
            gradients[name] = gradient.detach().clone() if self.keeps_gradients else gradient.detach()
        buffers = State({}, self._model_buffers if buffers_moved else {}).copy().buffers
        settings = settings_of(self._observer)
        outside = State({}, {}) if step.outside is None else step.outside.changed.copy()
        frozen = tuple(name for name, update in step.updates.items() if update.frozen)
        record = StepRecord(settings, outside, gradients, auxiliary, buffers, step.batches, frozen)
        self._draft.add(step.number, record if self.keeps_gradients else record.without_gradients())

    def reach(self, number: int) -> None:
        """Lets the run be taken up right behind the last step: `number` are recorded."""
        if not self._observer.kept.restless:
            self._take_up_at(number, self._model_buffers)
        if self._draft.size >= SEGMENT_BYTES:
            self._write_segment()

    def flush(self, number: int) -> None:
        """Writes what is pending of the `number` recorded steps; after it, nothing of them can be lost."""
        if self._point.number < number:
            self._take_up_at(number, self._model_buffers)
        self._write_segment()

    def leave(self) -> None:
        """As the process goes: writes all that the run can be taken up behind.

        Where something else changes the model between steps, the last step is not written before the next begins: what
        would have changed the model behind it may not have come to it.
        """
        self._write_segment()

    def _write_segment(self) -> None:
        point, draft = self._point, self._draft
        if point.number <= draft.first:
            return
        changed = self._observer.kept.changes(point.buffers) if point.changed is None else point.changed
        tensors, header = draft.until(point.number)
        more = outside_tensors(point.number, changed) | random_tensors(point.random)
        self._write(STEPS, draft.first, point.number, tensors | more, header)

        self._written_once |= {name: None for name in tensors if name.startswith(ONCE)}
        while len(self._written_once) > REMEMBERED:
            del self._written_once[next(iter(self._written_once))]
        self._draft = draft.rest(point.number, self._written_once)

    def close(self, number: int) -> None:
        """Ends the record behind step number − 1, with a keyframe that proves the last steps."""
        if self._point.number < number:
            self._take_up_at(number, self._model_buffers)
        if not self._observer.kept.is_known:  # no step was taken, or the end of the last one was not kept
            self._observer.restart(self._model_buffers)
        changed = self._observer.kept.changes(self._model_buffers)
        self._point = replace(self._point, buffers=self._model_buffers, changed=changed)

        self._write_segment()
        if number not in self._keyframes or not changed.is_empty:
            self._write_keyframe(self._observer.continues(changed))
        self.release()

    def release(self) -> None:
        """Lets other processes write here."""
        self._lock.release()

    def _write_keyframe(self, continues: bool) -> None:
        """Writes one of where the run could be taken up. continues: whether it follows from the steps before it, so
        that it can prove their replay."""
        number, changed = self._point.number, self._point.changed
        assert changed is not None  # known wherever a keyframe is written
        tensors = (
            checkpoint_tensors(self._observer, self._observer.kept.left)
            | share_tensors(self._observer)
            | outside_tensors(number, changed)
            | random_tensors(self._point.random)
        )
        self._write(KEYFRAMES, number, number, tensors, keyframe_header(self._observer, continues))
        self._keyframes.add(number)

    def _write(self, folder: str, first: int, last: int, tensors: Mapping[str, Tensor], header: Any) -> None:
        """Writes a file and enters it into the manifest, in the place of the one that holds the same step already: of a
        keyframe that something has changed the model behind, or of a segment that an interruption came to."""
        entry = Entry.write(self.directory, folder, first, last, tensors, header, self._compress)
        same = [other for other in self._manifest.entries if (other.folder, other.first) == (folder, first)]
        others = (other for other in self._manifest.entries if other not in same)
        manifest = Manifest(self._manifest.head, (*others, entry))

        manifest.write(self.directory)
        self._manifest = manifest
        for before in same:
            with suppress(OSError):  # left over, it is removed when the run is resumed
                (self.directory / before.path).unlink()
