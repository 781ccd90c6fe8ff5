"""The commands about what rows say of runs, one or several: report and compare."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from explaind_track.cli.common import AS_JSON, local_run, report_errors, tell
from explaind_track.core.tables import inert
from explaind_track.record.history import read_rows
from explaind_track.record.layer_types import without_cells
from explaind_track.record.manifest import Manifest
from explaind_track.record.results import REQUEST, open_influence
from explaind_track.record.run_directory import POINTER, read_tie


@click.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), help="The HTML file; in the (first) RUN if not given.")
@AS_JSON
@report_errors
def report(runs: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Write RUN's report, an HTML file.

    It needs no network; its figures can be zoomed and read off. Of several runs, such as those of several seeds, curves
    are means with bands from the lowest run to the highest; of two, their differences follow. RUN may also be an
    influence of tokens, a directory of explain(out=…) or a file of Influence.save: its text is coloured.
    """
    if len(runs) == 1:
        target = write_report_of(runs[0], out)
    else:
        from explaind_track.cli.comparison import make_comparison
        from explaind_track.cli.report import write_report

        target = out or Path(runs[0]) / "comparison.html"
        write_report(target, make_comparison(rows_by_name(runs)))
    tell(as_json, {"report": str(target)}, str(target))


@click.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="RUN RUN...")
@AS_JSON
@report_errors
def compare(runs: tuple[str, ...], as_json: bool) -> None:
    """Compare runs in numbers.

    Last losses and accuracies, medians of residuals, and sums of influences by group: of each run, with their mean, and
    their standard deviation or, of two runs, their difference (the second less the first).
    """
    from explaind_track.cli.comparison import as_table, comparison_of

    if len(runs) < 2:
        raise click.UsageError("name at least two runs: explaind-track compare RUN RUN")
    comparison = comparison_of(rows_by_name(runs))
    titles, *rows = as_table(comparison)
    lines = [titles, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    tell(as_json, comparison, "\n".join(inert(line) for line in words))


def _cell(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def rows_by_name(runs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run, by its name; by its path where names are not distinct."""
    directories = [local_run(run) for run in runs]
    titles = [title_of(directory) for directory in directories]
    count = Counter(titles)
    names = [run if count[title] > 1 else title for run, title in zip(runs, titles, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(name for name in set(names) if names.count(name) > 1)} is named twice")
    rows = [[*map(without_cells, read_rows(directory))] for directory in directories]
    return dict(zip(names, rows, strict=True))


def write_report_of(run: str, out: Path | None = None) -> Path:
    """Writes the report of a run, or of an influence of tokens; returns the file."""
    from explaind_track.cli.report import make_report, write_report

    if is_result(Path(run)):
        return write_report_of_influence(Path(run), out)
    directory, target = local_run(run), out or Path(run) / "report.html"
    head = Manifest.read(directory, missing_ok=True).head
    write_report(target, make_report(read_rows(directory), head, title_of(directory), read_tie(directory), directory))
    return target


def is_result(path: Path) -> bool:
    """Whether there is an influence, and no run."""
    return path.suffix == ".safetensors" or (path / REQUEST).is_file()


def write_report_of_influence(path: Path, out: Path | None = None) -> Path:
    """Writes the report of an influence of tokens; returns the file."""
    from explaind_track.cli.report import write_report
    from explaind_track.cli.report_influence import make_influence_report

    target = out or (path / "report.html" if path.is_dir() else path.with_suffix(".html"))
    write_report(target, make_influence_report(open_influence(path), path.resolve().stem))
    return target


def title_of(directory: Path) -> str:
    """The name of a run: that of its directory, or of the one around `trajectory/`."""
    place = directory.resolve()
    return place.parent.name if directory.name == POINTER else place.name
