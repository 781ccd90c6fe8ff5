"""A run as one HTML file that needs nothing else: figures to zoom and to read off, and tables.

`page/` holds its template, style and script, and uPlot, which draws the figures. What comes from the record is escaped
by Jinja, or stands in the page as data; and the page's policy lets a browser run no script but these two.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from explaind_track.cli.common import latest_values
from explaind_track.cli.report_figures import POINTS, Rows, Section, drawing, sections_of
from explaind_track.cli.report_maps import maps_of
from explaind_track.cli.report_texts import texts_in
from explaind_track.errors import TrajectoryError
from explaind_track.record.files import write_atomic
from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    LOSS,
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
    numbers_in,
)
from explaind_track.record.layer_types import LAYER, without_cells
from explaind_track.record.media import Table, from_json
from explaind_track.record.run_directory import Tie

MOST_PICTURE_BYTES = 2**24
DEEPEST = 6
"""Settings within settings within …, as far as they are spelled out."""


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
    if not rows:
        raise ValueError(f"{title} has no rows yet: there is nothing to report")
    numbers = sorted((without_cells(numbers_in(row)) for row in rows), key=lambda row: row[AXIS])
    span = f"{len(rows)} rows, training steps {numbers[0][AXIS]} to {numbers[-1][AXIS]}."
    if len(rows) > POINTS:
        span += " Of so many, figures have the rows in which a curve is lowest or highest in its stretch of the run."
    return page_of(
        title,
        span,
        numbers,
        sections_of(numbers),
        outcome=_outcome(numbers),
        totals=spelled_table(_totals(numbers)),
        maps=maps_of(sorted(rows, key=lambda row: row[AXIS])),
        texts=texts_in(rows),
        samples=None if directory is None else _samples(rows, directory),
        facts=_facts(head, tie) if head or tie else None,
    )


def page_of(title: str, span: str, rows: Rows, sections: Sequence[Section], **parts: Any) -> str:
    """A whole page, with the sections' figures drawn from the rows. parts: what else the template has, of which all but
    `totals` may be missing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    drawings: list[dict[str, Any]] = []
    drawn_sections = []
    for section in sections:
        made = [drawing(figure, rows) for figure in section.figures]
        places = enumerate(made, len(drawings))
        figures = [{"title": one["title"], "alt": one["alt"], "number": number} for number, one in places]
        drawn_sections.append({"heading": section.heading, "description": section.description, "figures": figures})
        drawings += made

    # nothing of these comes from a record
    page = files("explaind_track.cli") / "page"
    style, library, script = (
        "".join((page / name).read_text(encoding="utf-8") for name in names)
        for names in (("uPlot.min.css", "page.css"), ("uPlot.iife.min.js",), ("page.js",))
    )

    environment = Environment(
        loader=PackageLoader("explaind_track.cli", "page"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=title,
        policy=_policy(style, library, script),
        style=style,
        library=library,
        script=script,
        span=span,
        sections=drawn_sections,
        figures=drawings,
        **{"outcome": "", "maps": None, "texts": None, "samples": None, "facts": None, **parts},
    )


def write_report(path: Path, html: str) -> None:
    """Writes the report, and makes the directory that it goes to. Raises TrajectoryError where it cannot."""
    write_atomic(path, html.encode("utf-8", "replace"))


def _policy(style: str, *scripts: str) -> str:
    """The page's Content-Security-Policy: it loads nothing, and its browser obeys no style and script but these."""
    hashes = [f"'sha256-{b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in (style, *scripts)]
    sources = f"style-src {hashes[0]}; script-src {' '.join(hashes[1:])}; img-src data:; media-src data:"
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"


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
    sections = (KERNEL, DIFFERENCE, f"{LOSS}/{KERNEL}")
    groups = dict.fromkeys(group for row in rows for section in sections for group in keys_by_group(row, section))
    for group in sorted(groups, key=lambda group: group.startswith(f"{LAYER}/")):
        keys = [importance_key(section, group) for section in (KERNEL, REGULARIZATION, DIFFERENCE)]
        keys += [change_key(section, group) for section in (KERNEL, REGULARIZATION)]
        if changed_outside:
            keys += [importance_key(OUTSIDE, group), change_key(OUTSIDE, group)]
        sums = ([row[key] for row in rows if key in row] for key in keys)
        table.append([group, *(sum(values) if values else None for values in sums)])
    return table


def _samples(rows: Rows, directory: Path) -> dict[str, Any] | None:
    """The last table of training samples, and what is drawn beside it; None where there is none."""
    tables = (row for row in reversed(rows) if isinstance(row.get(SAMPLES), Mapping) and "columns" in row[SAMPLES])
    last = next(tables, None)
    if last is None:
        return None

    captions = {
        SAMPLE_MAP: "how much they changed the loss of single queries",
        QUERY_COSINES: "how alike they changed the losses of two queries",
    }
    shown = from_json({key: value for key, value in last.items() if key in (SAMPLES, *captions)}, directory)
    table: Table = shown[SAMPLES]
    pictures = {key: shown[key] for key in captions if isinstance(shown.get(key), Path)}
    return {
        "step": last[AXIS],
        "pictures": [_medium(path, captions[key]) for key, path in pictures.items()],
        "table": spelled_table([table.columns, *table.data]),
    }


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
        facts |= {f"tracked {key}": value for key, value in tracking.items()} if isinstance(tracking, Mapping) else {}
    return [["setting", "value"], *([name, _spelled(value)] for name, value in facts.items())]


# ------------------------------------------------------------------ values in words


def _spelled(value: Any, depth: int = 0) -> str:
    """A setting in words, its members too."""
    if depth > DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_spelled(member, depth + 1)}" for name, member in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_spelled(member, depth + 1) for member in value)
    return str(value)


def spelled_table(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """A table, its first row the titles, as the page has it."""
    titles = [str(title) for title in rows[0]]
    return [titles, *([_cell(value, title) for value, title in zip(row, titles, strict=True)] for row in rows[1:])]


def _cell(value: Any, title: str) -> str | dict[str, str]:
    if isinstance(value, Path):
        return _medium(value, title)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _medium(path: Path, alt: str) -> dict[str, str]:
    if (size := path.stat().st_size) > MOST_PICTURE_BYTES:
        raise TrajectoryError(f"{path} has {size} bytes, too many for a page: it takes {MOST_PICTURE_BYTES}")
    tag, kind = ("audio", "audio/wav") if path.suffix == ".wav" else ("img", "image/png")
    return {"tag": tag, "src": f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}", "alt": alt}
