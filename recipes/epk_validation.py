"""Checks a recorded run off line: the path-kernel prediction against the trained model's (Table 1).

    python -m recipes.epk_validation run=DIR nodes=8

Prints the table and writes DIR/epk_validation-<nodes>.json.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from explaind_track import Quadrature, Trajectory, explain
from recipes.common import configure, write_json
from recipes.modulo_addition import build, held_out


def main(arguments: list[str]) -> None:
    config = configure("epk_validation", arguments)
    if OmegaConf.is_missing(config, "run"):
        sys.exit("say which run to check: python -m recipes.epk_validation run=DIR nodes=8")
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        sys.exit(f"run={run} holds no run: there is no config.yaml in it")
    recorded = OmegaConf.load(run / "config.yaml")
    assert isinstance(recorded, DictConfig)  # a mapping at the top
    model, data = build(recorded)
    trajectory = Trajectory.open(run / "trajectory")
    influence = explain(
        trajectory,
        model,
        held_out(recorded, data),
        keep=("query", "output"),
        quadrature=Quadrature.fixed(config.nodes),
    )
    result = {
        "nodes": config.nodes,
        "steps": len(trajectory),
        "queries": recorded.queries,
        **influence.faithfulness(),
        "residual": float(influence.residual),
    }
    target = run / f"epk_validation-{config.nodes}.json"
    write_json(target, result)
    print(f"\n{'nodes':>6} {'EPK acc.':>9} {'KL':>9} {'residual':>9}")
    print(f"{config.nodes:6} {result['agreement']:9.4f} {result['kl']:9.1e} {result['residual']:9.1e}\n{target}")


if __name__ == "__main__":
    main(sys.argv[1:])
