"""Reads `torch.distributed.checkpoint`'s folders without unpickling what they may name."""

import io
import pathlib
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from explaind_track.checkpoints.restricted_pickle import read_plain
from explaind_track.errors import CheckpointError

CONTENTS = ".metadata"
NAMED = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
"""What a table of contents is made of, beside torch's types of tensors."""


@cache
def _allowed() -> dict[str, Any]:
    """The classes that a table of contents names, by their qualified names."""
    known = {f"{metadata.__name__}.{name}": getattr(metadata, name) for name in NAMED if hasattr(metadata, name)}
    known[f"{filesystem.__name__}._StorageInfo"] = filesystem._StorageInfo
    known["torch.Size"] = torch.Size
    known["pathlib.PosixPath"] = known["pathlib._local.PosixPath"] = pathlib.PurePosixPath
    known["torch.serialization._get_layout"] = torch.serialization._get_layout
    types = [value for value in vars(torch).values() if isinstance(value, torch.dtype | torch.layout)]
    return known | {str(value): value for value in types}


@cache
def _contents(folder: Path, changed: int) -> metadata.Metadata:
    path = folder / CONTENTS
    found = read_plain(path.read_bytes(), path, _allowed())
    if not isinstance(found, metadata.Metadata):
        raise CheckpointError(f"{path} is no table of contents of torch.distributed.checkpoint")
    return found


def _table(folder: Path) -> metadata.Metadata:
    return _contents(folder, (folder / CONTENTS).stat().st_mtime_ns)


def names_in(folder: Path) -> Iterable[str]:
    return _table(folder).state_dict_metadata


class PlainReader(filesystem.FileSystemReader):
    """Reads the table of contents without unpickling what it may name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return _table(self._folder)


class PlainPlanner(DefaultLoadPlanner):
    """Reads what is no tensor by torch's own restricted unpickler."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def shapes_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and type of every tensor in a folder. Raises CheckpointError where it holds anything else."""
    found = {}
    for name, entry in _table(folder).state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise CheckpointError(f"{folder} holds {name!r}, which is no tensor")
        found[name] = entry.size, entry.properties.dtype
    return found


def read_entries(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """These entries of a folder, tensors put together from their shards."""
    entries = _table(folder).state_dict_metadata
    found: dict[str, Any] = {}
    for name in names:
        entry = entries[name]
        if isinstance(entry, metadata.TensorStorageMetadata):
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        else:
            found[name] = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # no process group: as meant
            load(
                found, storage_reader=PlainReader(folder), planner=PlainPlanner(flatten_state_dict=False), no_dist=True
            )
    except (Exception, CheckpointException) as error:  # whatever a torn file leads to
        raise CheckpointError(
            f"{folder} cannot be read: a shard is missing or torn ({str(error).strip().splitlines()[-1][:200]}). Copy "
            "it again, with the files of all processes"
        ) from None
    return found
