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
from torch import nn

from explaind_track import Quadrature, Query, Trajectory, explain
from recipes import images, modulo_addition
from recipes.common import configure, output_directory, table, write_json

PARTS = ("kernel", "regularization")
"""Those of Theorem 3.1; what float rounding did is left to the residual."""

PAPER = {
    "resnet9": {10: (0.997, 0.0), 100: (1.0, 0.0)},
    "transformer": {10: (0.748, 0.885), 100: (1.0, 0.0)},
    "cnn": {10: (0.998, 0.0), 100: (1.0, 0.0)},
}
"""The paper's EPK accuracy and KL divergence, by model and integration steps."""


def subject(config: DictConfig, out: Path) -> tuple[str, nn.Module, Trajectory, Query]:
    """The name of the model, the model, the record of its training, and the queries to predict."""
    if config.run is None:
        run = images.obtain(config, images.load(config), config.seed, out / "trajectory")
        x, y = run.data.x_test[: config.queries], run.data.y_test[: config.queries]
        return config.model, run.model, run.trajectory, Query.outputs(x, y)
    recorded, model, data, trajectory = modulo_addition.finished(config.run)
    return "transformer", model, trajectory, modulo_addition.held_out(recorded, data)


def rules(config: DictConfig) -> Iterator[tuple[int | None, Quadrature]]:
    """The ways to integrate: fixed numbers of nodes, and (None) refinement until the tolerance is met."""
    for nodes in config.nodes if OmegaConf.is_list(config.nodes) else [config.nodes]:
        yield nodes, Quadrature.fixed(nodes)
    if config.tolerance is not None:
        yield None, Quadrature(config.tolerance, max_nodes=config.max_nodes)


def main(arguments: list[str]) -> None:
    config = configure("epk_validation", arguments)
    out = output_directory(config.out, "epk_validation")
    OmegaConf.save(config, out / "config.yaml")
    name, model, trajectory, query = subject(config, out)
    head = {"model": name, "steps": len(trajectory), "queries": len(query)}
    rows: list[dict[str, Any]] = []
    for nodes, rule in rules(config):
        started = perf_counter()
        influence = explain(trajectory, model, query, keep=("query", "output"), parts=PARTS, quadrature=rule)
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
        write_json(out / "summary.json", {**head, "rows": rows})
    print(f"\n{name}, {len(trajectory)} steps, {len(query)} queries\n{table(rows)}\n{out / 'summary.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
