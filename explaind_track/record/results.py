"""Results larger than memory: labelled arrays on disk, filled chunk by chunk, and gone on with where they stopped.

request.json            what was asked for, and which chunks are done
<variable>.npy          an array, mapped into memory
labels.safetensors      labels and small variables, once all chunks are done
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from explaind_track.core.influence import Influence
from explaind_track.record.files import write_atomic
from explaind_track.record.remote import PREFIX, fetch_result

REQUEST, LABELS = "request.json", "labels.safetensors"

Array = np.ndarray[Any, Any]


class Store:
    """The directory of a result while it is computed."""

    def __init__(self, directory: str | PathLike[str], request: Mapping[str, Any]) -> None:
        """Opens the directory, to go on with what was done in it.

        Raises FileExistsError if it holds something else than a result of this very request.
        """
        self.directory = Path(directory)
        self.notes: dict[str, Any] = {}
        """By chunk that is done: what was noted of it."""
        self._request = json.loads(json.dumps(request))  # as it will be read, to be compared with that
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        self._dims: dict[str, list[str]] = {}

        path = self.directory / REQUEST
        if path.is_file():
            content = json.loads(path.read_bytes())
            self._refuse_another(content["request"])
            self.notes = content["notes"]
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise FileExistsError(f"{self.directory} is not empty; name a new directory, or remove that one first")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write()

    def _refuse_another(self, request: Mapping[str, Any]) -> None:
        if request != self._request:
            other = [key for key in self._request if request.get(key) != self._request[key]]
            raise FileExistsError(
                f"{self.directory} holds the result of another request, which differs in {', '.join(other)}; name "
                "a new directory, or remove that one first"
            )

    def array(self, name: str, sizes: Mapping[str, int], dtype: np.dtype[Any]) -> Array:
        """The array of this name over these axes, mapped into memory; zeros where nothing was written yet."""
        if name not in self._arrays:
            path, shape = self.directory / f"{name}.npy", tuple(sizes.values())
            if path.is_file():
                self._arrays[name] = np.lib.format.open_memmap(path, "r+")
            else:
                self._arrays[name] = np.lib.format.open_memmap(path, "w+", dtype, shape)
            self._dims[name] = list(sizes)
        return self._arrays[name]

    def done(self, chunk: str, note: Any = None) -> None:
        """Writes the arrays through to the disk, then remembers that the chunk is in them."""
        for array in self._arrays.values():
            array.flush()
        self.notes[chunk] = note
        self._write()

    def complete(self, data: xr.Dataset, cut: Mapping[str, int]) -> Influence:
        """Adds the labels: the result is complete then.

        data: the result, of which the variables that have an array here are not copied. cut: where the axes of these
        begin in their arrays.
        """
        attrs = {"stored": json.dumps(self._dims), "cut": json.dumps(dict(cut))}
        small = data.drop_vars([name for name in self._dims if name in data]).assign_attrs(attrs)
        Influence(small).save(self.directory / LABELS)
        return load(self.directory)

    def _write(self) -> None:
        content = {"request": self._request, "notes": self.notes}
        write_atomic(self.directory / REQUEST, json.dumps(content).encode())


def load(directory: Path) -> Influence:
    """The result in a directory that is complete, its large arrays mapped and not read. Raises ValueError otherwise."""
    if not (directory / LABELS).is_file():
        raise ValueError(
            f"{directory} holds no complete result; call explain with out={str(directory)!r} again to go on"
        )
    small = Influence.load(directory / LABELS).data
    stored, cut = (json.loads(small.attrs.pop(name)) for name in ("stored", "cut"))

    variables = {}
    for name, dims in stored.items():
        array = np.load(directory / f"{name}.npy", mmap_mode="r")
        window = tuple(slice(cut.get(axis), None) for axis in dims)
        variables[name] = (dims, array[window])
    return Influence(small.assign(variables))


def open_influence(path: str | PathLike[str]) -> Influence:
    """Opens an influence, wherever it lies.

    Args:
        path: A file that `Influence.save` wrote; the directory of an `explain(out=…)`, of which large arrays stay on
            the disk; or the artifact that holds an influence, `wandb:entity/project/name:alias`.

    Raises:
        ValueError: There is anything else, or a result that is not complete.
        TrajectoryError: The artifact cannot be fetched.

    Example:
        >>> import tempfile, xarray as xr
        >>> from explaind_track import Influence, open_influence
        >>> importance = (("part", "group"), [[3.0, 1.0]])
        >>> data = xr.Dataset({"importance": importance}, {"part": ["kernel"], "group": ["body", "head"]})
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Influence(data).save(f"{directory}/influence.safetensors")
        ...     opened = open_influence(f"{directory}/influence.safetensors")
        >>> opened.importance().sel(part="kernel", group="body").item()
        3.0
    """
    if str(path).startswith(PREFIX):
        return Influence.load(fetch_result(str(path)))
    return load(Path(path)) if Path(path).is_dir() else Influence.load(path)
