"""The case study on a run's checkpoints: which parts of a language model learned when, in files that can be looked at.

In its directory are

influence.safetensors   the influences, by checkpoint, part and tensor of the model
summary.json            a row for each checkpoint
history.jsonl           the same as rows of the panels, with the keys of live ones
steps/                  what is known of each checkpoint, for the same call to go on with
figures/                Fig. 6, 14 and 15 of the paper, and the losses
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from torch import nn

from explaind_track.analysis.checkpoint_plots import TITLES, draw_losses, draw_part, draw_sources
from explaind_track.analysis.checkpoint_rows import Changes, checkpoint_rows, panel_row
from explaind_track.checkpoints.check import SeriesCheck
from explaind_track.checkpoints.explain_checkpoints import explain_checkpoints
from explaind_track.checkpoints.language_model import LanguageModel
from explaind_track.checkpoints.sequences import Sequences
from explaind_track.checkpoints.series import CheckpointSeries
from explaind_track.core.influence import Influence
from explaind_track.core.tables import table
from explaind_track.errors import CheckpointError
from explaind_track.record.files import write_atomic
from explaind_track.record.history import append_row, cut_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INFLUENCE = "influence.safetensors"
SUMMARY = "summary.json"
STEPS = "steps"
TENSOR = "tensor"
"""The finest grouping, which every other follows from: what is kept."""

FIGURES = {"kernel": "batch", "past": "first_moment", "regularization": "regularization"}
"""The name of each part's figure."""


@dataclass(frozen=True)
class Study:
    """What was found."""

    influences: Mapping[str, Influence]
    """By grouping, `tensor` among them."""
    rows: list[dict[str, Any]]
    """Of summary.json: one for each checkpoint."""
    changes: Changes
    """Of the unseen loss, −Ψ, by the groupings that were asked for."""

    sources: xr.DataArray | None
    """What the batch's sequences of each source did to it, (source, step, group), by the first grouping."""

    @classmethod
    def of(cls, influences: Mapping[str, Influence], groups: Sequence[str], check: SeriesCheck) -> "Study":
        """The study of these influences. check: of the series."""
        changes = {name: -influences[name].data["influence"] for name in groups}
        first = influences[groups[0]].data
        sources = -first["by_source"].transpose("source", "step", "group") if "by_source" in first else None
        return cls(influences, checkpoint_rows(influences[TENSOR].data, check), changes, sources)

    def panel_rows(self) -> list[dict[str, Any]]:
        """The rows of the panels."""
        return [panel_row(row, self.changes) for row in self.rows]

    def table(self) -> str:
        """What is printed: a row for each checkpoint, with what each part of its step did to the unseen loss."""
        totals = next(iter(self.changes.values())).sum("group")
        shown = ("step", "loss_before", "change", "residual", "nodes", "seconds")
        return table(
            [
                {key: row[key] for key in shown}
                | {TITLES[str(part)]: float(totals.sel(part=part, step=row["step"])) for part in totals["part"].values}
                for row in self.rows
            ]
        )

    def write(self, out: Path) -> None:
        """Writes the files of a study."""
        self.influences[TENSOR].save(out / INFLUENCE)
        write_atomic(out / SUMMARY, (json.dumps(self.rows, indent=1) + "\n").encode())
        cut_history(out, 0)
        for row in self.panel_rows():
            append_row(out, row)

        (out / "figures").mkdir(exist_ok=True)
        for name, figure in study_figures(self.rows, self.changes, self.sources).items():
            figure.savefig(out / "figures" / f"{name}.png", dpi=130)


def run_study(
    series: CheckpointSeries,
    language: LanguageModel,
    train: Sequences,
    unseen: Sequences,
    out: Path,
    groups: Sequence[str],
    microbatch: int,
    clip: float | None,
    extrapolate: bool = False,
    by_source: bool = False,
    progress: bool = True,
) -> Study:
    """Explains what a step on `train` from each checkpoint does to the loss of `unseen`, and writes a study's files.

    Checks the series first, and with `progress` prints what that tells and an estimate. Goes on where it was stopped.
    Checkpoints with weights alone take AdamW's first step with the settings that the series was opened with.

    Raises:
        CheckpointError: The series cannot be explained.
    """
    loss = language.loss(train)
    check = series.check(language.model, language.batch(train.take(range(min(microbatch, len(train))))), loss)
    check.require()
    _require_rates(check, series)
    if progress:
        print(check, estimate(check, len(train), len(unseen), microbatch), sep="\n")

    influences = explain_checkpoints(
        series,
        language.model,
        train=language.batch(train),
        loss=loss,
        query=language.query(unseen),
        groups={name: name for name in (*groups, TENSOR)},
        microbatch=microbatch,
        clip=clip,
        extrapolate=extrapolate,
        sources=train.sources if by_source else None,
        optimizer=partial(_first_adamw, series[0].settings),
        out=out / STEPS,
        progress=progress,
    )
    study = Study.of(influences, groups, check)
    study.write(out)
    return study


def _require_rates(check: SeriesCheck, series: CheckpointSeries) -> None:
    """Raises CheckpointError where there are weights alone, and nothing tells of the step that training took."""
    alone = [found.step for found in check.findings if found.optimizer is None]
    missing = [name for name in ("lr", "weight_decay") if name not in series[0].settings]
    if alone and missing:
        raise CheckpointError(
            f"{len(alone)} checkpoints hold weights alone, from step {alone[0]} on, so that what the batch does can be "
            f"estimated only, and not without training's {' and '.join(missing)}: say "
            f"{' '.join(f'--setting {name}=…' for name in missing)}"
        )


def _first_adamw(settings: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that has not taken a step."""
    return torch.optim.AdamW(model.parameters(), **settings)


def estimate(check: SeriesCheck, train: int, unseen: int, microbatch: int) -> str:
    """How long it will take, from the time of a micro-batch's gradient; with one and two nodes, which mostly do."""
    passes = -(-train // microbatch) + (1 + 2) * -(-unseen // microbatch)
    seconds = len(check.findings) * passes * (check.seconds or 0.0)
    told = f"{seconds / 60:.0f} min" if seconds > 120 else f"{seconds:.0f} s"
    return f"{len(check.findings)} checkpoints, {train} sequences a step, {unseen} unseen: about {told} if two nodes do"


def study_figures(
    rows: Sequence[Mapping[str, Any]], changes: Changes, sources: xr.DataArray | None = None
) -> dict[str, "Figure"]:
    """The figures of a study by their names.

    rows: with `step`, `loss_before`, `change` and `residual`. changes: with an axis `seed`, if there are several.
    sources: of a `Study`.
    """
    first = next(iter(changes.values()))
    note = " (an estimate, from weights alone)" if any(row.get("estimated") for row in rows) else ""
    there = {name: part for part, name in FIGURES.items() if part in first["part"].values}
    parts = {name: draw_part(changes, part, note=note) for name, part in there.items()}
    of_sources = {} if sources is None else {"sources": draw_sources(sources)}
    return {"losses": draw_losses(rows, first), **parts, **of_sources}
