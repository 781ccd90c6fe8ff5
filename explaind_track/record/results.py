"""Results larger than memory: labelled arrays on disk, filled chunk by chunk, and gone on with where they stopped.

request.json            what was asked for, the arrays, and every chunk that is done with the hashes of its cells
<variable>.npy          an array, mapped into memory
<chunk>.safetensors     small variables of a chunk
labels.safetensors      labels and small variables, once all chunks are done
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import xarray as xr

from explaind_track.core.influence import Influence
from explaind_track.errors import TrajectoryError
from explaind_track.record.files import Lock, json_sha256, make_directory, whole, write_atomic
from explaind_track.record.remote import PREFIX, fetch_result
from explaind_track.record.validation import Count, Sha256, checked, file_below, read_json

REQUEST, LABELS = "request.json", "labels.safetensors"

Array = np.ndarray[Any, Any]


class ArrayEntry(TypedDict):
    """An array as `request.json` has it."""

    dims: list[str]
    shape: list[Count]
    dtype: str


class ChunkEntry(TypedDict):
    """A chunk that is done, as `request.json` has it."""

    where: dict[str, tuple[Count | None, Count | None]]
    """[start, stop] of its cells, along each axis that it has a part of."""
    sha256: dict[str, Sha256]
    """Of its cells, by array."""
    note: Any


@dataclass
class Contents:
    """What `request.json` says of its directory."""

    request: dict[str, Any]
    arrays: dict[str, ArrayEntry]
    chunks: dict[str, ChunkEntry]

    def write(self, directory: Path) -> None:
        """Raises TrajectoryError where it cannot be written."""
        content = asdict(self)
        write_atomic(directory / REQUEST, json.dumps({**content, "digest": json_sha256(content)}).encode())

    @classmethod
    def read(cls, directory: Path) -> "Contents":
        """Raises ValueError if it is missing or damaged."""
        with suppress(TrajectoryError, KeyError, TypeError, AttributeError, RecursionError):
            content = read_json(directory / REQUEST)
            if content.pop("digest") == json_sha256(content) and all(map(str.isidentifier, content["arrays"])):
                contents: Contents = checked(content, cls, directory / REQUEST)
                if all(len(made["dims"]) == len(made["shape"]) for made in contents.arrays.values()):
                    return contents
        raise ValueError(f"{directory / REQUEST} is damaged: {_remedy(directory)}")

    def open(self, directory: Path, name: str, mode: Literal["r", "r+"]) -> Array:
        """An array, mapped into memory, with the cells of all chunks verified: one reading of the whole file. Raises
        ValueError if anything of it was altered."""
        path, made = file_below(directory, f"{name}.npy"), self.arrays[name]
        header, size = _layout(made)
        try:
            with path.open("rb") as file:
                is_whole = file.read(len(header)) == header and path.stat().st_size == len(header) + size
        except OSError:
            is_whole = False

        if is_whole:  # what it says of itself is not read, since it is known
            array = np.memmap(path, np.dtype(made["dtype"]), mode, len(header), tuple(made["shape"]))
            chunks = self.chunks.values()
            is_whole = all(self.hash(name, array, chunk) == chunk["sha256"].get(name) for chunk in chunks)
        if not is_whole:
            raise ValueError(f"{path} was altered, and is not what was computed: {_remedy(directory)}")
        return array

    def hash(self, name: str, array: Array, chunk: ChunkEntry) -> str:
        """The sha256 of a chunk's cells of an array, read block by block."""
        parts = (chunk["where"].get(axis, (None, None)) for axis in self.arrays[name]["dims"])
        cells = array[tuple(slice(start, stop) for start, stop in parts)]
        digest = hashlib.sha256()
        for block in np.nditer(cells, ["external_loop", "buffered", "zerosize_ok"], order="C", buffersize=2**18):
            digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()


def _layout(made: ArrayEntry) -> tuple[bytes, int]:
    """What the file of an array begins with, and the bytes of the array behind that. Raises ValueError for what is no
    array of numbers."""
    try:
        dtype, shape = np.dtype(made["dtype"]), tuple(made["shape"])
    except TypeError as error:
        raise ValueError(f"{made['dtype']!r} is no type of numbers") from error
    if dtype.kind not in "fiu" or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{dtype} {shape} is no array of a result")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue(), math.prod(shape) * dtype.itemsize


def _remedy(directory: Path) -> str:
    return f"remove {directory}, and compute it again"


