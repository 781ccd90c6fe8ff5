"""The manifest of a trajectory: what was trained, and every file with its hash; sealed by a digest of all that."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import Tensor

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256, json_sha256, write_atomic, write_tensors
from explaind_track.record.schema import FORMAT
from explaind_track.record.validation import Count, Head, Sha256, checked, file_below, read_json

MANIFEST = "manifest.json"
KEYFRAME_LIST = "keyframes.json"
"""In its place, of a run whose parameters are in pieces: see `keyframe_list`."""
KEYFRAMES, STEPS = "keyframes", "steps"
PATHS = re.compile(rf"^({KEYFRAMES}|{STEPS})/[0-9]{{8,18}}\.safetensors\Z")
"""The names of a trajectory's files: nothing else is read, and nothing outside of its directory."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the trajectory, and the steps first ≤ s < last that it covers (none, for a keyframe)."""

    path: Annotated[str, msgspec.Meta(pattern=PATHS.pattern)]
    first: Count
    last: Count
    size: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        """Raises ValueError if no file of a trajectory can be like that."""
        number = int(self.path.partition("/")[2].removesuffix(".safetensors"))
        covered = self.last - self.first
        if number != self.first or (covered != 0 if self.is_keyframe else covered < 1) or covered > self.size:
            raise ValueError(f"{self.path} cannot have steps {self.first} to {self.last} in {self.size} bytes")

    @classmethod
    def write(
        cls,
        directory: Path,
        folder: str,
        first: int,
        last: int,
        tensors: Mapping[str, Tensor],
        header: Any,
        compress: bool = False,
    ) -> "Entry":
        """Writes a file, and returns its entry. compress: whether gradients are packed. Raises TrajectoryError where it
        cannot be written.

        What the manifest on disk names is never written over, for until another manifest is there, that is the
        trajectory: a file for the same steps gets another name, with 9 digits for 8.
        """
        path = f"{folder}/{first:08}.safetensors"
        if (directory / path).exists() and any(path == entry.path for entry in Manifest.read(directory).entries):
            path = f"{folder}/{first:09}.safetensors"
        size, sha256 = write_tensors(file_below(directory, path), tensors, header, compress)
        return cls(path, first, last, size, sha256)

    @property
    def folder(self) -> str:
        """`KEYFRAMES` or `STEPS`."""
        return self.path.split("/")[0]

    @property
    def is_keyframe(self) -> bool:
        """A checkpoint; otherwise a segment of steps."""
        return self.folder == KEYFRAMES

    def verify(self, directory: Path) -> None:
        """Raises TrajectoryError unless the file in `directory` is, byte for byte, the one that was written."""
        self.verify_size(directory)
        target = directory / self.path
        found = file_sha256(target)
        if found != self.sha256:
            raise TrajectoryError(f"{target} was altered: its sha256 is {found}, {self.sha256} was written")

    def verify_size(self, directory: Path) -> None:
        """Raises TrajectoryError if the file is missing, or not as long as it was."""
        target = file_below(directory, self.path)
        if not target.is_file():
            raise TrajectoryError(f"{target} is missing; fetch the trajectory again, or open an earlier copy of it")
        size = target.stat().st_size
        if size != self.size:
            raise TrajectoryError(f"{target} has {size} bytes, {self.size} were written: the file is torn")


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`: the head (see `schema.head_of`), and an entry for each file."""

    head: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @property
    def steps(self) -> int:
        """The number of recorded steps."""
        return last_step(self.entries)

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter: no gradient has more."""
        return max((8 * math.prod(shape) for shape, _ in self.head["parameters"].values()), default=0)

    @property
    def digest(self) -> str:
        """Stands for the whole trajectory: the hash of everything its manifest says, the files' hashes included."""
        return json_sha256(self._content())

    def to_bytes(self) -> bytes:
        """The manifest as its file holds it."""
        content = {**self.head, "files": self.entries, "digest": self.digest}
        return msgspec.json.format(msgspec.json.encode(content), indent=1)

    def write(self, directory: Path) -> None:
        """Raises TrajectoryError where it cannot be written."""
        write_atomic(directory / MANIFEST, self.to_bytes())

    @classmethod
    def read(cls, directory: Path, missing_ok: bool = False) -> "Manifest":
        """The manifest in `directory`; an empty one where there is none, if `missing_ok`.

        Raises TrajectoryError if it is missing, torn, altered, of another format, or says what cannot be.
        """
        path = directory / MANIFEST
        if not path.is_file():
            if missing_ok:
                return cls({}, ())
            raise TrajectoryError(f"{directory} holds no trajectory: {_missing(directory)}")

        content = read_json(path)
        if not isinstance(content, dict):
            raise TrajectoryError(f"{path} is torn or is no trajectory's manifest")

        # the format comes first: of another one, it is not known what the digest is of
        if content.get("format") != FORMAT:
            raise TrajectoryError(f"{path} has the format {content.get('format')!r}; this version reads {FORMAT!r}")
        if content.pop("digest", None) != json_sha256(content):
            raise TrajectoryError(f"{path} was altered: its digest does not fit its content")

        entries: list[Entry] = checked(content.pop("files", None), list[Entry], f"`files` in {path}")
        checked(content, Head, path)
        _refuse_gaps(entries, path)
        return cls(content, tuple(entries))

    def _content(self) -> dict[str, Any]:
        return {**self.head, "files": [msgspec.structs.asdict(entry) for entry in self.entries]}


def _missing(directory: Path) -> str:
    """What is there in the place of a manifest."""
    if (directory / KEYFRAME_LIST).is_file():
        return (
            "its run's parameters were in pieces, one for each process, so that it has rows (`explaind-track report`) "
            "and keyframes to go on from, and no gradients to explain steps by. Explain the run's own checkpoints: "
            "CheckpointSeries.open(…)"
        )
    return f"there is no {MANIFEST} in it"


def _refuse_gaps(entries: Iterable[Entry], path: Path) -> None:
    """Raises TrajectoryError unless the segments hold every step from 0 on once, and each keyframe is among them."""
    expected = 0
    for segment in sorted((entry for entry in entries if not entry.is_keyframe), key=lambda entry: entry.first):
        if segment.first != expected:
            kind = "lacks" if segment.first > expected else "has twice"
            raise TrajectoryError(
                f"{path} {kind} the steps {min(expected, segment.first)} to {max(expected, segment.first) - 1}"
            )
        expected = segment.last

    keyframes = [entry.first for entry in entries if entry.is_keyframe]
    if len({*keyframes}) < len(keyframes) or max(keyframes, default=0) > expected:
        raise TrajectoryError(f"{path} has keyframes {sorted(keyframes)[-5:]} for {expected} steps: twice, or too far")


def last_step(entries: Iterable[Entry]) -> int:
    """The number of steps that the files hold, if they hold all from the first on."""
    return max((entry.last for entry in entries), default=0)
