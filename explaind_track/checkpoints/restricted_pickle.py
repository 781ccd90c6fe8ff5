"""Tables of contents that libraries write as pickles, read by an unpickler that makes plain values and nothing else.

A pickle runs whatever it names. This one looks every name up in a list of plain data classes, which its caller gives,
and refuses any other, so that nothing is imported or run.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from explaind_track.errors import CheckpointError


class _Restricted(pickle.Unpickler):
    """Knows no name but those that it is given."""

    def __init__(self, content: bytes, allowed: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_plain(content: bytes, path: Path, allowed: Mapping[str, Any]) -> Any:
    """What a pickle of plain values holds.

    Args:
        content: The pickle.
        path: The file it is from, for messages.
        allowed: The classes that it may name, by their qualified names.

    Raises:
        CheckpointError: It names something else, or is torn.
    """
    try:
        return _Restricted(content, allowed).load()
    except Exception as error:  # a torn pickle may lead to any
        raise CheckpointError(
            f"{path} holds something else than plain values ({error}), and reading that could run any code: save the "
            "checkpoint again with its own library, or copy it again if it is torn"
        ) from None
