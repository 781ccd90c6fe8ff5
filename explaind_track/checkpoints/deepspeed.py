"""Folders of DeepSpeed's ZeRO (`global_step500/`), by any loop, the Trainer, or GPT-NeoX (Pythia's)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.step_number import require_step, step_by_name, step_by_trainer
from explaind_track.checkpoints.zero_files import OPTIMIZER, ZeroFiles
from explaind_track.core.modules import parameters_of
from explaind_track.errors import CheckpointError

LATEST = "latest"
PIPELINE = re.compile(r"(?:sequential\.)?(\d+)\.(.+)$")
"""A name of GPT-NeoX: the number of the module in its pipeline, and the name within."""
NO_STATE = "its settings are those of settings=, as the files tell none"


class DeepSpeedCheckpoint(Checkpoint):
    """ZeRO's partitions in all stages; the float32 weights are those that the optimizer steps."""

    format = "DeepSpeed ZeRO"

    def __init__(self, path: Path, step: int, folder: Path) -> None:
        super().__init__(path, step)
        self._folder = folder

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        folder = next((folder for folder in _candidates(path) if _has_partitions(folder)), None)
        if folder is None:
            return ()
        step = step_by_trainer(path) if step is None else step
        step = step_by_name(folder) if step is None else step
        step = ZeroFiles(folder).steps_taken if step is None else step
        return (cls(path, require_step(path, step), folder),)

    @cached_property
    def _files(self) -> ZeroFiles:
        return ZeroFiles(self._folder)

    def weights(self) -> Mapping[str, Tensor]:
        files = self._files
        module = files.model.get("module") or {}
        constant = {*(files.model.get("buffer_names") or ()), *(files.model.get("frozen_param_shapes") or ())}
        kept = {name: value for name, value in module.items() if name in constant}
        return {**kept, **{name: files.weight(name) for group in files.shapes for name in group}}

    def weights_for(self, model: nn.Module) -> Mapping[str, Tensor]:
        weights = self.weights()
        names = _names_in(model, weights)
        return {names[name]: value for name, value in weights.items() if name in names}

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        files = self._files
        every = [name for group in files.shapes for name in group]
        names, kinds = _names_in(model, every), files.kinds
        if not {"exp_avg", "exp_avg_sq"} <= set(kinds):
            raise CheckpointError(f"{self._folder} is not of Adam: its optimizer holds {', '.join(kinds)}")

        count = torch.tensor(float(self.step))
        state: dict[str, dict[str, Any]] = {}
        for name in every:
            if name in names:
                held: dict[str, Any] = {kind: files.state(name, kind) for kind in kinds}
                counted = files.counted(name)
                state[names[name]] = {**held, "step": (count if counted is None else counted).clone()}

        groups, told = self._groups(names), [] if files.settings is not None else [NO_STATE]
        wanted = files.config.get("optimizer", {}).get("params", {}).get("adam_w_mode", True)
        return SavedOptimizer(torch.optim.AdamW if wanted else torch.optim.Adam, groups, state, told)

    def _groups(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """The settings; old versions save none, of which the second group (vectors) does not decay."""
        shapes = self._files.shapes
        settings = self._files.settings or [{}, {"weight_decay": 0.0}][: len(shapes)]
        return [
            {
                **{key: value for key, value in group.items() if key not in ("params", "step")},
                "params": [names[name] for name in members if name in names],
            }
            for group, members in zip(settings, shapes, strict=True)
        ]


def _candidates(path: Path) -> list[Path]:
    """Folders in which a checkpoint's partitions may lie: itself, or the one that `latest` names."""
    file = path / LATEST
    named = [path / file.read_text().strip()] if file.is_file() else []
    return [path, *named, *sorted(path.glob("global_step*"))]


def _has_partitions(folder: Path) -> bool:
    return folder.is_dir() and any(OPTIMIZER.match(path.name) for path in folder.iterdir())


def _names_in(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The model's name for each of the files'; those of GPT-NeoX as transformers has them, without its constants."""
    matches = {name: PIPELINE.match(name) for name in names}
    placed = {name: (int(match[1]), match[2]) for name, match in matches.items() if match is not None}
    if len(placed) < len(matches):
        return {name: name for name in matches}

    # embedding, (a change of axes), the layers, (another), final norm, head
    depth = max(number for number, _ in placed.values()) - 4
    head = "lm_head" if any(name.startswith("lm_head") for name in parameters_of(model)) else "embed_out"
    outside = {0: "gpt_neox.embed_in", depth + 3: "gpt_neox.final_layer_norm", depth + 4: head}
    found: dict[str, str] = {}
    for name, (number, within) in placed.items():
        if number in outside:
            found[name] = f"{outside[number]}.{within.rsplit('.', 1)[-1]}"
        elif not within.endswith(("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")):
            found[name] = f"gpt_neox.layers.{number - 2}.{within}"
    return found
