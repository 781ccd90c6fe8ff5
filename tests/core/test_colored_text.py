"""Text whose tokens are coloured: what is on the page is what was written, inert, in shades that say how much."""

import re
from html import unescape

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from explaind_track import Influence
from explaind_track.core.colored_text import FELL, INK, LEVELS, ROSE, ColoredText, html, texts_of, visible

BAD = [
    "</span><script>alert(1)</script>",
    "' onmouseover='alert(2)",
    "\x1b[31m",
    "\u202e",
    " a\n",
    "\tb",
    "$x_1$",
    "&lt;",
]


def influence(tokens: list[str], values: np.ndarray) -> Influence:
    """values: (parts, groups, tokens)."""
    labels = {"part": ["kernel", "momentum", "regularization"], "group": ["a", "b"], "token": np.array(tokens, object)}
    inputs = ("token", np.arange(len(tokens)) // 4)
    return Influence(xr.Dataset({"influence": (("part", "group", "token"), values), "input": inputs}, labels))


@pytest.fixture
def hostile() -> Influence:
    return influence(BAD, np.random.default_rng(0).normal(size=(3, 2, len(BAD))))


def test_a_text_is_the_sum_over_the_parts_without_shares(hostile: Influence) -> None:
    values = hostile.data["influence"].values
    whole, *own = texts_of(hostile.data)
    np.testing.assert_allclose(whole.changes, -(values[0] + values[2]).sum(0))
    by_name = {text.title: text.changes for text in own}
    for place, name in enumerate("ab"):
        np.testing.assert_allclose(by_name[name], -(values[0] + values[2])[place])
    assert [len(line) for line in whole.lines()] == [4, 4]


def test_no_token_leaves_its_place(hostile: Influence) -> None:
    page = hostile._repr_html_()
    assert not re.search(r"<(?!/?(div|strong|br|small|p|span|table|thead|tbody|tr|th|td|details|summary)[ >])", page)
    assert not re.search(r"<[^>]* on\w+=", page)
    spans = re.findall(r"<span style='([^']*)' title='([^']*)'>([^<]*)</span>", html(texts_of(hostile.data)[:1]))
    assert [unescape(text) for *_, text in spans] == [visible(token) for token in BAD]
    assert all(re.fullmatch(r"[+-][\d.e+-]+ nats", number) for _, number, _ in spans)
    assert all(letter.isprintable() or letter == "\n" for letter in repr(hostile) + page)
    assert "\x1b" not in repr(hostile)


def test_a_figure_is_drawn_of_any_text(hostile: Influence) -> None:
    figure = hostile.plot()
    figure.canvas.draw()
    shown = "".join(text.get_text() for text in figure.axes[0].texts)
    assert "$x_1$" in shown
    assert "\\x1b[31m" in shown


@given(st.lists(st.floats(-1e30, 1e30) | st.just(float("nan")), max_size=60))
def test_shades_say_the_sign_and_the_order(changes: list[float]) -> None:
    text = ColoredText("t", ["x"] * len(changes), changes, [0] * len(changes))
    levels = text.levels
    assert all(
        -LEVELS <= level <= LEVELS and level * change >= 0
        for level, change in zip(levels, changes, strict=True)
        if change == change
    )
    known = sorted((change, level) for change, level in zip(changes, levels, strict=True) if change == change)
    assert [level for _, level in known] == sorted(level for _, level in known)
    assert "nats" in text.legend


def test_letters_can_be_read_on_every_shade() -> None:
    def brightness(color: str) -> float:
        parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for shade in (*FELL, *ROSE):
        assert (brightness(shade) + 0.05) / (brightness(INK) + 0.05) > 7
