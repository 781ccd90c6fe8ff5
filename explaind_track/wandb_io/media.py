"""Tables, pictures and sounds as W&B has them."""

import hashlib
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from explaind_track.record.layer_types import without_cells
from explaind_track.record.media import Table, is_sound, map_values


def for_wandb(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as `run.log` takes it, without the cells of groups by layer and type, which would be too many panels."""
    import wandb

    def show(value: Any) -> Any:
        if isinstance(value, bytes) and is_sound(value):
            path = Path(_scratch().name) / f"{hashlib.sha256(value).hexdigest()}.wav"
            path.write_bytes(value)
            return wandb.Audio(str(path))
        if isinstance(value, bytes):
            import PIL.Image

            return wandb.Image(PIL.Image.open(io.BytesIO(value)))
        if isinstance(value, Path):
            return wandb.Audio(str(value)) if value.suffix == ".wav" else wandb.Image(str(value))
        return value

    shown = map_values(without_cells(row), show)
    for key, value in shown.items():
        if isinstance(value, Table):
            shown[key] = wandb.Table(columns=list(value.columns), data=value.data)
    return shown


@cache
def _scratch() -> TemporaryDirectory[str]:
    """For sounds that no record keeps, of which W&B's SDK takes files alone; until the process ends."""
    return TemporaryDirectory()
