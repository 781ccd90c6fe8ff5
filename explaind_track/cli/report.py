"""A run as one HTML file that needs nothing else: figures to zoom and to read off, and tables. Needs plotly (`cli`)."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    LOSS,
    QUERY_COSINES,
    REGULARIZATION,
    RESIDUAL,
    SAMPLE_MAP,
    SAMPLES,
    SECONDS,
    TOTAL,
    change_key,
    importance_key,
    is_measure,
    is_residual,
    keys_by_group,
)
from explaind_track.record.media import from_json
from explaind_track.record.run_directory import Tie

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
img { max-width: 100%; } td img { width: 48px; image-rendering: pixelated; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-weight: 600; }
"""

# A figure is drawn while its row is still being read, as if it were alone in it.
FIT = """addEventListener('load', () =>
  document.querySelectorAll('.js-plotly-plot').forEach(figure => Plotly.Plots.resize(figure)))"""


def make_report(
    rows: Sequence[Mapping[str, Any]],
    head: Mapping[str, Any],
    title: str,
    tie: Tie | None = None,
    directory: Path | None = None,
) -> str:
    """The HTML of a run's report.

    rows: of its panels, in order; head: of its trajectory's manifest; directory: where the pictures of the rows are.
    Raises ValueError if there is no row, TrajectoryError for a picture that is not what was written.
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
        f"<p>{escape(_end(rows))}</p>"
        f"<h2>What the groups did, over all steps</h2>{_table(_totals(rows))}"
        f"{''.join(sections)}{'' if directory is None else _samples(rows, directory)}"
        f"{f'<details><summary>Configuration</summary>{_table(_facts(head, tie))}</details>' if head or tie else ''}"
        f"<script>{FIT}</script></body></html>"
    )


def _end(rows: Sequence[Mapping[str, Any]]) -> str:
    """The run in a sentence."""
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    values = [f"{key} {last[key]:.4g}" for key in last if is_measure(key)]
    names = [key for key in last if is_residual(key)]
    values += [f"median of {name} {median(row[name] for row in rows if name in row):.2g}" for name in names]
    return f"At the end: {', '.join(values)}." if values else ""


def _samples(rows: Sequence[Mapping[str, Any]], directory: Path) -> str:
    """The last table of training samples, and what is drawn beside it."""
    shown = next((row for row in reversed(rows) if SAMPLES in row), None)
    if shown is None:
        return ""
    shown = from_json(shown, directory)
    titles = {
        SAMPLE_MAP: "how much they changed the loss of single queries",
        QUERY_COSINES: "how alike they changed the losses of two queries",
    }
    drawn = [
        f"<div>{_picture(shown[key])}<p>{escape(words)}</p></div>" for key, words in titles.items() if key in shown
    ]
    table = shown[SAMPLES]
    return (
        "<h2>Training samples</h2><p>Those of the last table, of "
        f"step {shown[AXIS]}, which changed the queries' loss most in it; below zero: it fell.</p>"
        f"<div class='figures'>{''.join(drawn)}</div>{_table([table.columns, *table.data])}"
    )


def _picture(path: Path) -> str:
    return f"<img alt='' src='data:image/png;base64,{b64encode(path.read_bytes()).decode()}'>"


def _html(figure: "go.Figure") -> str:
    config = {"displaylogo": False, "responsive": True}
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config=config, default_height="340px")
    return html


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list["go.Figure"]]]:
    """Sections: their heading, what they show, and their figures."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def groups(section: str) -> dict[str, str]:
        """The section's keys by group; the sum over all groups is no group."""
        return {group: key for group, key in keys_by_group(keys, section).items() if group != TOTAL}

    def measures(name: str) -> dict[str, str]:
        return {key: key for key in keys if is_measure(key) and key.endswith(name)}

    totals = {"kernel": importance_key(KERNEL, TOTAL), "weight decay": importance_key(REGULARIZATION, TOTAL)}
    return [
        (
            "Predictions",
            "Loss and accuracy.",
            _some(rows, [("loss", measures("loss")), ("accuracy", measures("accuracy"))]),
        ),
        (
            "Importance",
            "Ψ̄ of each step: the size of what the training samples did to the queries' predictions through each group "
            "of parameters (kernel), and of what weight decay did (regularization).",
            _some(
                rows,
                [("kernel, by group", groups(KERNEL)), ("weight decay, by group", groups(REGULARIZATION))],
                stacked=True,
            )
            + _some(rows, [("all groups together", {n: k for n, k in totals.items() if k in keys})]),
        ),
        (
            "Relative regularization influence",
            "D of each step: signed kernel minus signed regularization influence.",
            _some(rows, [("D, by group", groups(DIFFERENCE))]),
        ),
        (
            "Change of the loss",
            "How much each group changed the queries' loss in each step; below zero: it fell.",
            _some(
                rows,
                [
                    (f"through {words}", groups(f"{LOSS}/{section}"))
                    for section, words in ((KERNEL, "the training samples"), (REGULARIZATION, "weight decay"))
                ],
            ),
        ),
        (
            "How far to trust this",
            "The residual is what the split leaves over, relative to the change of the prediction.",
            _some(
                rows,
                [("residual", {key.removeprefix(f"{RESIDUAL}/"): key for key in keys if is_residual(key)})],
                log=True,
            )
            + _some(
                rows,
                [
                    (
                        "seconds for each step",
                        {key.removeprefix(SECONDS): key for key in keys if key.startswith(SECONDS)},
                    )
                ],
            ),
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
    facts = {**names, **head.get("packages", {})}
    if tie is not None:
        own = tie.config.get("explaind_track", {})
        facts |= {"W&B run": tie.path, **{k: v for k, v in tie.config.items() if k != "explaind_track"}}
        facts |= {f"tracked {key}": value for key, value in own.items()}
    return [["", ""], *([name, _words(value)] for name, value in facts.items())]


def _words(value: Any) -> str:
    """A setting as it would be said."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_words(one)}" for name, one in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)


def _totals(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Sums over the steps, by group; the importance of single steps adds up to more than that of the whole run."""
    columns = ["group", "Σ importance, kernel", "Σ importance, weight decay", "Σ D"]
    columns += ["loss, through samples", "loss, through weight decay"]
    table: list[list[Any]] = [columns]
    for group in dict.fromkeys(group for row in rows for group in keys_by_group(row, KERNEL)):
        keys = [importance_key(section, group) for section in (KERNEL, REGULARIZATION, DIFFERENCE)]
        keys += [change_key(section, group) for section in (KERNEL, REGULARIZATION)]
        table.append([group, *(sum(row.get(key, 0.0) for row in rows) for key in keys)])
    return table


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{_cell(one)}</th>" for one in head)
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(one)}</td>' for one in row)}</tr>" for row in body)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, Path):
        return _picture(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else escape(str(value))


def write_report(path: Path, html: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
