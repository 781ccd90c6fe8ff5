"""The record of a run whose parameters are in pieces: rows, and whole states of the run every so many steps.

keyframes.json                    the model's and the optimizer's class, names and shapes, and every file below with its
                                  size and sha256; sealed by a digest
keyframes/00000100/               the run as step 99 has left it, a folder of `torch.distributed.checkpoint`: each
                                  process writes the pieces that it holds
    parameter:NAME  buffer:NAME   the model
    state:KEY:NAME                the optimizer's state
    share:PART:NAME               how much of a momentum buffer is due to weight decay and to the past
    random:RANK:DEVICE            the random generators of each process

No gradients are kept: those of a model that has to be cut into pieces would fill any disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256, json_sha256, sync_directory, write_atomic
from explaind_track.record.manifest import KEYFRAME_LIST, KEYFRAMES
from explaind_track.record.validation import Count, Head, Sha256, checked, file_below, read_json, refuse_link

FORMAT = "explaind_track keyframes 1"

FileName = Annotated[str, Meta(pattern=r"^(\.metadata|__[0-9]{1,6}_[0-9]{1,6}\.distcp)\Z")]


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a keyframe."""

    size: Count
    sha256: Sha256


class KeyframeEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """A keyframe: where it is, and what of it is no tensor."""

    number: Count
    """Of the step that would come next."""
    processes: Count
    """How many have written it."""
    state: dict[str, dict[str, Any]]
    """Of the optimizer's state, by parameter, what is no tensor."""
    files: dict[FileName, FileEntry]

    @property
    def folder(self) -> str:
        return f"{KEYFRAMES}/{self.number:08}"

    @classmethod
    def of(cls, directory: Path, number: int, processes: int, state: Mapping[str, dict[str, Any]]) -> "KeyframeEntry":
        """That of a folder that the processes have written, once it is on the disk."""
        empty = cls(number, processes, dict(state), {})
        folder = file_below(directory, empty.folder)
        paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
        files = {path.name: FileEntry(path.stat().st_size, file_sha256(path)) for path in paths}
        sync_directory(folder)
        sync_directory(folder.parent)
        return msgspec.structs.replace(empty, files=files)

    def verify(self, directory: Path) -> None:
        """Raises TrajectoryError unless each of its files is, byte for byte, as it was written."""
        folder = file_below(directory, self.folder)
        for name, entry in self.files.items():
            path = folder / name
            refuse_link(path)
            if not path.is_file() or path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
                raise TrajectoryError(
                    f"{path} is missing, torn or altered: copy it again, or load a checkpoint of your own of an "
                    "earlier keyframe's step, and go on there by resume=, its number"
                )


class KeyframeList(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `keyframes.json`."""

    head: dict[str, Any]
    """See `schema.head_of`."""
    keyframes: tuple[KeyframeEntry, ...] = ()

    def with_entry(self, entry: KeyframeEntry) -> "KeyframeList":
        others = tuple(other for other in self.keyframes if other.number != entry.number)
        return KeyframeList(self.head, (*others, entry))

    def until(self, number: int) -> "KeyframeList":
        """Without the keyframes behind that of step `number`."""
        return KeyframeList(self.head, tuple(entry for entry in self.keyframes if entry.number <= number))

    def write(self, directory: Path) -> None:
        """Raises TrajectoryError where it cannot be written."""
        content = msgspec.to_builtins(self)
        sealed = {**content, "digest": json_sha256(content)}
        write_atomic(directory / KEYFRAME_LIST, msgspec.json.format(msgspec.json.encode(sealed), indent=1))

    @classmethod
    def read(cls, directory: Path) -> "KeyframeList | None":
        """That of a directory; None where there is none. Raises TrajectoryError if it is torn, altered or of another
        format."""
        path = file_below(directory, KEYFRAME_LIST)
        if not path.is_file():
            return None
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("digest", None) != json_sha256(content):
            raise TrajectoryError(f"{path} was torn or altered: its digest does not fit its content")
        found: KeyframeList = checked(content, cls, path)
        if found.head.get("format") != FORMAT:
            raise TrajectoryError(f"{path} has the format {found.head.get('format')!r}; this version reads {FORMAT!r}")
        checked(found.head, Head, path)
        return found
