"""Text whose tokens are coloured by what was done to their losses: for notebooks, for figures, and for the report.

Blue where the loss fell, orange where it rose, which the colour-blind tell apart as well; the stronger, the more. Each
text has a scale of its own, whose end is reached by one token in twenty.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from explaind_track.core.step import SHARES
from explaind_track.core.tables import inert

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = 5
"""Shades of each of the two colours."""

FULL = 0.95
"""The share of the tokens that lie within the scale."""

MOST_TOKENS = 2000
"""A text is shown up to here."""

MOST_GROUPS = 12

ALL = "all groups"

COLUMNS = ("effect", "token", "input", "change")
"""Of what `most_changed` gives."""

FELL = ("#e3eff9", "#c9e1f4", "#abd0ee", "#88bce6", "#6aabdf")
ROSE = ("#fdefe0", "#fbdfc0", "#f8ca98", "#f4b06a", "#ee9542")
INK = "#14151c"
"""On each of these colours the letters have a contrast above 7."""

LINE = 88
"""Letters in a line of a figure."""


def shades(changes: Sequence[float], within: float) -> tuple[list[int], float]:
    """The shade of each number, from −`LEVELS` (the largest falls) to `LEVELS`; and the size that has the strongest, up
    to which the share `within` of them lies."""
    numbers = np.nan_to_num(np.asarray(changes, dtype=np.float64), posinf=0.0, neginf=0.0)
    sizes = abs(numbers[numbers != 0])
    limit = float(np.quantile(sizes, within, method="higher")) if sizes.size else 0.0
    scaled = numbers / limit * LEVELS if limit else np.zeros_like(numbers)
    return [int(level) for level in np.clip(np.round(scaled), -LEVELS, LEVELS)], limit


@dataclass(frozen=True)
class ColoredText:
    """Tokens with a number each."""

    title: str
    tokens: Sequence[str]
    changes: Sequence[float]
    """Of the tokens' losses, in nats; below zero, a loss fell."""
    inputs: Sequence[int]
    """Where each token stands: a text begins anew where this changes."""

    @property
    def limit(self) -> float:
        """The change that has the strongest colour."""
        return shades(self.changes, FULL)[1]

    @property
    def levels(self) -> list[int]:
        """The shade of each token."""
        return shades(self.changes, FULL)[0]

    @property
    def legend(self) -> str:
        """What the colours say, in words."""
        more = len(self.tokens) - MOST_TOKENS
        cut = f" The first {MOST_TOKENS:,} of {len(self.tokens):,} tokens." if more > 0 else ""
        total = float(np.nansum(self.changes))
        return (
            f"Blue: the token's loss fell; orange: it rose. Strongest from {self.limit:.2g} nats; "
            f"{total:+.3g} in all.{cut}"
        )

    def lines(self) -> list[list[tuple[str, int, float]]]:
        """By input: each token's text as it can be shown, its shade, and its change."""
        rows = zip(self.inputs, self.tokens, self.levels, self.changes, strict=True)
        first = list(rows)[:MOST_TOKENS]
        return [[(visible(text), level, change) for _, text, level, change in own] for _, own in groupby(first, _input)]


def _input(row: tuple[int, str, int, float]) -> int:
    return row[0]


def visible(token: str) -> str:
    """A token's text with what is invisible, or what a terminal would obey, spelled out; ends of lines are marked."""
    return inert(token.replace("\t", "    ")).replace("\n", "⏎\n")


def texts_of(data: xr.Dataset) -> list[ColoredText]:
    """The texts that an influence with the axis "token" makes: all parts and groups together, then group by group,
    those that did most. All other axes are summed over."""
    influence = data["influence"]
    if "part" in influence.dims:
        influence = influence.sel(part=[part for part in influence["part"].values if part not in SHARES])
    kept = [axis for axis in ("group", "token") if axis in influence.dims]
    changes = -influence.sum([axis for axis in influence.dims if axis not in kept])

    tokens = [str(text) for text in data["token"].values]
    inputs = data["input"].values.tolist() if "input" in data else [0] * len(tokens)
    if "group" not in changes.dims:
        return [ColoredText(ALL, tokens, changes.values.tolist(), inputs)]
    whole = changes.sum("group").values.tolist()
    sizes = abs(changes).sum("token").values
    groups = sorted(np.argsort(sizes)[::-1][:MOST_GROUPS].tolist())
    names = [str(name) for name in changes["group"].values]
    own = [ColoredText(names[at], tokens, changes.isel(group=at).values.tolist(), inputs) for at in groups]
    return [ColoredText(ALL, tokens, whole, inputs), *own]


