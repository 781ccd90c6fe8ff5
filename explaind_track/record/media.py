"""Tables and pictures of the panels, as our own record keeps them.

In a row of history.jsonl a table is {"columns": […], "data": [[…], …]}. A picture, which may be a cell of a table, is
{"picture": "media/<sha256>.png"}: a file beside it, known by its content.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256, write_atomic

MEDIA = "media"
PICTURE = re.compile(rf"{MEDIA}/[0-9a-f]{{64}}\.png")
"""The names of pictures' files, beside the rows."""


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of numbers, words and pictures: a PNG, or the file that holds it."""

    columns: list[str]
    data: list[list[Any]]


def with_files(row: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The row with each of its pictures written to a file. Raises TrajectoryError where that fails."""

    def write(value: Any) -> Any:
        if not isinstance(value, bytes):
            return value
        path = directory / MEDIA / f"{hashlib.sha256(value).hexdigest()}.png"
        if not path.is_file():
            write_atomic(path, value)
        return path

    return map_values(row, write)


def to_json(value: Any) -> Any:
    """Tables, and pictures in files, as JSON has them: the `default` of `json.dumps`."""
    if isinstance(value, Table):
        return {"columns": value.columns, "data": value.data}
    if isinstance(value, Path):
        return {"picture": f"{MEDIA}/{value.name}"}
    raise TypeError(f"{value!r} has no place in a record")


def from_json(
    row: Mapping[str, Any], directory: Path, damaged: Literal["raise", "leave out"] = "raise"
) -> dict[str, Any]:
    """A row as it was recorded in the directory.

    damaged: what becomes of a value with a picture that is missing, or is not what was written: TrajectoryError, or a
    row without it.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        path = directory / MEDIA / Path(value["picture"]).name
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
