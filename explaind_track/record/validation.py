"""What JSON has to be before anything uses it: its types, with their bounds, which msgspec holds it to.

Nothing that was read from a file, or that a server has said, is trusted: see SECURITY.md.
"""

import json
import sys
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from explaind_track.core.alterations import Kind
from explaind_track.errors import TrajectoryError

T = TypeVar("T")

MOST_BYTES = 2**28
"""The longest JSON file that is read; a manifest of a million files has less."""

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=10**15)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Dtype = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{1,30}\Z")]
Signature = tuple[list[Count], Dtype]
"""Shape and type of a tensor."""


class Head(Struct):
    """All that a manifest says of the run as a whole: see `schema.head_of`."""

    format: str
    model: str
    optimizer: str
    parameters: dict[str, Signature]
    buffers: dict[str, Signature]
    aliases: dict[str, str]
    saved: list[str]
    packages: dict[str, str]

    def __post_init__(self) -> None:
        """Raises ValueError where it names a tensor that it does not have."""
        known = self.parameters.keys() | self.buffers.keys() | self.aliases.keys()
        unknown = {*self.aliases.values()} - self.parameters.keys() | {*self.saved} - known
        if unknown:
            raise ValueError(f"it names {sorted(unknown)[:5]}, which are no tensors of the model")


class KeyframeHeader(Struct):
    """Of a keyframe, what is no tensor."""

    state: dict[str, dict[str, Any]]
    settings: list[dict[str, Any]]
    continues: bool


class AlteredEntry(Struct):
    """What was done to a step's gradient; `Alterations` says what it means."""

    weight: str | float
    changes: list[tuple[Kind, float]]


class BatchEntry(Struct):
    """A batch in the header of a segment; `Batch` says what it means."""

    size: Count
    weight: str | float
    index: str | None
    data: Any
    clipped: bool
    random: dict[str, str]
    ids: str | None = None
    altered: AlteredEntry | None = None


class HashedGradients(Struct, frozen=True):
    """The gradients of a step that were not kept: whose they are, and a hash of them all (`files.tensors_sha256`)."""

    names: tuple[str, ...]
    sha256: Sha256


class StepEntry(Struct):
    """A step in the header of a segment."""

    settings: list[dict[str, Any]] | None
    auxiliary: list[str]
    batches: list[BatchEntry]
    frozen: list[str] = []
    hashed: HashedGradients | None = None


class SegmentHeader(Struct):
    """Of a segment, what is no tensor."""

    steps: list[StepEntry]


def checked(content: Any, kind: type[T] | Any, name: object) -> T:
    """The content as `kind`. Raises TrajectoryError, naming what it is of and where it is wrong, for any other."""
    try:
        found: T = msgspec.convert(content, kind)
        return found
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise TrajectoryError(f"{name} is not what this package writes: {error}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises TrajectoryError if it is none, is behind a link, or is too large."""
    refuse_link(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise TrajectoryError(f"{path} has {size} bytes, and none of ours has over {MOST_BYTES}")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError):
        raise TrajectoryError(f"{path} is torn or altered: there is no JSON in it") from None


def refuse_link(path: Path) -> None:
    """Raises TrajectoryError where the path itself is a link."""
    if path.is_symlink():
        raise TrajectoryError(
            f"{path} is a link, which leads out of the run's directory; put the file itself there, if you trust it"
        )


def file_below(directory: Path, name: str) -> Path:
    """The path of a file below a directory, be it there or not. Raises TrajectoryError for a name that is not plain,
    and for one that a link lies on the way to."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(bad in name for bad in "\\\0"):
        raise TrajectoryError(f"{name!r} is no plain name of a file below {directory}")
    path = directory
    for part in parts:
        path = path / part
        refuse_link(path)
    return path
