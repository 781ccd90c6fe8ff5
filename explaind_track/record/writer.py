"""Writes the record of a training run while it trains; `schema` says what is in its files."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from explaind_track.record.files import Lock, make_directory
from explaind_track.record.manifest import KEYFRAMES, STEPS, Entry, Manifest
from explaind_track.record.schema import (
    SegmentDraft,
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


class TrajectoryWriter:
    """Writes the steps of a live run, segment by segment. What is on disk is a whole trajectory at any moment."""

    def __init__(
        self,
        directory: str | PathLike[str],
        model: nn.Module,
        observer: StepObserver,
        keyframe_every: int = KEYFRAME_EVERY,
        entries: Sequence[Entry] | None = None,
        head: Mapping[str, Any] | None = None,
    ) -> None:
        """entries: the files of a trajectory in the directory that is to be gone on with; None: it begins here. head:
        what the manifest says of the run as a whole; None: what model and observer tell.

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
        self._model = model
        self._device = next(model.parameters()).device

        # where the run could be taken up
        self._random: Tensors = {}
        self._buffers: Tensors = self._model_buffers
        self._changed: State | None = None
        """What had been changed from outside since the last step; None: what is changed now."""

        self._manifest = Manifest(head or head_of(model, observer), tuple(entries or ()))
        self._keyframes = {entry.first for entry in self._manifest.entries if entry.is_keyframe}
        self._written_once: set[str] = set()
        self._draft = SegmentDraft(self._written_once)
        self._last = SegmentDraft(self._written_once)
        """The last step, where something else may change the model behind it: the run can be taken up before that step
        until the next one begins."""

        try:
            make_directory(self.directory)
        except OSError as error:
            raise TrajectoryError(f"{self.directory} cannot be made: {error}") from error
        self._lock = Lock(self.directory)
        self._manifest.write(self.directory)

    @property
    def _model_buffers(self) -> Tensors:
        """The model's as they are now; it may have been given others (averaging weights resets batch norms so)."""
        return buffers_of(self._model)

    def begin(self, number: int, buffers: Tensors) -> None:
        """As step `number` begins, before anything random is drawn for it: this is where the run could be taken up.

        buffers: as they are now; they have to last as long as the step.
        """
        self._take_up_at(buffers)

        # a sweep over the parameters that is paid only where something is written, or something was changed before
        if self._observer.kept.restless or self._is_due(number):
            self._changed = self._observer.kept.changes(buffers).copy()
        if self._draft.size >= SEGMENT_BYTES:
            self._write_segment()

    def _take_up_at(self, buffers: Tensors) -> None:
        """Lets the run be taken up here, behind all steps so far."""
        self._draft.extend(self._last)
        self._last = SegmentDraft(self._written_once)
        self._random, self._buffers, self._changed = random_state(self._device), buffers, None

    def _is_due(self, number: int) -> bool:
        return number % self._every == 0 and number not in self._keyframes

    def before(self, number: int) -> None:
        """Right before the optimizer takes step `number`, with the observer ready: writes a keyframe where one is due,
        or where the optimizer's state may have been changed since its last step."""
        if self._changed is None:
            self._changed = self._observer.kept.changed
        continues = self._observer.continues(self._observer.kept.changed)
        if self._is_due(number) or (not continues and number not in self._keyframes):
            self._write_segment()
            self._write_keyframe(number, self._changed, continues)

    def record(self, step: Step, buffers_moved: bool, auxiliary: Mapping[str, Tensors]) -> None:
        """Takes in the step that was just made. auxiliary: the gradients that went into the StepObserver before it."""
        gradients = {}
        for name in step.updates:
            gradient = self._observer.parameters[name].grad
            assert gradient is not None  # it has an update, so it had a gradient
            gradients[name] = gradient.detach().clone()
        buffers = State({}, self._model_buffers if buffers_moved else {}).copy().buffers
        settings = settings_of(self._observer)
        outside = State({}, {}) if step.outside is None else step.outside.changed.copy()
        frozen = tuple(name for name, update in step.updates.items() if update.frozen)
        record = StepRecord(settings, outside, gradients, auxiliary, buffers, step.batches, frozen)
        if self._observer.kept.restless:
            self._last.add(step.number, record)
            return

        self._draft.add(step.number, record)
        self._take_up_at(self._model_buffers)
        if self._draft.size >= SEGMENT_BYTES:
            self._write_segment()

    def flush(self) -> None:
        """Writes what is pending; after it, nothing of the steps so far can be lost."""
        if self._last.steps:
            self._take_up_at(self._model_buffers)
        self._write_segment()

    def leave(self) -> None:
        """As the process goes: writes all that the run can be taken up behind.

        Where something else changes the model between steps, the last step is not written before the next begins: what
        would have changed the model behind it may not have come to it.
        """
        self._write_segment()

    def _write_segment(self) -> None:
        draft = self._draft
        if not draft.steps:
            return
        first, last = draft.first, draft.first + len(draft.steps)
        changed = self._observer.kept.changes(self._buffers) if self._changed is None else self._changed
        tensors = draft.tensors | outside_tensors(last, changed) | random_tensors(self._random)
        self._write(STEPS, first, last, tensors, {"steps": draft.steps})
        self._draft = SegmentDraft(self._written_once)

    def close(self, number: int) -> None:
        """Ends the record behind step number − 1, with a keyframe that proves the last steps."""
        self._buffers, self._changed = self._model_buffers, None
        self.flush()
        if not self._observer.kept.has_begun:  # no step was taken: the run ends where it would have begun
            self._observer.kept.restart(self._buffers)
        changed = self._observer.kept.changes(self._buffers)
        if number not in self._keyframes or not changed.is_empty:
            self._write_keyframe(number, changed, self._observer.continues(changed))
        self._lock.release()

    def _write_keyframe(self, number: int, changed: State, continues: bool) -> None:
        """changed: from outside, where the run could be taken up. continues: whether the keyframe follows from the
        steps before it, so that it can prove their replay."""
        tensors = (
            checkpoint_tensors(self._observer, self._observer.kept.left)
            | share_tensors(self._observer)
            | outside_tensors(number, changed)
            | random_tensors(self._random)
        )
        self._write(KEYFRAMES, number, number, tensors, keyframe_header(self._observer, continues))
        self._keyframes.add(number)

    def _write(self, folder: str, first: int, last: int, tensors: Mapping[str, Tensor], header: Any) -> None:
        """Writes a file and enters it into the manifest, in the place of the one that holds the same step already: of a
        keyframe that something has changed the model behind, or of a segment that an interruption came to."""
        entry = Entry.write(self.directory, folder, first, last, tensors, header)
        same = [other for other in self._manifest.entries if (other.folder, other.first) == (folder, first)]
        others = (other for other in self._manifest.entries if other not in same)
        manifest = Manifest(self._manifest.head, (*others, entry))

        manifest.write(self.directory)
        self._manifest = manifest
        for before in same:
            with suppress(OSError):  # left over, it is removed when the run is resumed
                (self.directory / before.path).unlink()
