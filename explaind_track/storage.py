"""The files of a trajectory: safetensors and JSON, written whole or not at all, each known by its hash."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

MANIFEST = "manifest.json"


class TrajectoryError(RuntimeError):
    """A trajectory on disk is not what was written: torn, altered, or of another format."""


@dataclass(frozen=True)
class Entry:
    """One file of the trajectory, and the steps first ≤ s < last that it covers (none, for a keyframe)."""

    path: str
    first: int
    last: int
    size: int
    sha256: str


def write_atomic(path: Path, content: bytes) -> None:
    """The file is there whole, on the disk, when this returns, or not at all."""
    scratch = path.with_name(path.name + ".part")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def write_tensors(
    directory: Path, path: str, first: int, last: int, tensors: Mapping[str, Tensor], header: Any
) -> Entry:
    """Writes one safetensors file with `header` as JSON in its metadata."""
    metadata = {"explaind_track": json.dumps(header)}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, content)
    return Entry(path, first, last, len(content), hashlib.sha256(content).hexdigest())


def verify(directory: Path, entry: Entry) -> None:
    """Raises TrajectoryError unless the file is, byte for byte, the one that was written."""
    target = directory / entry.path
    if not target.is_file():
        raise TrajectoryError(f"{target} is missing; fetch the trajectory again, or open an earlier copy of it")
    size = target.stat().st_size
    if size != entry.size:
        raise TrajectoryError(f"{target} has {size} bytes, {entry.size} were written: the file is torn")
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise TrajectoryError(f"{target} was altered: its sha256 is {found}, {entry.sha256} was written")


class TensorFile:
    """A safetensors file opened for reading, tensor by tensor."""

    def __init__(self, directory: Path, entry: Entry, device: torch.device) -> None:
        self._file = safe_open(directory / entry.path, framework="pt", device=str(device))
        self.header: Any = json.loads(self._file.metadata()["explaind_track"])
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
    content = {**head, "files": [asdict(entry) for entry in entries]}
    write_atomic(directory / MANIFEST, json.dumps({**content, "digest": _digest(content)}, indent=1).encode())


def read_manifest(directory: Path, format_name: str) -> tuple[dict[str, Any], list[Entry]]:
    """The manifest's head and entries. Raises TrajectoryError if it is missing, torn, altered or of another format."""
    path = directory / MANIFEST
    if not path.is_file():
        raise TrajectoryError(f"{directory} holds no trajectory: there is no {MANIFEST} in it")
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TrajectoryError(f"{path} is torn or is no trajectory's manifest") from None
    if content.get("format") != format_name:
        raise TrajectoryError(f"{path} has the format {content.get('format')!r}; this version reads {format_name!r}")
    if digest != _digest(content):
        raise TrajectoryError(f"{path} was altered: its digest does not fit its content")
    entries = [Entry(**entry) for entry in content.pop("files")]
    root = directory.resolve()
    for entry in entries:
        if not (root / entry.path).resolve().is_relative_to(root):
            raise TrajectoryError(f"{path} names a file outside of the trajectory: {entry.path!r}")
    return content, entries


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
