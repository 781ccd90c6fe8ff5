"""What the user says of the optimizer's settings: fills in what files do not tell, and contradicts none of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.core.checks import require_mapping
from explaind_track.errors import CheckpointError

Settings = Mapping[str, Any]
"""Settings of an optimizer by name, such as `lr`; each a value, or a function of the step that gives it."""

NEEDED = ("lr", "betas", "eps", "weight_decay")
"""What Adam's step cannot be taken without."""


def require_settings(settings: Any) -> Settings:
    """The settings, or none. Raises TypeError for what is no mapping of names."""
    if settings is None:
        return {}
    require_mapping("settings=", settings, "{'lr': 3e-4, 'betas': (0.9, 0.95)}, for what the files do not tell")
    return dict(settings)


def complete(saved: SavedOptimizer, settings: Settings, step: int, path: Path) -> list[dict[str, Any]]:
    """The groups with the settings that the files have left open.

    Args:
        saved: As the files tell it.
        settings: As the user tells them.
        step: Of the checkpoint, which settings that are functions are given.
        path: For messages.

    Raises:
        CheckpointError: The files say otherwise, or something that the step needs is told by neither.
    """
    told = {name: value(step) if callable(value) else value for name, value in settings.items()}
    for name, value in told.items():
        of_files = [group[name] for group in saved.groups if name in group and name not in saved.replaceable]
        if len(of_files) == len(saved.groups) and not any(_same(value, known) for known in of_files):
            raise CheckpointError(
                f"settings= says {name}={value!r}, and {path} says {', '.join(map(repr, of_files))}, as of the step "
                f"that comes next: leave {name} out of settings=, or open the checkpoints that it is of"
            )

    replacing = {name: value for name, value in told.items() if name in saved.replaceable}
    completed = [{**told, **group, **replacing} for group in saved.groups]
    if issubclass(saved.kind, torch.optim.Adam):
        open_ones = sorted({name for group in completed for name in NEEDED if name not in group})
        if open_ones:
            asked = ", ".join(f"{name!r}: …" for name in open_ones)
            raise CheckpointError(
                f"{path} does not tell {', '.join(open_ones)} of {saved.kind.__name__}: pass settings={{{asked}}} to "
                "CheckpointSeries.open (lr as a function of the step, where there was a schedule)"
            )
    return completed


def _same(value: Any, known: Any) -> bool:
    if isinstance(known, tuple | list):
        pairs = zip(value, known, strict=True) if isinstance(value, tuple | list) and len(value) == len(known) else None
        return pairs is not None and all(_same(one, other) for one, other in pairs)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(known, int | float):
        return bool(value == known)
    return math.isclose(value, known, rel_tol=1e-6)
