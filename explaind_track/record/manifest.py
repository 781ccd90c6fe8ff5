"""The manifest of a trajectory: what was trained, and every file with its hash; sealed by a digest of all that."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256, write_atomic, write_tensors
from explaind_track.record.schema import FORMAT

MANIFEST = "manifest.json"
KEYFRAMES, STEPS = "keyframes", "steps"
PATHS = re.compile(rf"({KEYFRAMES}|{STEPS})/\d{{8,18}}\.safetensors")
"""The names of a trajectory's files: nothing else is read, and nothing outside of its directory."""


@dataclass(frozen=True)
class Entry:
    """One file of the trajectory, and the steps first ≤ s < last that it covers (none, for a keyframe)."""

    path: str
    first: int
    last: int
    size: int
    sha256: str

    @classmethod
    def checked(cls, path: str, first: int, last: int, size: int, sha256: str) -> "Entry":
        """An entry that was read. Raises ValueError, or TypeError, if it cannot be one of a trajectory's."""
        if not (isinstance(path, str) and PATHS.fullmatch(path)):
            raise ValueError(f"{path!r} is no name of a trajectory's file")
        if not all(type(number) is int and number >= 0 for number in (first, last, size)) or last < first:
            raise ValueError(f"{path!r} has the steps {first!r} to {last!r} and {size!r} bytes")
        return cls(path, first, last, size, sha256)

    @classmethod
    def write(
        cls, directory: Path, folder: str, first: int, last: int, tensors: Mapping[str, Tensor], header: Any
    ) -> "Entry":
        """Writes a file, and returns its entry. Raises TrajectoryError where it cannot be written.

        What the manifest on disk names is never written over, for until another manifest is there, that is the
        trajectory: a file for the same steps gets another name, with 9 digits for 8.
        """
        path = f"{folder}/{first:08}.safetensors"
        if (directory / path).exists() and any(path == entry.path for entry in Manifest.read(directory).entries):
            path = f"{folder}/{first:09}.safetensors"
        size, sha256 = write_tensors(directory / path, tensors, header)
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
        target = directory / self.path
        if not target.resolve().is_relative_to(directory.resolve()):
            raise TrajectoryError(f"{target} leads out of the trajectory's directory")
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
    def digest(self) -> str:
        """Stands for the whole trajectory: the hash of everything its manifest says, the files' hashes included."""
        return _digest(self._content())

    def to_bytes(self) -> bytes:
        """The manifest as its file holds it."""
        return json.dumps({**self._content(), "digest": self.digest}, indent=1).encode()

    def write(self, directory: Path) -> None:
        """Raises TrajectoryError where it cannot be written."""
        write_atomic(directory / MANIFEST, self.to_bytes())

    @classmethod
    def read(cls, directory: Path, missing_ok: bool = False) -> "Manifest":
        """The manifest in `directory`; an empty one where there is none, if `missing_ok`.

        Raises TrajectoryError if it is missing, torn, altered or of another format.
        """
        path = directory / MANIFEST
        if not path.is_file():
            if missing_ok:
                return cls({}, ())
            raise TrajectoryError(f"{directory} holds no trajectory: there is no {MANIFEST} in it")

        try:
            content = json.loads(path.read_bytes())
            digest = content.pop("digest")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TrajectoryError(f"{path} is torn or is no trajectory's manifest") from None

        # the format comes first: of another one, it is not known what the digest is of
        if content.get("format") != FORMAT:
            raise TrajectoryError(f"{path} has the format {content.get('format')!r}; this version reads {FORMAT!r}")
        if digest != _digest(content):
            raise TrajectoryError(f"{path} was altered: its digest does not fit its content")

        try:
            entries = tuple(Entry.checked(**entry) for entry in content.pop("files"))
        except (KeyError, TypeError, ValueError) as error:
            raise TrajectoryError(f"{path} does not list a trajectory's files: {error}") from None
        return cls(content, entries)

    def _content(self) -> dict[str, Any]:
        return {**self.head, "files": [asdict(entry) for entry in self.entries]}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def last_step(entries: Iterable[Entry]) -> int:
    """The number of steps that the files hold, if they hold all from the first on."""
    return max((entry.last for entry in entries), default=0)
