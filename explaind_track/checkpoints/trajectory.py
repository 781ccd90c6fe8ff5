"""Our own record of a run: its keyframes are checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.errors import CheckpointError, TrajectoryError
from explaind_track.record.manifest import MANIFEST
from explaind_track.record.trajectory import Trajectory

ENDS = "the record ends here, and nothing tells whether a scheduler was to change the rate for the step that comes next"


class TrajectoryCheckpoint(Checkpoint):
    """The run before one of the steps of a trajectory."""

    format = "trajectory"

    def __init__(self, path: Path, step: int, trajectory: Trajectory) -> None:
        super().__init__(path, step)
        self._trajectory = trajectory

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        folder = next((folder for folder in (path, path / "trajectory") if (folder / MANIFEST).is_file()), None)
        if folder is None:
            return ()
        try:
            trajectory = Trajectory.open(folder)
        except TrajectoryError as error:
            raise CheckpointError(str(error)) from error
        return [cls(folder, entry.first, trajectory) for entry in trajectory.manifest.entries if entry.is_keyframe]

    def weights(self) -> Mapping[str, Tensor]:
        return self._trajectory.state_dict(self.step)

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        try:
            self._trajectory.check_model(model)
            replay = self._trajectory.replay(self.step)
        except (TrajectoryError, ValueError) as error:
            raise CheckpointError(str(error)) from error

        state = {name: replay.optimizer.state[parameter] for name, parameter in replay.parameters.items()}
        held = {name: entries for name, entries in state.items() if entries}
        groups = self._recorded_groups()
        if groups is not None:
            return SavedOptimizer(type(replay.optimizer), groups, held)

        names = {id(parameter): name for name, parameter in replay.parameters.items()}
        last = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in replay.optimizer.param_groups
        ]
        return SavedOptimizer(type(replay.optimizer), last, held, [ENDS])

    def _recorded_groups(self) -> list[dict[str, Any]] | None:
        """The settings of the step that comes next, as the run has recorded it; None behind the last step."""
        for entry in self._trajectory.segments:
            if entry.first <= self.step < entry.last:
                (record,) = self._trajectory.read_segment(entry).records(self.step, self.step + 1)
                return [dict(group) for group in record.settings]
        return None
