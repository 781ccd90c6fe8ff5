"""The default main job from its command line, and everything it has to show (about a quarter of an hour).

pytest -m slow tests/benchmarks/test_main_job.py -s
"""

import json
import resource
import subprocess
import sys
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ROOT
from omegaconf import DictConfig, OmegaConf

from explaind_track import Explainer, Influence, Quadrature, Query, Trajectory, explain, resolve_groups
from recipes.modulo_addition import GROUPS, build, held_out

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The finished run: its directory, summary, configuration, wall time and peak memory."""
    out = tmp_path_factory.mktemp("job") / "run"
    started = perf_counter()
    command = [sys.executable, "-m", "recipes.modulo_addition", f"out={out}"]
    subprocess.run(command, check=True, cwd=ROOT)
    config = OmegaConf.load(out / "config.yaml")
    assert isinstance(config, DictConfig)
    return {
        "out": out,
        "summary": json.loads((out / "summary.json").read_text()),
        "config": config,
        "minutes": (perf_counter() - started) / 60,
        "gigabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
    }


def test_the_run_groks_and_live_influences_stand_for_the_model(job: dict[str, Any]) -> None:
    summary = job["summary"]
    print(json.dumps(summary, indent=1), f"\n{job['minutes']:.1f} minutes, {job['gigabytes']:.2f} GB")
    assert summary["test_accuracy"] == 1.0
    assert summary["epk_agreement"] >= 0.99
    assert summary["epk_kl"] <= 1e-3
    assert summary["trajectory_mb"] <= 1000
    assert job["gigabytes"] <= 4


def test_eight_nodes_offline_give_every_decision(job: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "recipes.epk_validation", f"run={job['out']}", "nodes=8"]
    subprocess.run(command, check=True, cwd=ROOT)
    result = json.loads((job["out"] / "epk_validation-8.json").read_text())
    print(result)
    assert result["agreement"] == 1.0
    assert result["kl"] <= 1e-5


def test_live_and_offline_agree(job: dict[str, Any]) -> None:
    model, data = build(job["config"])
    trajectory = Trajectory.open(job["out"] / "trajectory")
    window = (400, 500)
    live = Influence.load(job["out"] / "influence.safetensors").data.sel(step=slice(400, 499))
    rule = Quadrature.fixed(job["config"].nodes)
    offline = explain(
        trajectory, model, held_out(job["config"], data), groups=GROUPS, window=window, quadrature=rule
    ).data
    worst = max(
        float(abs(offline[name] - live[name]).max() / abs(live[name]).max()) for name in ("influence", "importance")
    )
    print(f"live against offline: {worst:.1e}")
    assert worst <= 1e-6


def test_live_importance_against_sixty_four_nodes(job: dict[str, Any]) -> None:
    """On 60 steps from step 10 on, evenly spread over the run."""
    model, data = build(job["config"])
    query: Query = held_out(job["config"], data)
    trajectory = Trajectory.open(job["out"] / "trajectory")
    groups = resolve_groups(GROUPS, dict(model.named_parameters()))
    fine = Explainer(model, query, groups, [("step", "group")], quadrature=Quadrature.fixed(64))
    numbers = {int(number) for number in np.linspace(10, len(trajectory) - 1, 60)}
    for step in trajectory.steps():
        if step.number in numbers:
            fine.add(step)
    exact = fine.results()[0].importance()
    live = Influence.load(job["out"] / "influence.safetensors").importance().sel(step=exact["step"])
    error = torch.from_numpy((abs(live - exact) / exact).values).flatten()
    print(f"importance: median error {float(error.median()):.2%}, 95% below {float(error.quantile(0.95)):.2%}")
    assert float(error.median()) < 0.005
    assert float(error.quantile(0.95)) < 0.03
