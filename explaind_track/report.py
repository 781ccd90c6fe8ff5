"""A run as one HTML file that needs nothing else: figures to zoom and to read off, and tables. Needs plotly (`cli`)."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explaind_track.panels import AXIS
from explaind_track.runs import Tie

if TYPE_CHECKING:
    import plotly.graph_objects as go

POINTS = 4000
"""A longer run is drawn by every n-th of its rows."""

EARLY_STEPS = 10
"""An optimizer's first steps move a model by far more than all others do: they do not set the scale."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #1a1a2e; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p { color: #555; margin: .3rem 0; max-width: 75ch; }
table { border-collapse: collapse; margin: .8rem 0; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
td { border-top: 1px solid #e3e3ea; font-variant-numeric: tabular-nums; } th { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 1rem; }
.figures > div { min-width: 0; }
"""

# A figure is drawn while its row is still being read, as if it were alone in it.
FIT = """addEventListener('load', () =>
  document.querySelectorAll('.js-plotly-plot').forEach(figure => Plotly.Plots.resize(figure)))"""


def report(rows: Sequence[Mapping[str, Any]], head: Mapping[str, Any], title: str, tie: Tie | None = None) -> str:
    """The HTML of a run's report.

    rows: of its panels, in order; head: of its trajectory's manifest. Raises ValueError if there is no row.
    """
    from plotly.offline import get_plotlyjs

    if not rows:
        raise ValueError(f"{title} has no rows yet: there is nothing to report")
    thinned = rows[:: -(-len(rows) // POINTS)]
    note = "" if len(thinned) == len(rows) else f" Drawn are {len(thinned)} of {len(rows)} rows."
    sections = []
    for heading, words, figures in _figures(thinned):
        if figures:
            drawn = "".join(f"<div>{_html(figure)}</div>" for figure in figures)
            sections.append(f"<h2>{escape(heading)}</h2><p>{escape(words)}</p><div class='figures'>{drawn}</div>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><link rel='icon' href='data:,'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>{escape(title)}</h1><p>{len(rows)} rows, training steps {rows[0][AXIS]} to {rows[-1][AXIS]}.{note}</p>"
        f"{_table(_facts(head, tie)) if head or tie else ''}"
        f"<h2>What the groups did, over all steps</h2>{_table(_totals(rows))}"
        f"{''.join(sections)}<script>{FIT}</script></body></html>"
    )


def _html(figure: "go.Figure") -> str:
    config = {"displaylogo": False, "responsive": True}
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config=config, default_height="340px")
    return html


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list["go.Figure"]]]:
    """Sections: their heading, what they show, and their figures."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def groups(prefix: str) -> dict[str, str]:
        """What follows the prefix, and the key; the sum over all groups is no group."""
        return {key[len(prefix) :]: key for key in keys if key.startswith(prefix) and not key.endswith("/total")}

    def own(*suffixes: str) -> dict[str, str]:
        return {key: key for key in keys if key.endswith(suffixes) and not key.startswith("residual/")}

    kernel, loss = groups("kernel/"), groups("loss/")
    totals = {"kernel": "kernel/total", "weight decay": "reg/total"}
    changes = {name: key for name, key in loss.items() if "/" in name}
    return [
        ("Predictions", "Loss and accuracy.", _some(rows, [("loss", own("/loss")), ("accuracy", own("/accuracy"))])),
        (
            "Importance",
            "Ψ̄ of each step: the size of what the training samples did to the queries' predictions through each group "
            "of parameters (kernel), and of what weight decay did (regularization).",
            _some(rows, [("kernel, by group", kernel), ("weight decay, by group", groups("reg/"))], stacked=True)
            + _some(rows, [("all groups together", {n: k for n, k in totals.items() if k in keys})]),
        ),
        (
            "Relative regularization influence",
            "D of each step: signed kernel minus signed regularization influence.",
            _some(rows, [("D, by group", groups("D/"))]),
        ),
        (
            "Change of the loss",
            "How much each group changed the queries' loss in each step; below zero: it fell.",
            _some(
                rows,
                [
                    (f"through {words}", {n.split("/", 1)[1]: k for n, k in changes.items() if n.startswith(part)})
                    for part, words in (("kernel/", "the training samples"), ("reg/", "weight decay"))
                ],
            ),
        ),
        (
            "How far to trust this",
            "The residual is what the split leaves over, relative to the change of the prediction.",
            _some(rows, [("residual", groups("residual/"))], log=True)
            + _some(rows, [("seconds for each step", groups("cost/seconds_"))]),
        ),
    ]


def _some(
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, Mapping[str, str]]],
    stacked: bool = False,
    log: bool = False,
) -> list["go.Figure"]:
    return [_curves(rows, title, curves, stacked, log) for title, curves in figures if curves]


def _curves(
    rows: Sequence[Mapping[str, Any]], title: str, curves: Mapping[str, str], stacked: bool, log: bool
) -> "go.Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    late: dict[Any, float] = {}
    for name, key in curves.items():
        points = [(row[AXIS], row[key]) for row in rows if key in row]
        x, y = [point[0] for point in points], [point[1] for point in points]
        line, group = {"width": 0.8 if stacked else 1.4}, "all" if stacked else None
        figure.add_scatter(x=x, y=y, name=name, mode="lines", line=line, stackgroup=group)
        for step, value in points[EARLY_STEPS:]:
            late[step if stacked else (step, key)] = late.get(step, 0.0) + value if stacked else value
    figure.update_layout(
        title={"text": title, "font": {"size": 14}},
        xaxis_title="training step",
        template="plotly_white",
        hovermode="x unified",
        margin={"l": 50, "r": 10, "t": 40, "b": 40},
        legend={"orientation": "h", "y": -0.2},
    )
    if log:
        figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    elif late:
        low, high = min(0.0, *late.values()), max(late.values())
        figure.update_yaxes(range=[low - 0.05 * (high - low), high + 0.05 * (high - low)])
    return figure


def _facts(head: Mapping[str, Any], tie: Tie | None) -> list[list[str]]:
    names = {"optimizer": head["optimizer"], "parameter tensors": len(head["parameters"])} if head else {}
    run = {} if tie is None else {"W&B run": tie.path, **{f"config: {k}": v for k, v in tie.config.items()}}
    return [
        ["", ""],
        *([str(name), str(value)] for name, value in {**names, **head.get("packages", {}), **run}.items()),
    ]


def _totals(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Sums over the steps, by group; the importance of single steps adds up to more than that of the whole run."""
    columns = {
        "Σ importance, kernel": "kernel/{}",
        "Σ importance, weight decay": "reg/{}",
        "Σ D": "D/{}",
        "loss, through samples": "loss/kernel/{}",
        "loss, through weight decay": "loss/reg/{}",
    }
    names = list(dict.fromkeys(key[7:] for row in rows for key in row if key.startswith("kernel/")))
    table = [["group", *columns]]
    for name in names:
        sums = [sum(row.get(key.format(name), 0.0) for row in rows) for key in columns.values()]
        table.append([name, *(f"{value:.4g}" for value in sums)])
    return table


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(rows)]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _tagged(rows: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return [("td" if place else "th", row) for place, row in enumerate(rows)]


def write_report(path: Path, html: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
