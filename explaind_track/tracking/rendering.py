"""What `render=` gives of a training sample, as a cell of a table: words, a number, or a picture."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from explaind_track.core.checks import plain_number, require_package, shown
from explaind_track.core.tensors import upcast
from explaind_track.errors import LoggingWarning

ADVICE = (
    "render= gives a string, a number, an image of PIL, or an array (H, W), (H, W, 1, 3 or 4) or (1, 3 or 4, H, W): "
    "floats from 0 to 1, or whole numbers from 0 to 255"
)


def rendered(render: Callable[[Any], Any], samples: Sequence[int | str]) -> list[Any]:
    """The cells of samples: a PNG, words or a number; empty where `render` fails, of which one warning tells."""
    cells: list[Any] = []
    failures: dict[int | str, Exception] = {}
    for sample in samples:
        try:
            cells.append(cell_of(render(sample)))
        except Exception as error:  # whatever a user's function raises: the row is worth more than its picture
            cells.append(None)
            failures[sample] = error

    if failures:
        first, reason = next(iter(failures.items()))
        warnings.warn(
            f"{len(failures)} of {len(samples)} samples have no picture in their table. Of {first!r}: {reason!r}. "
            f"{ADVICE}",
            LoggingWarning,
            stacklevel=3,
        )
    return cells


def cell_of(value: Any) -> bytes | str | float | int | None:
    """A picture as a PNG, and words and numbers as they are. Raises TypeError and ValueError for anything else."""
    value = plain_number(value)
    if value is None or isinstance(value, str | int | float):
        return value

    require_package("PIL", "plots", "a picture of a sample")
    import PIL.Image

    image = value if isinstance(value, PIL.Image.Image) else PIL.Image.fromarray(_pixels(value))
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


def _pixels(values: Any) -> np.ndarray[Any, Any]:
    """Pixels (H, W) or (H, W, 3 or 4), uint8."""
    channels_first = isinstance(values, Tensor)  # as torch has them; NumPy has them last, where both would do
    array = upcast(values.detach().cpu()).numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3):
        raise TypeError(f"no picture: {shown(values)}")

    if array.ndim == 3:
        first, last = (array.shape[place] in (1, 3, 4) for place in (0, -1))
        if not first and not last:
            raise ValueError(f"no picture, since neither its first nor its last axis are channels: {shown(values)}")
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return np.round(_scaled(array)).astype(np.uint8)


def _scaled(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers from 0 to 255. Floats from 0 to 1 are scaled; of others, such as standardised ones, the smallest is black
    and the largest white, unless they are from 0 to 255 already."""
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("no picture: it holds numbers that are not finite")
    if array.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise ValueError(f"no picture: its whole numbers go from {low:g} to {high:g}, and not from 0 to 255")
        return array

    if low >= 0 and high <= 1:
        return array * 255.0
    return array if low >= 0 and high <= 255 else (array - low) / ((high - low) or 1.0) * 255.0
