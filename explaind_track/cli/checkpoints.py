"""The command that explains a run which nobody watched, from the checkpoints that it has left."""

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from explaind_track.checkpoints.series import CheckpointSeries
from explaind_track.cli.common import AS_JSON, report_errors, tell
from explaind_track.core.checks import require_names

if TYPE_CHECKING:
    from explaind_track.analysis.checkpoint_study import Study

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

OPTIONS = (
    click.option("--train", type=FILE, required=True, help="Rows like those that the model was trained on."),
    click.option("--unseen", type=FILE, required=True, help="Rows that were held out: their loss is explained."),
    click.option(
        "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The directory of the results."
    ),
    click.option("--mixture", help="Shares of the sources, as en:.4,de:.2; without it, as rows come."),
    click.option("--batch", type=click.IntRange(1), default=512, show_default=True, help="Training sequences."),
    click.option("--queries", type=click.IntRange(1), help="Unseen sequences; all of them if not given."),
    click.option("--microbatch", type=click.IntRange(1), default=8, show_default=True, help="Sequences at a time."),
    click.option("--length", type=click.IntRange(2), help="Tokens in a sequence; if not given, what the model takes."),
    click.option(
        "--layout", type=click.Choice(["pack", "pad"]), default="pack", show_default=True,
        help="Rows one behind the other, cut into sequences; or a sequence for each row.",
    ),
    click.option("--model", help="A folder or name at the hub with config.json and tokenizer."),
    click.option("--groups", default="type,layer", show_default=True, help="Some of type, layer and tensor."),
    click.option("--clip", type=click.FloatRange(0, min_open=True), help="The norm that training clips gradients to."),
    click.option("--setting", "settings", multiple=True, help="Of the optimizer, if the series has not: lr=3e-4."),
    click.option("--extrapolate", is_flag=True, help="Count what the batch does up to the next checkpoint (F.3)."),
    click.option("--by-source", is_flag=True, help="Split what the batch does by source, by its gradient once more."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the sequences that are drawn."),
    click.option("--device", default="cpu", show_default=True, help="Where the model lies, such as cuda."),
    click.option("--project", help="The W&B project of a run that rows and result are sent to."),
)  # fmt: skip


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with all of `OPTIONS`, in their order."""
    return reduce(lambda decorated, option: option(decorated), reversed(OPTIONS), command)


@click.command()
@click.argument("source", metavar="DIR|hf:NAME")
@with_options
@AS_JSON
@report_errors
def checkpoints(
    source: str, train: Path, unseen: Path, out: Path, mixture: str | None, batch: int, queries: int | None,
    length: int | None, layout: str, model: str | None, groups: str, seed: int, device: str, project: str | None,
    as_json: bool, settings: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Explain a run of a language model from its checkpoints.

    From each checkpoint, its optimizer takes one step on a batch of the training mixture. What the step does to the
    loss of the unseen rows is split exactly, by parameter type and by layer, into what the batch, the first moment and
    weight decay do. A row is {"text": "…"} or {"input_ids": [5, 8, …]}, with a "source" for the mixture.

    --out receives influence.safetensors, summary.json, history.jsonl and figures/, and `report` makes a page of it. The
    same command goes on where it was stopped. Checkpoints are never written to.
    """
    from explaind_track.analysis.checkpoint_study import run_study
    from explaind_track.checkpoints.language_model import LanguageModel
    from explaind_track.checkpoints.sequences import parse_mixture

    names = require_names("--groups", groups.split(","), "grouping")
    shares = None if mixture is None else parse_mixture(mixture)
    if options["clip"] is None:
        click.echo("gradients are taken as they are; if training clipped them, say to which norm by --clip", err=True)
    series = CheckpointSeries.open(source, settings=optimizer_settings(settings))
    language = LanguageModel.of(series[-1].path, model, device)

    found = run_study(
        series,
        language,
        train=language.read(train, batch, shares, length, layout, seed),
        unseen=language.read(unseen, queries, shares, length, layout, seed),
        out=out,
        groups=names,
        progress=not as_json,
        **options,
    )
    url = None if project is None else send(project, out, series, found)
    words = f"{found.table()}\n\n{out} holds influence.safetensors, summary.json, history.jsonl and figures/"
    tell(as_json, {"out": str(out), "rows": found.rows, "wandb": url}, "\n".join(filter(None, [words, url])))


def optimizer_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """The optimizer's settings, from `name=value` with values as in YAML.

    Raises:
        ValueError: It is written otherwise, or a value is no number, list of numbers or truth value.
    """
    from omegaconf import OmegaConf

    given: dict[str, Any] = OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs)))  # type: ignore[assignment]
    for name, value in given.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"--setting is written lr=3e-4 or betas=[0.9,0.95], not {name}={value!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def send(project: str, out: Path, series: CheckpointSeries, found: "Study") -> str:
    """Sends a study to a W&B run: a row for each checkpoint, and the influences, which descend from the checkpoints.

    Returns where to look at it.
    """
    from explaind_track.analysis.checkpoint_study import INFLUENCE
    from explaind_track.wandb_io.artifacts import log_references, log_result
    from explaind_track.wandb_io.panels import Panels
    from explaind_track.wandb_io.run import open_run, tie, where_to_look

    run = open_run(project, out)
    try:
        tie(out, run)
        panels = Panels(run, None)
        for row in found.panel_rows():
            panels.log(row)
        panels.close()

        uses = log_references(run, "checkpoints", {f"step-{one.step}": one.path for one in series})
        log_result(run, out / INFLUENCE, "influence", uses=uses)
        return where_to_look(run)
    finally:
        run.finish()
