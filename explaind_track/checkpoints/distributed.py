"""Folders of `torch.distributed.checkpoint`, as FSDP writes them: by the Trainer, by Accelerate, or by a loop."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.model_files import has_model, read_model
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.state_dict import optimizer_class
from explaind_track.checkpoints.step_number import require_step, step_by_trainer
from explaind_track.checkpoints.trainer import require_rates
from explaind_track.errors import CheckpointError

CONTENTS = ".metadata"
MODEL, OPTIMIZER, SCHEDULER = "pytorch_model_fsdp_0", "optimizer_0", "scheduler.pt"
"""The folders of Accelerate and the Trainer; a loop of one's own writes both into one."""


class DistributedCheckpoint(Checkpoint):
    """Sharded tensors with a table of contents, put together again."""

    format = "torch.distributed"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        folders = [folder for folder in (path / MODEL, path / OPTIMIZER, path) if (folder / CONTENTS).is_file()]
        if not folders:
            return ()
        step = step_by_trainer(path) if step is None else step
        told = [_steps_taken(folder) for folder in folders] if step is None else []
        return (cls(path, require_step(path, step, *told)),)

    def weights(self) -> Mapping[str, Tensor]:
        if not (self.path / MODEL / CONTENTS).is_file() and has_model(self.path):
            return read_model(self.path)
        from explaind_track.checkpoints.distributed_files import names_in, read_entries

        folder = _folder(self.path, MODEL)
        of_model = [name for name in names_in(folder) if name.startswith("model.")]
        if not of_model:
            raise CheckpointError(f"{folder} holds no model: its tensors are not named 'model.…'")
        return {name.removeprefix("model."): value for name, value in read_entries(folder, of_model).items()}

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        from explaind_track.checkpoints.distributed_files import names_in, read_entries

        folder = _folder(self.path, OPTIMIZER)
        if not (folder / CONTENTS).is_file():
            return None
        prefixes = {name.split(".", 1)[0] for name in names_in(folder) if name.startswith("opt")}
        if not prefixes:
            return None
        prefix = prefixes.pop()
        content = read_entries(folder, [name for name in names_in(folder) if name.startswith(f"{prefix}.")])

        state: dict[str, dict[str, Any]] = {}
        for name, value in _below(content, f"{prefix}.state."):
            parameter, key = name.rsplit(".", 1)
            state.setdefault(parameter, {})[key] = value
        groups = _groups(dict(_below(content, f"{prefix}.param_groups.")), content.get(f"{prefix}.param_groups"))
        saved = SavedOptimizer(optimizer_class(groups, state, folder), groups, state)
        if (self.path / SCHEDULER).is_file():
            require_rates(saved, self.path / SCHEDULER)
        return saved


def _steps_taken(folder: Path) -> int | None:
    """How many steps the optimizer in a folder has counted; None where there is none."""
    from explaind_track.checkpoints.distributed_files import names_in, read_entries

    name = next((name for name in names_in(folder) if name.startswith("opt") and name.endswith(".step")), None)
    return None if name is None else int(read_entries(folder, [name])[name])


def _folder(path: Path, name: str) -> Path:
    return path / name if (path / name / CONTENTS).is_file() else path


def _below(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix(prefix), value) for name, value in content.items() if name.startswith(prefix))


def _groups(entries: Mapping[str, Any], whole: Any) -> list[dict[str, Any]]:
    """The groups, which are written whole, setting by setting (`0.lr`), or by parameter (`layer.weight.lr`)."""
    if whole is not None:
        return [dict(group) for group in whole]
    found: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        owner, setting = name.rsplit(".", 1)
        found.setdefault(owner, {})[setting] = value
    if all(owner.isdecimal() for owner in found):
        return [found[owner] for owner in sorted(found, key=int)]

    merged: list[dict[str, Any]] = []
    for owner, settings in found.items():
        same = next((group for group in merged if {**group, "params": 0} == {**settings, "params": 0}), None)
        if same is None:
            merged.append({**settings, "params": [owner]})
        else:
            same["params"].append(owner)
    return merged
