"""Files on this disk: written whole or not at all, known by their hash, and safetensors read tensor by tensor."""

import errno
import hashlib
import itertools
import json
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from explaind_track.errors import TrajectoryError
from explaind_track.record.packing import is_packable, pack, signature_of, told_of, unpack

try:
    import fcntl
except ImportError:  # no POSIX: directories go unlocked
    fcntl = None  # type: ignore[assignment]

METADATA = "explaind_track"
"""The entry of a safetensors file's metadata that holds its header."""
PACKED = "packed"
"""The entry that tells of compressed tensors."""


class Lock:
    """Keeps other processes from writing to a directory for as long as this process lives, however it ends.

    A process that is forked from this one does not hold it: it may outlive this one, as workers of a data loader do.
    """

    _descriptor: int | None = None

    def __init__(self, directory: Path, purpose: str = "another call is not done with it") -> None:
        """purpose: what holds it and how that is ended, in words for whoever else wants it in this process.

        Raises TrajectoryError if another process (or another Lock of this one) holds it.
        """
        if fcntl is None:
            return
        self._purpose = purpose
        self._descriptor = os.open(directory, os.O_RDONLY)
        _held.add(self)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            own = next((lock for lock in _held if lock is not self and lock._is_on(self._descriptor)), None)
            self.release()
            if own is not None:
                raise TrajectoryError(
                    f"this process is writing to {directory} already: {own._purpose}, or name another directory"
                ) from None
            raise TrajectoryError(
                f"another process is writing to {directory}: wait for it to end, or name another directory"
            ) from None

    def _is_on(self, descriptor: int) -> bool:
        """Whether this holds the directory of an open descriptor."""
        return self._descriptor is not None and os.path.sameopenfile(self._descriptor, descriptor)

    def release(self) -> None:
        """Lets go of the directory; a second time, of nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = release


_held: WeakSet[Lock] = WeakSet()


def _forget_locks() -> None:
    """In a process that was just forked: closes its copies of the descriptors, which would hold the locks."""
    for lock in _held:
        lock.release()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lets a file be written under another name; once it is whole and on the disk, it takes the place of `path`.

    Raises TrajectoryError where it cannot be written; what was there before is still there then.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        make_directory(path.parent)
        scratch.unlink(missing_ok=True)  # of a write that was interrupted; or a link, which would be followed
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())  # else a crash may leave the new name with nothing behind it
        scratch.replace(path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise TrajectoryError(
            f"could not write {path}: {error}. What was written before is whole; make room or give write access, and "
            "go on: a run with Tracker(…, resume=True), anything else by the same call again"
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Writes the file whole, through to the disk, or not at all. Raises TrajectoryError where it cannot."""
    with whole(path) as scratch:
        scratch.write_bytes(content)


def make_directory(directory: Path) -> None:
    """Makes the directory and those above it, through to the disk. Raises OSError where it cannot."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Writes the directory's names through to the disk: until then, a crash of the machine may take back a file that
    was made, renamed or removed in it."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return  # one may write into a directory that one may not read, but not ask for this
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any, compress: bool = False) -> tuple[int, str]:
    """Writes one safetensors file with `header` as JSON in its metadata, gradients packed if `compress`. Returns its
    size in bytes and its sha256."""
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    packed = {name: value for name, value in written.items() if compress and is_packable(name, value)}
    metadata = {METADATA: json.dumps(header)}
    if packed:
        metadata[PACKED] = json.dumps({name: signature_of(value) for name, value in packed.items()})
    content = save(written | {name: pack(value) for name, value in packed.items()}, metadata)
    sha256 = hashlib.sha256(content).hexdigest()
    write_atomic(path, content)
    return len(content), sha256


def json_sha256(content: Mapping[str, Any]) -> str:
    """The sha256 of what a JSON file says, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ErrorOfOthers(Exception):
    """Carries an error of the caller's code past `blaming_files`."""

    def __init__(self, inner: Exception) -> None:
        super().__init__(inner)
        self.inner = inner


@contextmanager
def not_blaming_files() -> Iterator[None]:
    """Within `blaming_files`: what is done here is the caller's."""
    try:
        yield
    except Exception as error:
        raise ErrorOfOthers(error) from error


@contextmanager
def blaming_files(directory: Path) -> Iterator[None]:
    """Turns whatever the files of a trajectory lead to into an error of the trajectory: with the right hashes, they may
    still say anything."""
    try:
        yield
    except TrajectoryError:
        raise
    except ErrorOfOthers as error:
        raise error.inner from None
    except Exception as error:
        raise TrajectoryError(f"{directory} does not hold what a trajectory holds: {error!r}") from error


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors by name: of their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorFile:
    """A safetensors file opened for reading, tensor by tensor."""

    def __init__(self, path: Path, largest: int = 0) -> None:
        """Raises TrajectoryError if it is none that `write_tensors` has written. largest: the bytes that a compressed
        tensor in it may have."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            metadata = self._file.metadata()
            self.header: Any = json.loads(metadata[METADATA])
            self._packed = told_of(json.loads(metadata.get(PACKED, "{}")), path, largest)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise TrajectoryError(f"{path} is no file of a trajectory: {error}") from None
        self.names: list[str] = sorted(self._file.keys())

    def __contains__(self, name: str) -> bool:
        place = bisect_left(self.names, name)
        return place < len(self.names) and self.names[place] == name

    def __getitem__(self, name: str) -> Tensor:
        """Reads the tensor; the next time again."""
        tensor: Tensor = self._file.get_tensor(name)
        return unpack(tensor, self._packed[name]) if name in self._packed else tensor

    def shapes(self, prefix: str) -> dict[str, list[int]]:
        """The shapes of the tensors whose names begin with the prefix, by the rest of the name; none is read."""
        names = self.prefixed(prefix)
        return {name: list(self._file.get_slice(prefix + name).get_shape()) for name in names}

    def prefixed(self, prefix: str) -> "Prefixed":
        """The tensors whose names begin with the prefix."""
        return Prefixed(self, prefix)


class Prefixed(Mapping[str, Tensor]):
    """Those tensors of a file whose names begin alike, by the rest of the name, in its order. Each is read when it is
    asked for, and not kept."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        begin, end = bisect_left(file.names, prefix), bisect_left(file.names, prefix + chr(sys.maxunicode))
        self._full = {name.removeprefix(prefix): name for name in file.names[begin:end]}

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._full[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._full

    def __iter__(self) -> Iterator[str]:
        return iter(self._full)

    def __len__(self) -> int:
        return len(self._full)


def directory_mb(directory: Path) -> float:
    """The size of all files under the directory, in MB (10⁶ bytes); 0 if there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6


REMEMBERED = 200
"""So many of the tensors that are written once, the last ones, are not written again, and are kept for the steps that
share them where they are read."""


class WrittenOnce:
    """Indices and weights, which are written once for all the steps of a trajectory that share them."""

    def __init__(self, directory: Path, files: Callable[[], Iterator[TensorFile]]) -> None:
        """files: opens the trajectory's segments one by one, since each may be a download."""
        self._directory, self._files = directory, files
        self._kept: dict[str, Tensor] = {}

    def find(self, file: TensorFile, name: str) -> Tensor:
        """A tensor of this name: in the segment at hand, or in an earlier one that used it first. Kept for a while."""
        if name not in self._kept:
            files = itertools.chain([file], self._files())
            holder = next((one for one in files if name in one), None)
            if holder is None:
                raise TrajectoryError(f"{self._directory} lacks {name!r}, which its steps refer to")
            if len(self._kept) == REMEMBERED:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = holder[name]
        return self._kept[name]
