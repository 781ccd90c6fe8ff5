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


def image_png(image: Any) -> bytes:
    """image: an array or a PIL image, as `wandb.Image` takes it."""
    import wandb

    content = io.BytesIO()
    shown = wandb.Image(image).image
    assert shown is not None  # it is for images that are elsewhere
    shown.save(content, format="png")
    return content.getvalue()
