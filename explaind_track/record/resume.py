"""Going on with a run that has ended before its time, as if it had not."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from explaind_track.core.observer import StepObserver
from explaind_track.core.rng import set_random_state
from explaind_track.core.tensors import same_bits
from explaind_track.errors import ResumeWarning
from explaind_track.record import files
from explaind_track.record.files import Entry, TensorFile
from explaind_track.record.history import HISTORY, steps_logged
from explaind_track.record.replay import Replay
from explaind_track.record.run_directory import FINISHED, TIE
from explaind_track.record.trajectory import Trajectory
from explaind_track.record.writer import FORMAT, head_of


def resume(directory: Path, model: nn.Module, observer: StepObserver, at: Literal[True] | int) -> Trajectory | None:
    """Takes up the run in `directory`; the trajectory that is returned ends where training is to go on. None where
    there is nothing to take up, since no run has got as far as its first step there.

    at: True puts the model, the optimizer's state and the random state where the record ends. A number says that the
    caller has put them where step `at` begins; they are compared with the record, bit for bit, and what the record
    holds of later steps is dropped. Learning rates and other settings stay as the loop has made them.

    Raises ValueError if model or optimizer are not those of the record; TrajectoryError if it cannot be read, or if
    another process is writing to it.
    """
    if not directory.is_dir():
        return None
    lock = files.Lock(directory)
    try:
        if _only_begun(directory):
            return None
        trajectory = Trajectory.open(directory)
        if trajectory.directory != directory:
            raise ValueError(f"{directory} has its trajectory in {trajectory.directory}: go on with that")
        head = head_of(model, observer)
        for key in ("optimizer", "parameters", "buffers", "aliases"):
            if head[key] != trajectory.head[key]:
                raise ValueError(f"the run in {directory} has other {key}: {trajectory.head[key]}, here {head[key]}")
        if at is True:
            replay = trajectory.replay(len(trajectory))
            _load(replay, model, observer)
            set_random_state(trajectory.random_state())
            _tell_of_lost_steps(directory, len(trajectory))
        else:
            replay = trajectory.replay(at)
            _compare(replay, model, observer, at)
            trajectory = _cut(trajectory, at)
    finally:
        lock.release()
    observer.go_on(replay.observer.momentum_shares, dict(model.named_buffers()))
    return trajectory


def _only_begun(directory: Path) -> bool:
    """Whether no step has been written; what an interrupted beginning has left is removed then."""
    for path in directory.rglob("*.part"):
        path.unlink()
    manifest = directory / files.MANIFEST
    if manifest.is_file():
        if files.read_manifest(directory, FORMAT)[1]:
            return False
        manifest.unlink()
        for name in (HISTORY, TIE, FINISHED):
            (directory / name).unlink(missing_ok=True)
    for folder in ("keyframes", "steps"):
        if (directory / folder).is_dir() and not any((directory / folder).iterdir()):
            (directory / folder).rmdir()
    return not any(directory.iterdir())


@torch.no_grad()
def _load(replay: Replay, model: nn.Module, observer: StepObserver) -> None:
    for name, parameter in observer.parameters.items():
        parameter.copy_(replay.parameters[name])
    for name, buffer in model.named_buffers():
        buffer.copy_(replay.buffers[name])
    for name, parameter in observer.parameters.items():
        state = replay.optimizer.state.get(replay.parameters[name])
        if state:
            observer.optimizer.state[parameter] = {
                key: value.clone().to(_place(value, parameter)) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _place(value: Tensor, parameter: Tensor) -> torch.device:
    """Where an optimizer keeps a tensor: what is of the parameter's shape beside it, step counts where they were."""
    return parameter.device if value.shape == parameter.shape and value.ndim else value.device


def _compare(replay: Replay, model: nn.Module, observer: StepObserver, at: int) -> None:
    found = {f"parameter {name}": value.detach() for name, value in observer.parameters.items()}
    found |= {f"buffer {name}": value for name, value in model.named_buffers()}
    wanted = {f"parameter {name}": value.detach() for name, value in replay.parameters.items()}
    wanted |= {f"buffer {name}": value for name, value in replay.buffers.items()}
    for name, parameter in observer.parameters.items():
        for key, value in replay.optimizer.state.get(replay.parameters[name], {}).items():
            if isinstance(value, Tensor):
                wanted[f"{key} of {name}"] = value
                found[f"{key} of {name}"] = observer.optimizer.state.get(parameter, {}).get(key, torch.empty(0))
    other = [
        name
        for name, value in wanted.items()
        if found[name].shape != value.shape or not same_bits(found[name].to(value), value)
    ]
    if other:
        raise ValueError(
            f"the model and the optimizer are not what the record says they were before step {at}: they differ in "
            f"{', '.join(other[:5])}{' and others' if len(other) > 5 else ''}. Load the checkpoint of that step "
            "first, or let resume=True go on from the end of the record"
        )


def _cut(trajectory: Trajectory, at: int) -> Trajectory:
    """The trajectory without the steps from `at` on, on disk too."""
    kept: list[Entry] = []
    for entry in trajectory.entries:
        whole = entry.last <= at
        if whole:
            kept.append(entry)
        elif entry.path.startswith("steps/") and entry.first < at:
            kept.append(_shorten(trajectory.directory, entry, at))
    dropped = {entry.path for entry in trajectory.entries} - {entry.path for entry in kept}
    files.write_manifest(trajectory.directory, trajectory.head, kept)
    for path in dropped:
        (trajectory.directory / path).unlink()
    return Trajectory(trajectory.directory, trajectory.head, kept)


def _shorten(directory: Path, entry: Entry, at: int) -> Entry:
    """The segment without the steps from `at` on, written beside the old one first, under another name."""
    file = TensorFile(directory / entry.path, torch.device("cpu"))
    steps = file.header["steps"][: at - entry.first]
    late = tuple(
        f"{kind}:{number}:" for kind in ("gradient", "auxiliary", "buffer", "batch") for number in range(at, entry.last)
    )
    tensors = {name: file[name] for name in file.names if not name.startswith(late)}
    written = files.write_tensors(directory, entry.path + ".cut", entry.first, at, tensors, {"steps": steps})
    (directory / written.path).replace(directory / entry.path)
    return replace(written, path=entry.path)


def _tell_of_lost_steps(directory: Path, number: int) -> None:
    reached = max(steps_logged(directory), default=-1)
    if reached >= number:
        warnings.warn(
            f"steps {number} to {reached} were trained before the run ended, but had not been written to {directory}; "
            f"training goes on from step {number}",
            ResumeWarning,
            stacklevel=4,
        )
