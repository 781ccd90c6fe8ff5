"""How many optimizer steps a checkpoint lies behind, told by its files or its name."""

import json
import re
from pathlib import Path

from explaind_track.errors import CheckpointError

TRAINER_STATE = "trainer_state.json"
NAMED = re.compile(
    r"(?:^|[-_.])(?:checkpoint|ckpt|step|global[-_]?step|iter|iteration)[-_]?(\d+)(?![\d.])", re.IGNORECASE
)


def step_by_name(path: Path) -> int | None:
    """The step that a folder's name tells (`checkpoint-500`, `step1000-unsharded`); None if it tells none."""
    found = NAMED.search(path.name)
    return None if found is None else int(found[1])


def step_by_trainer(path: Path) -> int | None:
    """The step that transformers' Trainer has written into the folder; None if it is none of its.

    Raises:
        CheckpointError: The file is torn.
    """
    file = path / TRAINER_STATE
    if not file.is_file():
        return None
    try:
        return int(json.loads(file.read_text())["global_step"])
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise CheckpointError(f"{file} is torn, or not the Trainer's ({error!r}). Copy it again") from None


def require_step(path: Path, *told: int | None) -> int:
    """The first step that is told.

    Raises:
        CheckpointError: None is, neither by the files nor by the name.
    """
    for step in (*told, step_by_name(path)):
        if step is not None:
            return step
    raise CheckpointError(
        f"nothing tells how many steps were taken before {path}: name the folder after its step, such as step1000"
    )
