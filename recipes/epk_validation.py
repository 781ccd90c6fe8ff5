"""Table 1: the prediction of the path kernel against that of the model which it stands for.

    python -m recipes.epk_validation [preset=cifar2] [run=DIR] [key=value …]

`out` receives summary.json, config.yaml, and the trajectory of the run that was trained for it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from omegaconf import DictConfig, OmegaConf

from explaind_track import Quadrature, Query, Task, Trajectory, explain
from explaind_track.core.tables import table
from recipes import images, modulo_addition
from recipes.common import configure, output_directory, write_json

PARTS = ("kernel", "regularization")
"""Those of Theorem 3.1; the rounding of float arithmetic is left to the residual."""

PAPER = {
    "resnet9": {10: (0.997, 0.0), 100: (1.0, 0.0)},
    "transformer": {10: (0.748, 0.885), 100: (1.0, 0.0)},
    "cnn": {10: (0.998, 0.0), 100: (1.0, 0.0)},
}
"""The paper's EPK accuracy and KL divergence, by model and integration steps."""


def subject(config: DictConfig, out: Path) -> tuple[str, Task, Trajectory]:
    """The name of the model, the job (model and queries), and the record of its training."""
    if config.run is None:
        run = images.obtain(config, images.load(config), config.seed, out / "trajectory")
        x, y = run.data.x_test[: config.queries], run.data.y_test[: config.queries]
        return config.model, Task(run.model, Query.outputs(x, y)), run.trajectory

    recorded, run = modulo_addition.finished(config.run)
    return "transformer", Task(run.model, modulo_addition.held_out(recorded, run.data)), run.trajectory


def rules(config: DictConfig) -> Iterator[tuple[int | None, Quadrature]]:
    """The ways to integrate: fixed numbers of nodes, and (None) refinement until the tolerance is met."""
    for nodes in config.nodes if OmegaConf.is_list(config.nodes) else [config.nodes]:
        yield nodes, Quadrature.fixed(nodes)
    if config.tolerance is not None:
        yield None, Quadrature(config.tolerance, max_nodes=config.max_nodes)


def main(arguments: list[str]) -> None:
    config = configure("epk_validation", arguments)
    out = output_directory(config, "epk_validation")
    name, job, trajectory = subject(config, out)
    head = {"model": name, "steps": len(trajectory), "queries": len(job.query)}

    rows: list[dict[str, Any]] = []
    for nodes, rule in rules(config):
        started = perf_counter()
        influence = explain(trajectory, job.model, job.query, keep=("query", "output"), parts=PARTS, quadrature=rule)
        accuracy, divergence = PAPER[name].get(nodes or 0, (None, None))
        rows.append(
            {
                "nodes": nodes or f"≤{rule.max_nodes}",
                **influence.faithfulness(),
                "residual": float(influence.residual),
                "seconds": round(perf_counter() - started, 1),
                "paper's accuracy": accuracy,
                "paper's KL": divergence,
            }
        )
        write_json(out / "summary.json", {**head, "rows": rows})  # after each: the last ones take long

    print(f"\n{name}, {len(trajectory)} steps, {len(job.query)} queries\n{table(rows)}\n{out / 'summary.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
