"""Words and tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def inert(words: str) -> str:
    """Words that may hold names out of a record, with all that a terminal would obey, or hide, spelled out."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in words
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text in columns; numbers with four digits, None as a dash."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
        return "–" if value is None else str(value)

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)
