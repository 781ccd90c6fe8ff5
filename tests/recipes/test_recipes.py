"""The recipes from their command lines, shortened."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from jobs import MainJob
from safetensors import safe_open

from explaind_track import Influence, Trajectory
from recipes import epk_validation
from recipes.data import modulo_addition
from recipes.models import ModuloTransformer


@pytest.fixture
def run(main_job: MainJob) -> Path:
    return main_job.out


def test_the_main_job_leaves_what_it_says(main_job: MainJob) -> None:
    run = main_job.out
    assert "loss=" in main_job.stderr
    assert "residual=" in main_job.stderr
    assert "wandb leet" in main_job.stdout
    assert "wandb sync" in main_job.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert all(isinstance(value, int | float) for value in summary.values())
    assert {"train_accuracy", "epk_agreement", "epk_kl", "residual_max", "artifact_staging_mb"} <= summary.keys()
    assert (run / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "wandb").is_dir()
    assert len(Trajectory.open(run / "trajectory")) == 12
    assert Influence.load(run / "influence.safetensors").data.sizes == {"part": 2, "step": 12, "group": 6}


def test_per_sample_gradients_are_used_where_samples_are_shown(run: Path) -> None:
    """Only those have norms, and the table shows one for each of its samples."""
    tables = sorted((run / "wandb").rglob("most_influential*.table.json"))
    assert len(tables) == 3  # steps 0, 5 and 10
    for table in tables:
        content = json.loads(table.read_text())
        norms = [row[content["columns"].index("gradient norm")] for row in content["data"]]
        assert len(norms) == 20
        assert min(norms) > 0


def test_a_recorded_run_is_checked_offline(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epk_validation.main([f"run={run}", "nodes=4", "tolerance=null", f"out={tmp_path / 'out'}"])
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert row["agreement"] == 1.0
    assert row["kl"] < 1e-3
    assert "paper's KL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("modulo_addition", ["stepz=3"], "Key 'stepz'"),
        ("modulo_addition", ["out={run}"], "holds a run already"),
        ("modulo_addition", ["preset=tiny"], "no preset 'tiny', only float32, paper, scripts, smoke"),
        ("epk_validation", ["run={empty}", "out={empty}/out"], "holds no run"),
        ("epk_validation", ["data.path=/nowhere", "out={empty}/out"], "data.name=digits, which needs neither"),
        ("pipeline_transplant", [], "say which run"),
        ("interventions", [], "say which run"),
        ("data_attribution", ["settings=[papers]"], "no setting 'papers'"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_sentence(
    name: str, arguments: list[str], message: str, run: Path, tmp_path: Path
) -> None:
    given = [argument.format(run=run, empty=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        importlib.import_module(f"recipes.{name}").main(given)


def test_the_transformer_is_the_papers() -> None:
    model = ModuloTransformer()
    assert sum(parameter.numel() for parameter in model.parameters()) == 89_024
    tokens = torch.tensor([[5, 113, 3, 114], [3, 113, 5, 114]])
    output = model(tokens)
    assert torch.allclose(output.exp().sum(-1), torch.ones(2))
    assert torch.allclose(output[0], output[1], atol=1e-5)  # no positions: a + b is b + a


def test_modulo_addition_has_every_pair_once() -> None:
    data = modulo_addition(113, 4000, 2328, seed=0)
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert len(x) == 113 * 112 // 2 == len(torch.unique(x, dim=0))
    assert bool((x[:, 0] > x[:, 2]).all())
    assert torch.equal(y, (x[:, 0] + x[:, 2]) % 113)
    with pytest.raises(ValueError, match="6328 pairs"):
        modulo_addition(113, 4000, 2329, seed=0)


def test_files_on_disk_hold_no_pickle(run: Path) -> None:
    kinds = {path.suffix for path in (run / "trajectory").rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors"}
    for path in (run / "trajectory").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) > 0
