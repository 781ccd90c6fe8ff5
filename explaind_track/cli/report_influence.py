"""The report of an influence of tokens: its text, coloured, and what each group did."""

from collections.abc import Mapping, Sequence
from typing import Any

from explaind_track.cli.report import page_of, spelled_table
from explaind_track.cli.report_texts import drawn
from explaind_track.core.colored_text import ColoredText, texts_of
from explaind_track.core.influence import Influence


def make_influence_report(influence: Influence, title: str) -> str:
    """Makes the HTML of an influence with the axis "token": its text, coloured, and what each group did in all.

    Raises ValueError for an influence without that axis.
    """
    data = influence.data
    if "token" not in data["influence"].dims:
        raise ValueError(
            f"{title} keeps {', '.join(influence.kept) or 'no axis'}, and a report shows the tokens of an influence: "
            "explain(…, Query.tokens(…), keep=('group', 'token')). influence.plot() draws others"
        )

    texts = texts_of(data)
    residual = f", residual at most {float(data['residual'].max()):.2g}" if "residual" in data else ""
    span = f"{len(texts[0].tokens):,} tokens of {len(set(texts[0].inputs))} inputs, {steps_of(data.attrs)}{residual}."
    parts = {"texts": {"queries": [{"name": "", "texts": [*map(drawn, texts)]}]}}
    return page_of(title, span, [], [], totals=spelled_table(_totals(texts)), **parts)


def steps_of(attrs: Mapping[str, Any]) -> str:
    """The steps that an influence is of, in words."""
    if "first_step" not in attrs:
        return "of a run"
    return f"training steps {attrs['first_step']} to {attrs['last_step']}"


def _totals(texts: Sequence[ColoredText]) -> list[list[Any]]:
    rows: list[list[Any]] = [["group", "change of the loss, all tokens (nats)", "tokens whose loss fell", "rose"]]
    for text in texts:
        fell, rose = (sum(change * sign > 0 for change in text.changes) for sign in (-1, 1))
        rows.append([text.title, float(sum(text.changes)), fell, rose])
    return rows
