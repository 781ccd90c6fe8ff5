"""What Weights & Biases shows: the rows of metrics, their axis, and the tables of training samples."""

import json
import math
import os
import queue
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from explaind_track.core import distributed
from explaind_track.engine.samples import SampleInfluence
from explaind_track.errors import LoggingWarning
from explaind_track.record.media import Table, figure_png, for_wandb, image_png, to_json, with_files

if TYPE_CHECKING:
    import wandb  # a second to import: only where a run is opened or a table sent

AXIS = "train/step"
"""The metric that all panels are drawn over: the number of the training step."""

SHORT = {"regularization": "reg"}
"""What parts are called in panels, where that is not their name."""

FINISH_SECONDS = 600.0
"""How long the end of a run waits for what W&B has not confirmed yet."""

ALERT_SECONDS = 3600

RESIDUAL_LIMIT = 0.5
"""Above it a step's split says little: half of the change is not in it. Where the quadrature has a tolerance, that
counts instead."""

SUMMARIES = {
    "residual": "mean,max",
    "cost": "mean",
    "train": "last,min,max",
    **dict.fromkeys(("kernel", "reg", "past", "D"), "mean,last"),
    "loss": "last",
}
"""What W&B's table of runs shows of the metrics of a section; the last value, of those that are not named."""

SAMPLES = "samples/most_influential"
SAMPLE_MAP = "samples/map"
QUERY_COSINES = "samples/query_cosines"
SAMPLE_ROWS = 20


def open_run(project: str, directory: str | os.PathLike[str] | None = None, **options: Any) -> "wandb.Run":
    """The active run if there is one, else a new one: online where somebody is logged in and the server answers, else
    offline. Of several processes, only rank zero has one; the others get a run that does nothing. options: as
    `wandb.init` takes them."""
    import wandb

    if wandb.run is not None:
        return wandb.run
    if distributed.rank():
        return wandb.init(mode="disabled")
    where = None if directory is None else str(directory)
    if "WANDB_MODE" not in os.environ and "mode" not in options and not wandb.login(prompt=False, verify=False):
        options["mode"] = "offline"
    options.setdefault("settings", wandb.Settings(finish_timeout=FINISH_SECONDS))
    try:
        return wandb.init(project=project, dir=where, **options)
    except wandb.errors.CommError as error:
        warnings.warn(f"W&B's server does not answer ({error}); logging offline", LoggingWarning, stacklevel=2)
        return wandb.init(project=project, dir=where, **{**options, "mode": "offline"})


def where_to_look(run: "wandb.Run") -> str:
    """Where the run can be seen, in a sentence."""
    if not run.settings._offline:
        return f"See the run at {run.url}"
    directory = Path(run.settings.sync_dir)
    return f"Look at the run with `wandb leet {directory}`, upload it with `wandb sync {directory}`"


def importance_row(
    prefix: str, parts: Sequence[str], groups: Sequence[str], row: Mapping[str, Tensor]
) -> dict[str, float]:
    """Ψ̄ and Ψ̄^reg of every group and of all together, and D; row: of an accumulator that keeps step and group."""
    metrics: dict[str, float] = {}
    for part, values, total in zip(parts, row["importance"].tolist(), row["total_importance"].tolist(), strict=True):
        metrics |= {
            f"{prefix}{SHORT.get(part, part)}/{group}": value for group, value in zip(groups, values, strict=True)
        }
        metrics[f"{prefix}{SHORT.get(part, part)}/total"] = total
    kernel, decay = (row["influence"][parts.index(part)] for part in ("kernel", "regularization"))
    difference = kernel - decay
    metrics |= {f"{prefix}D/{group}": value for group, value in zip(groups, difference.tolist(), strict=True)}
    metrics[f"{prefix}D/total"] = float(difference.sum())
    return metrics


def change_row(
    prefix: str, parts: Sequence[str], groups: Sequence[str], row: Mapping[str, Tensor], scale: float
) -> dict[str, float]:
    """−Ψ of every group and part: how much each changed the loss in this step, times `scale`."""
    metrics: dict[str, float] = {}
    for part, values in zip(parts, (row["influence"] * -scale).tolist(), strict=True):
        if part != "momentum":
            metrics |= {f"{prefix}/{SHORT.get(part, part)}/{g}": value for g, value in zip(groups, values, strict=True)}
        metrics[f"{prefix}/{SHORT.get(part, part)}/total"] = sum(values)
    metrics[f"{prefix}/change"] = float(row["change"]) * scale
    return metrics


def most_influential(samples: SampleInfluence) -> Tensor:
    """The places of the samples with the largest influences, the largest first."""
    return samples.influence.abs().argsort(descending=True)[:SAMPLE_ROWS]


def sample_table(
    samples: SampleInfluence, norms: Mapping[int, float], render: Callable[[int], Any] | None = None
) -> Table:
    """The training samples that changed the query's loss most through this step's own gradient. render: from a sample's
    index to its image."""
    order = most_influential(samples)
    columns = ["sample", "change of the query's loss", "weight", "loss", "gradient norm"]
    rows: list[list[Any]] = [
        [
            int(samples.index[place]),
            -float(samples.influence[place]),
            float(samples.weight[place]),
            float(samples.loss[place]),
            norms.get(int(samples.index[place])),
        ]
        for place in order.tolist()
    ]
    if render is not None:
        columns.append("image")
        rows = [[*row, image_png(render(row[0]))] for row in rows]
    return Table(columns, rows)


