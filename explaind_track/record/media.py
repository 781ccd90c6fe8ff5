"""Tables, pictures and sounds of the panels, as our own record keeps them.

In a row of history.jsonl a table is {"columns": […], "data": [[…], …]}. A picture, which may be a cell of a table, is
{"picture": "media/<sha256>.png"}: a file beside it, known by its content; a sound is {"sound": "media/<sha256>.wav"}.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256, write_atomic
from explaind_track.record.validation import Integer, checked, file_below

MEDIA = "media"

KINDS = {".png": "picture", ".wav": "sound"}
"""What a row calls a file, by how its name ends."""

PictureName = Annotated[str, msgspec.Meta(pattern=rf"^{MEDIA}/[0-9a-f]{{64}}\.png\Z")]
SoundName = Annotated[str, msgspec.Meta(pattern=rf"^{MEDIA}/[0-9a-f]{{64}}\.wav\Z")]
"""The names of files beside the rows."""


class Medium(msgspec.Struct, forbid_unknown_fields=True):
    """A picture or a sound in a row of the history."""

    picture: PictureName | None = None
    sound: SoundName | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where it is not one of the two."""
        if (self.picture is None) is (self.sound is None):
            raise ValueError("it is a picture or a sound")


class TableEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A table in a row of the history."""

    columns: list[str]
    data: list[list[bool | Integer | float | str | Medium | None]]

    def __post_init__(self) -> None:
        """Raises ValueError where a row has more cells than columns, or fewer."""
        if any(len(line) != len(self.columns) for line in self.data):
            raise ValueError(f"its rows have other than {len(self.columns)} cells")


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of numbers, words, pictures and sounds: a PNG or WAV, or the file that holds it."""

    columns: list[str]
    data: list[list[Any]]


def refuse_other(value: Mapping[str, Any], name: str) -> None:
    """Raises TrajectoryError, by its `name`, unless what was read from a row is a table, a picture or a sound."""
    checked(value, TableEntry if "columns" in value else Medium, name)


def is_medium(path: str) -> bool:
    """Whether a path is the name of a picture's or a sound's file."""
    with suppress(msgspec.ValidationError):
        return bool(msgspec.convert(path, PictureName if path.endswith(".png") else SoundName))
    return False


def media_of(directory: Path) -> list[str]:
    """The names of the files that rows of the run in `directory` show. Raises TrajectoryError where one is a link."""
    names = (f"{MEDIA}/{path.name}" for path in (directory / MEDIA).glob("*"))
    found = sorted(name for name in names if is_medium(name))
    return [name for name in found if file_below(directory, name).is_file()]


def with_files(row: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The row with each of its pictures and sounds written to a file. Raises TrajectoryError where that fails."""

    def write(value: Any) -> Any:
        if not isinstance(value, bytes):
            return value
        ending = ".wav" if is_sound(value) else ".png"
        path = directory / MEDIA / f"{hashlib.sha256(value).hexdigest()}{ending}"
        if not path.is_file():
            write_atomic(path, value)
        return path

    return map_values(row, write)


def is_sound(content: bytes) -> bool:
    """Whether it is the content of a WAV file."""
    return content.startswith(b"RIFF")


def to_json(value: Any) -> Any:
    """Tables, and pictures and sounds in files, as JSON has them: the `default` of `json.dumps`."""
    if isinstance(value, Table):
        return {"columns": value.columns, "data": value.data}
    if isinstance(value, Path):
        return {KINDS[value.suffix]: f"{MEDIA}/{value.name}"}
    raise TypeError(f"{value!r} has no place in a record")


def from_json(
    row: Mapping[str, Any], directory: Path, damaged: Literal["raise", "leave out"] = "raise"
) -> dict[str, Any]:
    """A row as it was recorded in the directory.

    damaged: what becomes of a value with a file that is missing, or is not what was written: TrajectoryError, or a
    row without it.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        (name,) = value.values()
        path = file_below(directory, name)
        if not path.is_file() or file_sha256(path) != path.stem:
            raise TrajectoryError(f"{path} is missing or was altered; a row of the panels shows it")
        return path

    found: dict[str, Any] = {}
    for key, value in row.items():
        shown = Table(**value) if isinstance(value, dict) and "columns" in value else value
        try:
            found |= map_values({key: shown}, read)
        except TrajectoryError:
            if damaged == "raise":
                raise
    return found


def map_values(row: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The row with every value changed; of tables, every cell."""

    def changed(value: Any) -> Any:
        if not isinstance(value, Table):
            return change(value)
        return Table(value.columns, [[change(cell) for cell in line] for line in value.data])

    return {key: changed(value) for key, value in row.items()}
