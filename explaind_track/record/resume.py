"""Going on with a run that has ended before its time, as if it had not."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explaind_track.core.modules import buffers_of
from explaind_track.core.observer import StepObserver
from explaind_track.core.rng import random_state, set_random_state
from explaind_track.core.step import State
from explaind_track.core.tensors import same_bits
from explaind_track.errors import ResumeWarning
from explaind_track.record.files import Lock
from explaind_track.record.history import HISTORY, steps_logged
from explaind_track.record.manifest import KEYFRAMES, MANIFEST, PATHS, STEPS, Entry, Manifest
from explaind_track.record.replay import Replay
from explaind_track.record.run_directory import FINISHED, TIE, is_finished
from explaind_track.record.schema import (
    checkpoint_tensors,
    head_of,
    model_tensors,
    outside_tensors,
    random_tensors,
)
from explaind_track.record.trajectory import Trajectory
from explaind_track.record.validation import file_below


def resume(
    directory: Path, model: nn.Module, observer: StepObserver, at: Literal[True] | int, gradients: bool
) -> Trajectory | None:
    """Takes up the run in `directory`; the trajectory that is returned ends where training is to go on. None where
    there is nothing to take up, since no run has got as far as its first step there.

    at: True puts the model, the optimizer's state and the random state where the record ends. A number says that the
    caller has put them where step `at` begins; they are compared with the record, bit for bit, and what the record
    holds of later steps is dropped. Learning rates and other settings stay as the loop has made them.
    gradients: whether they are kept of every step; a record without them is gone on with from its keyframes only.

    Raises ValueError if model or optimizer are not those of the record, or its kind is another; TrajectoryError if it
    cannot be read, or if another process is writing to it.
    """
    if not directory.is_dir():
        return None

    lock = Lock(directory)
    try:
        if _only_begun(directory):
            return None
        trajectory = Trajectory.open(directory)
        _check_run(trajectory, directory, head_of(model, observer))
        _check_kind(trajectory, directory, gradients)

        number = _place_in(trajectory, at, gradients)
        replay = trajectory.replay(number)
        if at is True:
            _load(replay, model, observer)
            set_random_state(trajectory.random_state(number))
            _tell_of_lost_steps(directory, number, len(trajectory))
        else:
            _compare(replay, model, observer, number)

        observer.go_on(replay.observer, buffers_of(model))
        if at is not True or number < len(trajectory):
            changed = observer.kept.changes(buffers_of(model))
            trajectory = _cut(trajectory, number, changed, next(model.parameters()).device)
    finally:
        lock.release()
    return trajectory


def _check_run(trajectory: Trajectory, directory: Path, head: Mapping[str, Any]) -> None:
    """Raises ValueError unless the trajectory is that of `directory`, and of the model and optimizer in `head`."""
    if trajectory.directory != directory:
        raise ValueError(f"{directory} has its trajectory in {trajectory.directory}: go on with that")
    recorded = trajectory.manifest.head
    for key in ("optimizer", "parameters", "buffers", "aliases"):
        if head[key] != recorded[key]:
            raise ValueError(f"the run in {directory} has other {key}: {recorded[key]}, here {head[key]}")


def _check_kind(trajectory: Trajectory, directory: Path, gradients: bool) -> None:
    """Raises ValueError where the record keeps something else of its steps than is to be kept now."""
    if gradients == (trajectory.manifest.head.get("record") == "batches"):
        kind, other = ("batches", "gradients") if gradients else ("gradients", "batches")
        raise ValueError(
            f'the run in {directory} was recorded with record="{kind}", and is gone on with so: not with '
            f'record="{other}"'
        )


def _place_in(trajectory: Trajectory, at: Literal[True] | int, gradients: bool) -> int:
    """The step that the run goes on from. Raises ValueError for one that the record cannot be gone on with from."""
    if gradients:
        return len(trajectory) if at is True else at
    keyframes = [entry.first for entry in trajectory.manifest.entries if entry.is_keyframe]
    places = sorted(number for number in keyframes if not trajectory.is_replaced(number))
    if at is not True and at not in places:
        shown = ", ".join(map(str, places[-5:]))
        raise ValueError(
            f'record="batches" keeps no gradients, so that a run is gone on with from its keyframes only (the last '
            f"ones are before the steps {shown}), not from step {at}; resume=True takes the last"
        )
    return places[-1] if at is True else at


def _only_begun(directory: Path) -> bool:
    """Whether no step has been written. What interruptions have left is removed: files half written, files that the
    manifest does not name, and all of a beginning without a step."""
    for path in directory.rglob("*.part"):
        path.unlink()

    # without a manifest nobody can tell which files are left over
    if (directory / MANIFEST).is_file():
        entries = Manifest.read(directory).entries
        named = {entry.path for entry in entries}
        for path in directory.glob("*/*"):
            name = path.relative_to(directory).as_posix()
            if PATHS.fullmatch(name) and name not in named:
                file_below(directory, name).unlink()
        if entries:
            return False

        # neither the rows nor the W&B run are any that could be gone on with; the manifest goes last
        for name in (HISTORY, TIE, FINISHED, MANIFEST):
            (directory / name).unlink(missing_ok=True)

    for folder in (KEYFRAMES, STEPS):
        if (directory / folder).is_dir() and not any((directory / folder).iterdir()):
            (directory / folder).rmdir()
    return not any(directory.iterdir())


@torch.no_grad()
def _load(replay: Replay, model: nn.Module, observer: StepObserver) -> None:
    """Puts the model and the optimizer's state where the replay is."""
    for name, parameter in observer.parameters.items():
        parameter.copy_(replay.parameters[name])
    for name, buffer in buffers_of(model).items():
        buffer.copy_(replay.buffers[name])

    for name, parameter in observer.parameters.items():
        state = replay.optimizer.state.get(replay.parameters[name])
        if state:
            observer.optimizer.state[parameter] = {
                key: value.clone().to(_place(value, parameter)) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _place(value: Tensor, parameter: Tensor) -> torch.device:
    """The device of an optimizer's tensor: the parameter's if it has its shape; a step count stays where it was."""
    return parameter.device if value.shape == parameter.shape and value.ndim else value.device


def _compare(replay: Replay, model: nn.Module, observer: StepObserver, at: int) -> None:
    """Raises ValueError unless model and optimizer are, bit for bit, as they were before step `at`.

    What was changed from outside since the step before may have been so in part, or not yet: it is told as it is.
    """
    found = checkpoint_tensors(observer, State(observer.parameters, buffers_of(model)))
    wanted = checkpoint_tensors(replay.observer, replay.observer.kept.left)
    changed = model_tensors(replay.observer.kept.changes(replay.buffers))
    other = [name for name, value in wanted.items() if name not in changed and not _same(found.get(name), value)]
    if other:
        raise ValueError(
            f"the model and the optimizer are not what the record says they were before step {at}: they differ in "
            f"{', '.join(other[:5])}{' and others' if len(other) > 5 else ''}. Load the checkpoint of that step "
            "first, or let resume=True go on from the end of the record"
        )


def _same(found: Tensor | None, recorded: Tensor) -> bool:
    return found is not None and found.shape == recorded.shape and same_bits(found.to(recorded), recorded)


def _cut(trajectory: Trajectory, at: int, changed: State, device: torch.device) -> Trajectory:
    """The trajectory without the steps from `at` on, on disk too. What is on disk is a whole one at any moment.

    changed: what was changed from outside since step `at` − 1. device: of the model, whose random state is put down as
    that before step `at`.
    """
    directory, manifest = trajectory.directory, trajectory.manifest

    kept = [entry for entry in manifest.entries if entry.last <= at]
    for entry in trajectory.segments:
        if entry.first < at < entry.last:
            tensors, header = trajectory.read_segment(entry).before(at)
            tensors |= outside_tensors(at, changed) | random_tensors(random_state(device))
            kept.append(Entry.write(directory, STEPS, entry.first, at, tensors, header))

    shortened = Manifest(manifest.head, tuple(kept))
    shortened.write(directory)
    for path in {entry.path for entry in manifest.entries} - {entry.path for entry in kept} | {FINISHED}:
        with suppress(OSError):  # left over, it is removed when the run is resumed
            (directory / path).unlink()
    return Trajectory(directory, shortened)


def _tell_of_lost_steps(directory: Path, number: int, recorded: int) -> None:
    reached = max(*steps_logged(directory), recorded - 1, -1)
    if reached == number == recorded and is_finished(directory, number):
        return  # that is the row of what came behind the last step
    if reached >= number:
        lost = f"had not been written to {directory}" if number == recorded else "are behind the record's last keyframe"
        warnings.warn(
            f"steps {number} to {reached} were trained before the run ended, but {lost}; training goes on from step "
            f"{number}",
            ResumeWarning,
            stacklevel=4,
        )
