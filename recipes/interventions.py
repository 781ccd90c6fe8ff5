"""The influences of the main job's layers, tested by what happens without them.

    python -m recipes.interventions run=DIR [key=value …]

In some windows of steps, the kernel part or the weight decay of one layer is switched off, and the run trained again
from there. What the influences say that this does to the test loss, and what the derivative of the run says, stand
beside what it does. `out` receives summary.json, config.yaml and figures/interventions.png.
"""

import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from tqdm import tqdm

from explaind_track import Quadrature, Query, counterfactual, explain, rerun
from explaind_track.core.tables import table
from explaind_track.errors import RerunWarning
from explaind_track.what_if import SwitchedOff
from recipes.common import Run, configure, output_directory, save_figures, write_json
from recipes.modulo_addition import GROUPS, finished, sample_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS: tuple[Literal["kernel", "regularization"], ...] = ("kernel", "regularization")

COMPARED = {
    "influence, behind the window": ("influence", "behind"),
    "influence, later": ("influence", "later"),
    "derivative, later": ("derivative", "later"),
}
"""What foretells a change of the loss, and the change."""

SAME = 1e-10
"""By how much a run that is trained again may be off: what rounding in another order does to float64."""

RESAMPLES = 300
"""Of the windows, for an interval."""


def windows(config: DictConfig, steps: int) -> list[int]:
    """The first step of each window, evenly over a run of so many steps."""
    room = steps - config.length - config.later
    if room < config.windows:
        sys.exit(f"the run has {steps} steps, too few for windows={config.windows} and what follows each of them")
    return [round(room * (place + 0.5) / config.windows) for place in range(config.windows)]


def in_window(config: DictConfig, run: Run, query: Query, first: int, scratch: Path) -> list[dict[str, Any]]:
    """One window's interventions: what is foretold, and what happens."""
    last = first + config.length
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": run.data.training_batch, "progress": False}

    # the influences: the target changes by −Ψ, so that without a part it is higher by its Ψ
    asked: Any = {"groups": GROUPS, "parts": PARTS, "quadrature": Quadrature.fixed(config.nodes)}
    influence = explain(run.trajectory, run.model, query, window=(first, last), progress=False, **asked)
    foretold = influence.data["influence"].sum("step")

    # the derivative: a displacement of the parameters behind the window, carried on by training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RerunWarning)  # every 50th gradient was summed sample by sample
        same = rerun(run.trajectory, run.model, start=first, stop=last + config.later, out=scratch, **options)
    if same.proof.off > SAME:
        sys.exit(f"trained again from step {first}, the run is another one, by {same.proof.off:.1e} of its gradients")
    assert same.trajectory is not None
    adjoint = counterfactual(
        same.trajectory, run.model, query, keep=(), window=(last, last + config.later), initial=True, **options
    ).data
    slopes = dict.fromkeys(product(PARTS, GROUPS), 0.0)
    for step in run.trajectory.steps(first, last):
        for part, group in slopes:
            for name, value in step.parts[part].items():
                if name.startswith(GROUPS[group].removesuffix("*")):
                    slopes[part, group] += float(np.vdot(adjoint[f"initial:{name}"].values, value.numpy()))
    shutil.rmtree(scratch)

    # what happens without each part
    rows = []
    for (part, group), slope in slopes.items():
        change = SwitchedOff(part, GROUPS[group], window=(first, last))
        behind, later = (
            rerun(run.trajectory, run.model, start=first, stop=stop, change=change, **options).compare(query)["loss"]
            for stop in (last, last + config.later)
        )
        rows.append({
            "step": first, "part": part, "group": group, "derivative": slope,
            "influence": float(foretold.sel(part=part, group=group)),
            "behind": behind.diff("run").item(),
            "later": later.diff("run").item(),
        })  # fmt: skip
    return rows


