"""The files of a trajectory: safetensors and JSON, written whole or not at all, each known by its hash."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from explaind_track.errors import TrajectoryError

try:
    import fcntl
except ImportError:  # no POSIX: directories go unlocked
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
PATHS = re.compile(r"(keyframes|steps)/\d{8,18}\.safetensors")
"""What a trajectory's files are called: nothing else is read, and nothing outside of its directory."""


class Lock:
    """Keeps other processes from writing to a directory for as long as this process lives, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Raises TrajectoryError if another process (or another Lock of this one) holds it."""
        if fcntl is None:
            return
        self._descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise TrajectoryError(
                f"another process is writing to {directory}; wait for it to end, or name another directory"
            ) from None

    def release(self) -> None:
        if fcntl is not None:
            os.close(self._descriptor)


@dataclass(frozen=True)
class Entry:
    """One file of the trajectory, and the steps first ≤ s < last that it covers (none, for a keyframe)."""

    path: str
    first: int
    last: int
    size: int
    sha256: str


def write_atomic(path: Path, content: bytes) -> None:
    """The file is there whole, on the disk, when this returns, or not at all. Raises TrajectoryError where it can't."""
    scratch = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise TrajectoryError(
            f"could not write {path} ({len(content)} bytes): {error}. What was written before is whole; make room or "
            "give write access, then go on with Tracker(…, resume=True)"
        ) from error


def write_tensors(
    directory: Path, path: str, first: int, last: int, tensors: Mapping[str, Tensor], header: Any
) -> Entry:
    """Writes one safetensors file with `header` as JSON in its metadata."""
    metadata = {"explaind_track": json.dumps(header)}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(directory / path, content)
    return Entry(path, first, last, len(content), hashlib.sha256(content).hexdigest())


def verify(directory: Path, entry: Entry) -> None:
    """Raises TrajectoryError unless the file is, byte for byte, the one that was written."""
    verify_size(directory, entry)
    target = directory / entry.path
    found = file_sha256(target)
    if found != entry.sha256:
        raise TrajectoryError(f"{target} was altered: its sha256 is {found}, {entry.sha256} was written")


def verify_size(directory: Path, entry: Entry) -> None:
    """Raises TrajectoryError if the file is missing, or not as long as it was."""
    target = directory / entry.path
    if not target.resolve().is_relative_to(directory.resolve()):
        raise TrajectoryError(f"{target} leads out of the trajectory's directory")
    if not target.is_file():
        raise TrajectoryError(f"{target} is missing; fetch the trajectory again, or open an earlier copy of it")
    size = target.stat().st_size
    if size != entry.size:
        raise TrajectoryError(f"{target} has {size} bytes, {entry.size} were written: the file is torn")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """A safetensors file opened for reading, tensor by tensor."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            self._file = safe_open(path, framework="pt", device=str(device))
            self.header: Any = json.loads(self._file.metadata()["explaind_track"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise TrajectoryError(f"{path} is no file of a trajectory: {error}") from None
        self.names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def prefixed(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors whose name begins with the prefix, without it."""
        for name in sorted(self.names):
            if name.startswith(prefix):
                yield name[len(prefix) :], self[name]


def write_manifest(directory: Path, head: Mapping[str, Any], entries: list[Entry]) -> None:
    write_atomic(directory / MANIFEST, manifest_bytes(head, entries))


def manifest_bytes(head: Mapping[str, Any], entries: list[Entry]) -> bytes:
    """The manifest as a file; what it says of itself is sealed by its digest."""
    content = {**head, "files": [asdict(entry) for entry in entries]}
    return json.dumps({**content, "digest": _digest(content)}, indent=1).encode()


def digest(head: Mapping[str, Any], entries: list[Entry]) -> str:
    """Stands for the whole trajectory: the hash of everything its manifest says, the files' hashes included."""
    return _digest({**head, "files": [asdict(entry) for entry in entries]})


def read_manifest(directory: Path, format_name: str) -> tuple[dict[str, Any], list[Entry]]:
    """The manifest's head and entries. Raises TrajectoryError if it is missing, torn, altered or of another format."""
    path = directory / MANIFEST
    if not path.is_file():
        raise TrajectoryError(f"{directory} holds no trajectory: there is no {MANIFEST} in it")
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TrajectoryError(f"{path} is torn or is no trajectory's manifest") from None
    if content.get("format") != format_name:
        raise TrajectoryError(f"{path} has the format {content.get('format')!r}; this version reads {format_name!r}")
    if digest != _digest(content):
        raise TrajectoryError(f"{path} was altered: its digest does not fit its content")
    try:
        entries = [_entry(**entry) for entry in content.pop("files")]
    except (KeyError, TypeError, ValueError) as error:
        raise TrajectoryError(f"{path} does not list a trajectory's files: {error}") from None
    return content, entries


def _entry(path: str, first: int, last: int, size: int, sha256: str) -> Entry:
    if not (isinstance(path, str) and PATHS.fullmatch(path)):
        raise ValueError(f"{path!r} is no name of a trajectory's file")
    if not all(type(number) is int and number >= 0 for number in (first, last, size)) or last < first:
        raise ValueError(f"{path!r} has the steps {first!r} to {last!r} and {size!r} bytes")
    return Entry(path, first, last, size, sha256)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
