"""The record of a rerun: a trajectory of its own, which begins as that of the run and says where it comes from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from explaind_track.core.step import Step
from explaind_track.core.tensors import Tensors
from explaind_track.engine.step_predictions import buffers_moved
from explaind_track.record.replay import Replay
from explaind_track.record.trajectory import Trajectory
from explaind_track.record.writer import TrajectoryWriter
from explaind_track.what_if.changes import Change
from explaind_track.what_if.fork import fork


class Replayed(nn.Module):
    """A replay's tensors, as a module has them."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self._replay = replay

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        return iter(self._replay.buffers.items())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self._replay.parameters.values())


class Recording:
    """Writes the steps of a rerun."""

    def __init__(self, trajectory: Trajectory, replay: Replay, changes: Sequence[Change], directory: Path) -> None:
        """Raises FileExistsError if the directory holds anything."""
        entries = fork(trajectory, replay.number, directory)
        lineage = {
            "run": trajectory.fingerprint,
            "directory": trajectory.artifact or str(trajectory.directory.resolve()),
            "start": replay.number,
            "changes": [repr(change) for change in changes],
        }
        head = {**trajectory.manifest.head, "lineage": lineage}
        self._replay, self._directory = replay, directory
        self._writer = TrajectoryWriter(
            directory, Replayed(replay), replay.observer, _spacing(trajectory), entries, head=head
        )
        self._hook = replay.optimizer.register_step_pre_hook(lambda *_: self._writer.before(replay.number))

    def begin(self, number: int) -> None:
        """As a step begins."""
        self._writer.begin(number, {name: buffer.clone() for name, buffer in self._replay.buffers.items()})

    def record(self, step: Step, auxiliary: dict[str, Tensors]) -> None:
        """Right behind the optimizer's step."""
        self._writer.add(step, buffers_moved(step), auxiliary)
        self._writer.reach(step.number + 1)

    def close(self) -> Trajectory:
        """Ends the record, and opens it."""
        self._hook.remove()
        self._writer.close(self._replay.number)
        return Trajectory.open(self._directory)


def _spacing(trajectory: Trajectory) -> int:
    """Steps from one keyframe of the run to the next."""
    first, *others = sorted(entry.first for entry in trajectory.manifest.entries if entry.is_keyframe)
    return min((other - first for other in others), default=len(trajectory)) or 1