def most_changed(data: xr.Dataset, count: int) -> list[list[Any]]:
    """The tokens whose losses fell most and rose most: what became of them, the token, its input, and the change."""
    text = texts_of(data)[0]
    order = np.argsort(text.changes, kind="stable")
    fell = [at for at in order[:count] if text.changes[at] < 0]
    rose = [at for at in order[::-1][:count] if text.changes[at] > 0]
    return [
        [effect, repr(text.tokens[at]), text.inputs[at], text.changes[at]]
        for effect, places in (("helped", fell), ("harmed", rose))
        for at in places
    ]


def html(texts: Sequence[ColoredText]) -> str:
    """The texts for a notebook, in colours of their own on light and dark pages: all groups, and the rest to unfold."""
    shown = [
        f"<div><strong>{escape(text.title)}</strong><br><small>{escape(text.legend)}</small></div>" for text in texts
    ]
    many = 1 + MOST_TOKENS // len(texts[0].tokens)
    bodies = [head + _body(text) for head, text in zip(shown[:many], texts[:many], strict=True)]
    rest = f"<details><summary>by group</summary>{''.join(bodies[1:])}</details>" if len(bodies) > 1 else ""
    return bodies[0] + rest


def _body(text: ColoredText) -> str:
    paragraphs = ("".join(_span(*token) for token in line) for line in text.lines())
    style = "font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; margin: 0 0 .6em"
    return "".join(f"<p style='{style}'>{paragraph}</p>" for paragraph in paragraphs)


def _span(text: str, level: int, change: float) -> str:
    colors = f"background: {_color(level)}; color: {INK}" if level else ""
    return f"<span style='{colors}' title='{change:+.3g} nats'>{escape(text)}</span>"


def _color(level: int) -> str:
    return FELL[-level - 1] if level < 0 else ROSE[level - 1]


# ------------------------------------------------------------------------------------------------------------- figure


def text_size(texts: Sequence[ColoredText]) -> tuple[float, float]:
    """Inches that a figure of the texts takes."""
    rows = sum(3 + len(list(_rows(text))) for text in texts)
    return 0.0753 * (LINE + 2), 0.2 * rows


def draw(axes: "Axes", texts: Sequence[ColoredText]) -> None:
    """Draws the texts, one below the other, on axes that fill a figure of `text_size`."""
    from matplotlib.patches import Rectangle

    down = 0.0
    font: dict[str, Any] = {"family": "monospace", "size": 9, "va": "center", "parse_math": False, "color": INK}
    for text in texts:
        axes.text(1, down + 0.5, text.title, weight="bold", **font)
        axes.text(1, down + 1.4, text.legend, **{**font, "size": 7})
        down += 2
        for row in _rows(text):
            right = 1
            for piece, level in row:
                width = _width(piece)
                if level:
                    axes.add_patch(Rectangle((right, down), width, 0.94, facecolor=_color(level), linewidth=0))
                axes.text(right, down + 0.5, piece, **font)
                right += width
            down += 1
        down += 1
    axes.set_xlim(0, LINE + 2)
    axes.set_ylim(down, 0)
    axes.axis("off")


def _rows(text: ColoredText) -> Iterator[list[tuple[str, int]]]:
    """Lines of at most `LINE` letters: of each, the pieces of tokens with their shades."""
    for line in text.lines():
        row, room = list[tuple[str, int]](), LINE
        for token, level, _ in line:
            for piece in token.splitlines(keepends=True):
                rest = piece.removesuffix("\n")
                while rest:
                    if row and _width(rest) > room and room < LINE:
                        yield row
                        row, room = [], LINE
                    row.append((rest[:LINE], level))
                    room -= _width(rest[:LINE])
                    rest = rest[LINE:]
                if piece.endswith("\n"):
                    yield row
                    row, room = [], LINE
        if row:
            yield row


def _width(text: str) -> int:
    """Letters that take the room of two are counted twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