def correlations(rows: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Of foretold and actual changes: ‖foretold − actual‖ / ‖actual‖; Pearson's and Spearman's correlation, each with
    its interval of 95% by resampling windows, for those of one window share its course."""
    found, generator = [], np.random.default_rng(seed)
    for (what, (foretold, actual)), part in product(COMPARED.items(), ("both", *PARTS)):
        frame = pd.DataFrame([row for row in rows if part in ("both", row["part"])])
        count = frame["step"].nunique()
        one, other = (frame[name].to_numpy().reshape(count, -1) for name in (foretold, actual))  # (window, change)
        row: dict[str, Any] = {"foretold by": what, "part": part, "interventions": len(frame)}
        row["error"] = float(np.linalg.norm(one - other) / np.linalg.norm(other))
        for name, correlation in (("pearson", pearson), ("spearman", spearman)):
            draws = [generator.integers(count, size=count) for _ in range(RESAMPLES)]
            again = [correlation(one[drawn].ravel(), other[drawn].ravel()) for drawn in draws]
            row[name] = correlation(one.ravel(), other.ravel())
            row[f"{name} 95%"] = np.nanquantile(again, [0.025, 0.975]).tolist()
        found.append(row)
    return found


def pearson(one: Any, other: Any) -> float:
    """The correlation of two series."""
    return float(np.corrcoef(one, other)[0, 1])


def spearman(one: Any, other: Any) -> float:
    """The correlation of their ranks."""
    return pearson(pd.Series(one).rank(), pd.Series(other).rank())


def draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Foretold against actual changes of the loss; a logarithm of either beyond a thousandth of the largest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import SymmetricalLogLocator

    frame = pd.DataFrame(rows)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for axis, (what, (foretold, actual)) in zip(figure.subplots(1, len(COMPARED)), COMPARED.items(), strict=True):
        largest = float(frame[[foretold, actual]].abs().max().max()) or 1.0
        for part, marker in zip(PARTS, ("o", "x"), strict=True):
            shown = frame[frame["part"] == part]
            axis.scatter(shown[foretold], shown[actual], marker=marker, alpha=0.6, label=f"without {part}")

        axis.axline((0, 0), (largest, largest), color="gray", linewidth=0.5)
        axis.set_xscale("symlog", linthresh=largest / 1000)
        axis.set_yscale("symlog", linthresh=largest / 1000)
        axis.xaxis.set_major_locator(SymmetricalLogLocator(base=100, linthresh=largest / 1000))
        axis.set_title(what, fontsize=10)
        axis.set_xlabel("foretold change of the test loss, nats")
        axis.set_ylabel("actual change")
        axis.grid(alpha=0.2)
    figure.axes[0].legend(fontsize=8)
    return figure


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the printed table: each interval in a few characters."""
    return {key: "{:.2f} to {:.2f}".format(*value) if isinstance(value, list) else value for key, value in row.items()}


def main(arguments: list[str]) -> None:
    config = configure("interventions", arguments)
    if config.run is None:
        sys.exit("say which run of recipes.modulo_addition: run=DIR")
    recorded, run = finished(config.run)
    if recorded.dtype != "float64":
        sys.exit("in float32, rounding alone changes the course of the run: take one with dtype=float64")
    query = Query.loss(run.data.x_test[: config.queries], run.data.y_test[: config.queries]).mean()
    starts = windows(config, len(run.trajectory))
    out = output_directory(config, "interventions")

    rows: list[dict[str, Any]] = []
    head = {"run": config.run, "steps": len(run.trajectory), "length": config.length, "later": config.later}
    for first in tqdm(starts, "interventions", unit="window"):
        rows += in_window(config, run, query, first, out / "again")
        summary = {**head, "correlations": correlations(rows, config.seed), "interventions": rows}
        write_json(out / "summary.json", summary)  # after each: a window takes minutes

    save_figures(out / "figures", {"interventions": draw(rows)})
    print(f"\nforetold and actual changes of the test loss\n{table(list(map(shown, summary['correlations'])))}")
    print(f"{out / 'summary.json'}\n{out / 'figures' / 'interventions.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
