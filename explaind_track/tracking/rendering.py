"""What `render=` gives of a training sample, as a cell of a table: words, a number, a picture or a sound."""

import io
import warnings
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from explaind_track.core.checks import plain_number, require_int, require_package, shown
from explaind_track.core.tensors import upcast
from explaind_track.errors import LoggingWarning
from explaind_track.record.media import is_sound

ADVICE = (
    "render= gives a string, a number, an image of PIL, or an array (H, W), (H, W, 1, 3 or 4) or (1, 3 or 4, H, W): "
    "floats from 0 to 1, or whole numbers from 0 to 255; or a sound: (samples a second, array (T,) or (T, channels)), "
    "floats from -1 to 1 or int16; or an Image or Audio of wandb"
)


def rendered(render: Callable[[Any], Any], samples: Sequence[int | str]) -> list[Any]:
    """The cells of samples: a PNG, a WAV, words or a number; empty where `render` fails, of which a warning tells."""
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
            f"{len(failures)} of {len(samples)} samples go without what render= gives. Of {first!r}: {reason!r}. "
            f"{ADVICE}",
            LoggingWarning,
            stacklevel=3,
        )
    return cells


def cell_of(value: Any) -> bytes | str | float | int | None:
    """A picture as a PNG, a sound as a WAV, and words and numbers as they are. Raises TypeError and ValueError for
    anything else."""
    value = plain_number(value)
    if value is None or isinstance(value, str | int | float):
        return value

    if type(value).__module__.startswith("wandb.") and hasattr(value, "_path"):
        held = Path(value._path).read_bytes()
        if is_sound(held):
            return held
        value = value.image  # of anything else than an Image, AttributeError
    if isinstance(value, tuple):
        return _wav(*value)

    require_package("PIL", "plots", "a picture of a sample")
    import PIL.Image

    image = value if isinstance(value, PIL.Image.Image) else PIL.Image.fromarray(_pixels(value))
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


def _wav(rate: int, values: Any) -> bytes:
    """A sound of 16 bits. rate: samples a second; values: (T,) or (T, channels), of torch also (channels, T)."""
    rate, array = require_int("the samples a second of a sound", rate, 1), _array(values)
    if array.ndim == 2 and isinstance(values, Tensor) and array.shape[0] < array.shape[1]:
        array = array.T
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("no sound: it holds numbers that are not finite")
    if array.ndim not in (1, 2) or array.size == 0 or not (array.dtype.kind == "f" or array.dtype == np.int16):
        raise TypeError(f"no sound: {shown(values)}")

    if array.dtype.kind == "f":
        loudest = max(float(np.abs(array).max()), 1.0)
        array = np.round(array / loudest * (2**15 - 1)).astype(np.int16)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1 if array.ndim == 1 else array.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(array.astype("<i2").tobytes())
    return content.getvalue()


def _array(values: Any) -> np.ndarray[Any, Any]:
    return upcast(values.detach().cpu()).numpy() if isinstance(values, Tensor) else np.asarray(values)


def _pixels(values: Any) -> np.ndarray[Any, Any]:
    """Pixels (H, W) or (H, W, 3 or 4), uint8."""
    channels_first = isinstance(values, Tensor)  # as torch has them; NumPy has them last, where both would do
    array = _array(values)
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
