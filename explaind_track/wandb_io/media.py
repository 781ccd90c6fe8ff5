"""Tables and pictures as W&B has them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from explaind_track.record.media import Table, map_values


def for_wandb(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as `run.log` takes it."""
    import wandb

    def show(value: Any) -> Any:
        if isinstance(value, bytes):
            import PIL.Image

            return wandb.Image(PIL.Image.open(io.BytesIO(value)))
        return wandb.Image(str(value)) if isinstance(value, Path) else value

    shown = map_values(row, show)
    for key, value in shown.items():
        if isinstance(value, Table):
            shown[key] = wandb.Table(columns=list(value.columns), data=value.data)
    return shown
