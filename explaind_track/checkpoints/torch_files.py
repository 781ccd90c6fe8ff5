"""Reads files of `torch.save` without unpickling them, mapped instead of copied."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from explaind_track.errors import CheckpointError


class Inert:
    """Stands for an object of a library that is not wanted: it holds what was saved of it, and does nothing."""

    def __init__(self, *saved: Any) -> None:
        self.saved = saved

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_torch(path: Path, inert: tuple[str, ...] = ()) -> Any:
    """What the file holds; its tensors are mapped from it, and writing to them does not reach it.

    Args:
        path: The file.
        inert: The beginnings of the names of classes whose objects are read as `Inert` ones.

    Raises:
        CheckpointError: It is torn, none of torch's, or holds objects that would have to be unpickled.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
    try:
        is_mapped = zipfile.is_zipfile(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if inert and is_mapped else []
        with torch.serialization.safe_globals([(Inert, name) for name in named if name.startswith(inert)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_cannot_read(path, error)) from None
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: it is torn, or no file of torch.save ({_first_line(error)}). Copy it again"
        ) from None


def _cannot_read(path: Path, error: Exception) -> str:
    """Why a file is refused, and what turns it into one that is not."""
    if "weights_only" not in str(error) and "Unsupported" not in str(error):
        return f"{path} cannot be read: it is torn, or no file of torch.save ({_first_line(error)}). Copy it again"
    return (
        f"{path} holds Python objects beside its tensors ({_reason(error)}), and reading those could run any code. If "
        "you trust whoever wrote it, write its tensors alone, where the classes it names can be imported:\n"
        f"    python -c \"import torch; from torch.utils._pytree import tree_map as m; p = '{path.name}'; "
        "d = torch.load(p, map_location='cpu', weights_only=False); keep = (torch.Tensor, int, float, str, bool, "
        "type(None)); torch.save(m(lambda x: x if isinstance(x, keep) else None, d), p + '.new')\"\n"
        "and put the new file in the place of the old one, in a copy of the folder"
    )


def _reason(error: Exception) -> str:
    """The class or function that the file names."""
    for line in str(error).splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return line.split("Please")[0].strip().removeprefix("WeightsUnpickler error: ")
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
