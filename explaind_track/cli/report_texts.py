"""Coloured text in a report: which tokens were helped, from the tables of a run or from an influence."""

from collections.abc import Mapping
from typing import Any

from explaind_track.cli.report_figures import Rows
from explaind_track.core.colored_text import ColoredText
from explaind_track.record.history import TOKENS

NUMBERED = ("token", "input", "loss")
"""The columns of a table of tokens before those of changes."""


def texts_in(rows: Rows) -> dict[str, Any] | None:
    """The texts of the tables of tokens in the rows, added up over the run, as the page's template takes them; None
    where there are none."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{TOKENS}/"))
    queries = []
    for key in keys:
        tables = [row[key] for row in rows if isinstance(row.get(key), Mapping) and "columns" in row[key]]
        if tables and (texts := _texts_of(tables)):
            queries.append({"name": key.removeprefix(f"{TOKENS}/"), "texts": [*map(drawn, texts)]})
    return {"queries": queries} if queries else None


def _texts_of(tables: list[Mapping[str, Any]]) -> list[ColoredText]:
    """The changes of all tables that have the columns and the tokens of the last."""
    last = tables[-1]
    columns: list[str] = last["columns"]
    if tuple(columns[: len(NUMBERED)]) != NUMBERED:
        return []
    named = [line[:2] for line in last["data"]]
    same = [one for one in tables if one["columns"] == columns and [line[:2] for line in one["data"]] == named]

    texts = []
    for place, title in enumerate(columns[len(NUMBERED) :], len(NUMBERED)):
        by_table = [[_number(line[place]) for line in one["data"]] for one in same]
        changes = [sum(values) for values in zip(*by_table, strict=True)]
        texts.append(ColoredText(title, [str(token) for token, _ in named], changes, [number for _, number in named]))
    return texts


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def drawn(text: ColoredText) -> dict[str, Any]:
    """A text as the page's template takes it."""
    lines = [
        [{"text": token, "level": level, "change": f"{change:+.3g}"} for token, level, change in line]
        for line in text.lines()
    ]
    return {"title": text.title, "legend": text.legend, "lines": lines}
