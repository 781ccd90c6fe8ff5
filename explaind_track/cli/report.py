"""A run as one HTML file that needs nothing else: figures to zoom and to read off, and tables. Needs plotly (`cli`)."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from explaind_track.cli.common import latest_values
from explaind_track.cli.report_figures import Rows, Section, draw, sections_of
from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    OUTSIDE,
    QUERY_COSINES,
    REGULARIZATION,
    SAMPLE_MAP,
    SAMPLES,
    change_key,
    importance_key,
    is_measure,
    is_residual,
    keys_by_group,
)
from explaind_track.record.media import from_json
from explaind_track.record.run_directory import Tie

POINTS = 4000
"""A longer run is drawn by every n-th of its rows."""

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
    rows: Rows,
    head: Mapping[str, Any],
    title: str,
    tie: Tie | None = None,
    directory: Path | None = None,
) -> str:
    """Makes the HTML of a run's report.

    Args:
        rows: of the panels, in their order.
        head: of the trajectory's manifest; empty for a run without a trajectory.
        title: the name of the run.
        tie: the W&B run that it belongs to.
        directory: the run's, with the pictures that rows show; None: without samples.

    Raises:
        ValueError: if there is no row.
        TrajectoryError: for a picture that is not what was written.
    """
    from plotly.offline import get_plotlyjs

    if not rows:
        raise ValueError(f"{title} has no rows yet: there is nothing to report")
    every_nth = -(-len(rows) // POINTS)
    drawn = rows[::every_nth]

    span = f"{len(rows)} rows, training steps {rows[0][AXIS]} to {rows[-1][AXIS]}."
    if len(drawn) < len(rows):
        span += f" Drawn are {len(drawn)} of {len(rows)} rows."
    body = [
        f"<h1>{escape(title)}</h1><p>{span}</p>",
        f"<p>{escape(_outcome(rows))}</p>",
        f"<h2>What the groups did, over all steps</h2>{_table(_totals(rows))}",
        *(_section(section, drawn) for section in sections_of(drawn)),
        "" if directory is None else _samples(rows, directory),
        f"<details><summary>Configuration</summary>{_table(_facts(head, tie))}</details>" if head or tie else "",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><link rel='icon' href='data:,'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{''.join(body)}<script>{FIT}</script></body></html>"
    )


def write_report(path: Path, html: str) -> None:
    """Writes the report, and makes the directory that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


# ------------------------------------------------------------------ the parts of the page


def _outcome(rows: Rows) -> str:
    """The run in a sentence: its last losses and accuracies, and its residuals."""
    last = latest_values(rows)
    values = [f"{key} {last[key]:.4g}" for key in last if is_measure(key)]
    for name in filter(is_residual, last):
        values.append(f"median of {name} {median(row[name] for row in rows if name in row):.2g}")
    return f"At the end: {', '.join(values)}." if values else ""


def _totals(rows: Rows) -> list[list[Any]]:
    """Sums over the steps, by group; the importance of single steps adds up to more than that of the whole run."""
    columns = ["group", "Σ importance, kernel", "Σ importance, weight decay", "Σ D"]
    columns += ["loss, through samples", "loss, through weight decay"]
    changed_outside = any(keys_by_group(row, OUTSIDE) for row in rows)
    if changed_outside:
        columns += ["Σ importance, changed from outside", "loss, through changes from outside"]
    table: list[list[Any]] = [columns]
    for group in dict.fromkeys(group for row in rows for group in keys_by_group(row, KERNEL)):
        keys = [importance_key(section, group) for section in (KERNEL, REGULARIZATION, DIFFERENCE)]
        keys += [change_key(section, group) for section in (KERNEL, REGULARIZATION)]
        if changed_outside:
            keys += [importance_key(OUTSIDE, group), change_key(OUTSIDE, group)]
        table.append([group, *(sum(row.get(key, 0.0) for row in rows) for key in keys)])
    return table


def _section(section: Section, rows: Rows) -> str:
    options: Any = {"full_html": False, "include_plotlyjs": False, "default_height": "340px"}
    options["config"] = {"displaylogo": False, "responsive": True}
    figures = "".join(f"<div>{draw(figure, rows).to_html(**options)}</div>" for figure in section.figures)
    text = f"<h2>{escape(section.heading)}</h2><p>{escape(section.description)}</p>"
    return f"{text}<div class='figures'>{figures}</div>"


def _samples(rows: Rows, directory: Path) -> str:
    """The last table of training samples, and what is drawn beside it; empty where there is none."""
    shown = next((row for row in reversed(rows) if SAMPLES in row), None)
    if shown is None:
        return ""

    shown = from_json(shown, directory)
    captions = {
        SAMPLE_MAP: "how much they changed the loss of single queries",
        QUERY_COSINES: "how alike they changed the losses of two queries",
    }
    pictures = [
        f"<div>{_picture(shown[key])}<p>{escape(caption)}</p></div>"
        for key, caption in captions.items()
        if key in shown
    ]
    table = shown[SAMPLES]
    return (
        "<h2>Training samples</h2><p>Those of the last table, of "
        f"step {shown[AXIS]}, which changed the queries' loss most in it; below zero: it fell.</p>"
        f"<div class='figures'>{''.join(pictures)}</div>{_table([table.columns, *table.data])}"
    )


def _facts(head: Mapping[str, Any], tie: Tie | None) -> list[list[str]]:
    """The configuration, a row for each setting: the optimizer, the packages, and what W&B was told."""
    facts: dict[str, Any] = {}
    if head:
        facts = {"optimizer": head["optimizer"], "parameter tensors": len(head["parameters"])}
        facts |= head.get("packages", {})
    if tie is not None:
        tracking = tie.config.get("explaind_track", {})
        facts |= {"W&B run": tie.path}
        facts |= {key: value for key, value in tie.config.items() if key != "explaind_track"}
        facts |= {f"tracked {key}": value for key, value in tracking.items()}
    return [["", ""], *([name, _spelled(value)] for name, value in facts.items())]


# ------------------------------------------------------------------ HTML


def _spelled(value: Any) -> str:
    """A setting in words, its members too."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_spelled(member)}" for name, member in value.items())
    return ", ".join(map(_spelled, value)) if isinstance(value, list | tuple) else str(value)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *body = rows
    titles = "".join(f"<th>{_cell(value)}</th>" for value in head)
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in body)
    return f"<table><tr>{titles}</tr>{lines}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, Path):
        return _picture(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else escape(str(value))


def _picture(path: Path) -> str:
    return f"<img alt='' src='data:image/png;base64,{b64encode(path.read_bytes()).decode()}'>"