class Store:
    """The directory of a result while it is computed: a context, within which no other process writes there."""

    def __init__(self, directory: str | PathLike[str], request: Mapping[str, Any]) -> None:
        """Opens the directory, to go on with what was done in it.

        Raises FileExistsError if it holds something else than a result of this very request; ValueError if that is
        damaged; TrajectoryError if it cannot be written, or another process writes there.
        """
        self.directory = Path(directory)
        self._arrays: dict[str, Array] = {}
        try:
            make_directory(self.directory)
        except OSError as error:
            raise TrajectoryError(f"{self.directory} cannot be made: {error}") from error
        self._lock = Lock(self.directory)
        try:
            self._contents = self._begin(json.loads(json.dumps(request)))  # as it is read, to be compared with that
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _begin(self, request: dict[str, Any]) -> Contents:
        """What the directory holds of the request."""
        if not (self.directory / REQUEST).is_file():
            if any(path.name != f"{REQUEST}.part" for path in self.directory.iterdir()):
                raise FileExistsError(f"{self.directory} is not empty; name a new directory, or remove that one first")
            contents = Contents(request, {}, {})
            contents.write(self.directory)
            return contents

        contents = Contents.read(self.directory)
        other = [key for key in {**contents.request, **request} if contents.request.get(key) != request.get(key)]
        if other:
            raise FileExistsError(
                f"{self.directory} holds the result of another request, which differs in {', '.join(other)}; name "
                "a new directory, or remove that one first"
            )
        return contents

    @property
    def notes(self) -> dict[str, Any]:
        """By chunk that is done: what was noted of it."""
        return {chunk: done["note"] for chunk, done in self._contents.chunks.items()}

    def result(self) -> Influence | None:
        """The whole result, if it was computed before. Raises ValueError if it was altered since."""
        return load(self.directory) if (self.directory / LABELS).is_file() else None

    def array(self, name: str, sizes: Mapping[str, int], dtype: np.dtype[Any]) -> Array:
        """The array of this name over these axes, mapped into memory; zeros where nothing was written yet.

        Raises ValueError if what was written was altered since; TrajectoryError if there is no room for all of it.
        """
        if name in self._arrays:
            return self._arrays[name]

        if name not in self._contents.arrays:  # what an interruption may have left of it is written over
            made = ArrayEntry(dims=list(sizes), shape=list(sizes.values()), dtype=np.dtype(dtype).str)
            with whole(self.directory / f"{name}.npy") as scratch:
                _make_zeros(scratch, *_layout(made))
            self._contents.arrays[name] = made
        self._arrays[name] = self._contents.open(self.directory, name, "r+")
        return self._arrays[name]

    def done(self, chunk: str, where: Mapping[str, slice], note: Any = None) -> None:
        """Writes the arrays through to the disk, then remembers that the chunk is in them.

        where: its cells; all of those axes that are not named. Raises TrajectoryError where it cannot be written.
        """
        for name, array in self._arrays.items():
            try:
                array.flush()  # type: ignore[attr-defined]
            except OSError as error:
                raise TrajectoryError(
                    f"could not write {self.directory / name}.npy: {error}; make room, and make the same call again: "
                    "it goes on where it stopped"
                ) from error

        done = ChunkEntry(where={axis: (part.start, part.stop) for axis, part in where.items()}, sha256={}, note=note)
        done["sha256"] = {name: self._contents.hash(name, array, done) for name, array in self._arrays.items()}
        self._contents.chunks[chunk] = done
        self._contents.write(self.directory)

    def complete(self, data: xr.Dataset, cut: Mapping[str, int]) -> Influence:
        """Adds the labels: the result is complete then.

        data: the result, of which the variables that have an array here are not copied. cut: where the axes of these
        begin in their arrays.
        """
        small = data.drop_vars([name for name in self._contents.arrays if name in data])
        self.write(LABELS, small.assign_attrs(cut=json.dumps(dict(cut))))
        return load(self.directory)

    def write(self, name: str, data: xr.Dataset) -> None:
        """Writes small variables to a file in the directory. Raises TrajectoryError where it cannot be written."""
        with whole(self.directory / name) as scratch:
            Influence(data).save(scratch)


def _make_zeros(path: Path, header: bytes, size: int) -> None:
    """Writes the header and so many zeros; with all the room that they take, for where a file of holes fills up later,
    writing to its map kills the process."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, len(header) + size)


def load(directory: Path) -> Influence:
    """The result in a directory that is complete, its large arrays verified and mapped into memory. Raises ValueError,
    or TrajectoryError, otherwise."""
    if not (directory / LABELS).is_file():
        raise ValueError(
            f"{directory} holds no complete result; call explain with out={str(directory)!r} again to go on"
        )
    small = Influence.load(directory / LABELS).data
    cut: dict[str, int] = checked(json.loads(str(small.attrs.pop("cut", ""))), dict[str, Count], directory / LABELS)
    contents = Contents.read(directory)

    variables = {}
    for name, made in contents.arrays.items():
        array = contents.open(directory, name, "r")
        window = tuple(slice(cut.get(axis), None) for axis in made["dims"])
        variables[name] = (made["dims"], array[window])
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
