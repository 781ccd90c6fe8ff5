"""Summaries: what a prompt and a notebook show of an object, a title and a small table in the place of its tensors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
CURVE_LENGTH = 12


def curve(values: Sequence[float]) -> str:
    """The values as a line of bars, from the smallest to the largest of them; of many values, every n-th."""
    if len(values) > CURVE_LENGTH:
        values = [values[place * len(values) // CURVE_LENGTH] for place in range(CURVE_LENGTH)]
    low, high = min(values), max(values)
    height = (high / 2 - low / 2) or 1.0  # halves, which do not overflow; 1 for a curve that does not move
    return "".join(BARS[int((value / 2 - low / 2) / height * (len(BARS) - 1))] for value in values)


def sizes_in_words(sizes: dict[str, int]) -> str:
    """Axes with their sizes: `3 group × 60 step`."""
    return " × ".join(f"{size} {axis}" for axis, size in sizes.items()) or "one number"


@dataclass(frozen=True)
class Summary:
    """A title, and rows of words and numbers under their columns' names."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()

    def text(self) -> str:
        """Lines, with the columns one below the other."""
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in lines if line.strip())])

    def html(self) -> str:
        """A table, in the colours and letters of the page that it stands on."""
        head = "".join(f"<th style='text-align: left'>{escape(name)}</th>" for name in self.columns)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in self.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if self.rows else ""
        return f"<div><div><strong>{escape(self.title)}</strong></div>{table}</div>"


def _html_cell(value: Any) -> str:
    return f"<td style='text-align: left'>{escape(_cell(value))}</td>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    is_real = isinstance(value, Real) and not isinstance(value, int)
    return f"{float(value):.3g}" if is_real else str(value)


class Summarized(ABC):
    """An object that prints as its summary, and shows it as a table in notebooks."""

    @abstractmethod
    def _summary(self) -> Summary:
        """What there is to be said in a few lines, and at no cost."""

    def __repr__(self) -> str:
        return self._summary().text()

    def _repr_html_(self) -> str:
        return self._summary().html()