def sample_map(rows: Tensor, index: Tensor) -> bytes:
    """How much the step's most influential samples changed the loss of single queries: rows (queries, samples), as a
    PNG."""
    from explaind_track.analysis import plots

    return figure_png(plots.sample_map(rows.numpy(), index.tolist()))


def cosine_map(rows: Tensor) -> bytes:
    """How alike the step's samples changed the losses of two queries: the cosines of rows (queries, samples), as a
    PNG."""
    from explaind_track.analysis import plots

    unit = torch.nn.functional.normalize(rows, dim=1)
    return figure_png(plots.cosine_map((unit @ unit.T).numpy()))


def define_metrics(run: "wandb.Run", sections: Iterable[str]) -> None:
    """Draws the metrics `<section>/…` over the training step."""
    run.define_metric(AXIS, hidden=True)
    for section in sections:
        run.define_metric(f"{section}/*", step_metric=AXIS, summary=SUMMARIES.get(section, "last"))


class Sender:
    """Makes calls one after the other in a thread of its own, since some of W&B's SDK wait for the server: `run.log` of
    a table asks it about the table's artifact, again and again for 19 s where there is no answer."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="panels", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        self._calls.put(call)

    def close(self, seconds: float) -> None:
        """Waits until all calls are made, or gives up those that are left."""
        self._calls.put(None)
        self._thread.join(seconds)
        self._given_up.set()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._given_up.is_set():
            call()


class Panels:
    """Sends rows to a W&B run and to a file of our own. Whatever fails there is told of once and stops nothing."""

    def __init__(
        self,
        run: "wandb.Run | None",
        history: Path | None,
        sections: Sequence[str],
        config: Mapping[str, Any] | None = None,
        logged: Collection[int] = (),
    ) -> None:
        """history: a JSON-lines file, flushed with every row; a killed process leaves it whole but for its last line.
        sections: the first parts of the keys that are drawn over our axis.
        config: what the run's configuration says of the tracking, as `explaind_track`.
        logged: steps that the W&B run has rows of already: taken again after a resume, they only go to the history."""
        self._run, self._history, self._logged = run, history, logged
        self._told: set[str] = set()
        self._asked = self._taken = 0
        if run is not None:
            self._sender = Sender()
            self.attempt("define the panels' axis", lambda: define_metrics(run, sections))
            if config is not None:
                about = {"explaind_track": dict(config)}
                self.attempt("tell W&B the configuration", lambda: run.config.update(about, allow_val_change=True))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends one row. Numbers that are not finite are left out, and `residual/nonfinite` counts them."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        clean = {name: value for name, value in row.items() if name not in bad}
        if bad:
            clean["residual/nonfinite"] = len(bad)
        if self._history is not None:
            self.attempt("write the history", lambda: self._write(clean))
        if clean.get("residual/nonfinite"):
            named = f": {', '.join(bad[:10])}" if bad else " among the gradients"
            self.alert("Numbers that are not finite", f"step {row.get(AXIS)} has some{named}")
        if self._run is not None and row.get(AXIS) not in self._logged:
            self._asked += 1
            self._sender.put(lambda: self._send(clean))

    def alert(self, title: str, text: str) -> None:
        """Sends an alert, at most one of a kind in `ALERT_SECONDS`."""
        if self._run is not None:
            run, every = self._run, ALERT_SECONDS
            self._sender.put(
                lambda: self.attempt("send an alert", lambda: run.alert(title, text, level="WARN", wait_duration=every))
            )

    def close(self) -> int:
        """Waits until W&B's SDK has all rows, at most `FINISH_SECONDS`; returns how many it has not taken."""
        if self._run is not None:
            self._sender.close(FINISH_SECONDS)
        return self._asked - self._taken

    def _send(self, row: Mapping[str, Any]) -> None:
        assert self._run is not None  # asked for only where there is one
        run = self._run
        self._taken += self.attempt("log to W&B", lambda: run.log(for_wandb(row)))

    def _write(self, row: dict[str, Any]) -> None:
        """Writes the row, whose pictures are in files from then on."""
        assert self._history is not None  # asked for only where there is one
        row |= with_files(row, self._history.parent)
        kept = {name: value for name, value in row.items() if isinstance(value, int | float | str | Table | Path)}
        line = json.dumps(kept, default=to_json).encode() + b"\n"
        with self._history.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                file.truncate(end)  # half a row would spoil the next
                raise OSError(f"no room for a row in {self._history}")

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Whether it went well."""
        try:
            action()
            return True
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                warnings.warn(f"could not {what}: {error!r}; training goes on", LoggingWarning, stacklevel=4)
            return False


def nonfinite(gradients: Mapping[str, Tensor]) -> list[str]:
    """The names of the gradients that hold a number that is not finite."""
    return [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
