"""The paper's experiments at their smallest setting, and the parts of them that can be right or wrong by themselves."""

import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import MainJob
from omegaconf import DictConfig, OmegaConf
from servers import Server
from torch import nn

from explaind_track import Trajectory
from recipes import data_attribution, grokking_seeds, images, step_subsampling
from recipes.common import configure
from recipes.data import image_data
from recipes.models import CNN, ResNet9
from recipes.pipeline_transplant import systematic, transplant

Smoke = Callable[..., dict[str, Any]]


@pytest.fixture
def smoke(tmp_path: Path) -> Smoke:
    """Runs a recipe with `preset=smoke` and returns its summary; its figures are checked to be there."""

    def run(name: str, *arguments: str, figures: tuple[str, ...] = ()) -> dict[str, Any]:
        out = Path(tempfile.mkdtemp(prefix=name, dir=tmp_path))
        importlib.import_module(f"recipes.{name}").main(["preset=smoke", f"out={out}", *arguments])
        found = {path.stem for path in (out / "figures").glob("*.png")}
        assert found == set(figures)
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        assert OmegaConf.load(out / "config.yaml")["out"] == str(out)
        return summary

    return run


@pytest.fixture
def grokking(main_job: MainJob) -> Path:
    """A run of the main job, too short to learn anything."""
    return main_job.out


def test_the_path_kernel_stands_for_the_cnn(smoke: Smoke, capsys: pytest.CaptureFixture[str]) -> None:
    summary = smoke("epk_validation")
    one, four, refined = summary["rows"]
    assert four["residual"] < one["residual"]
    assert refined["residual"] < four["residual"]
    assert refined["kl"] < 1e-3
    assert "paper's accuracy" in capsys.readouterr().out


def test_steps_are_subsampled(smoke: Smoke) -> None:
    summary = smoke("step_subsampling", figures=("steps",))
    curves = summary["curves"].values()
    assert len({curve["kl"][-1] for curve in curves}) == 1  # all steps are the same steps in any order
    assert (summary["steps"], summary["seeds"]) == (10, 2)
    assert all(curve["agreement"][-1] > 0.9 for curve in curves)
    assert all(curve["± kl"][0] > 0 for curve in curves)


def test_layers_are_transplanted_and_swapped(smoke: Smoke, grokking: Path) -> None:
    summary = smoke("pipeline_transplant", f"run={grokking}", figures=("transplant", "swaps", "confusion"))
    assert len(summary["transplants"]) == 5
    assert summary["swaps"]["step"] == [0, 6]


def test_parameters_are_pruned(smoke: Smoke) -> None:
    summary = smoke("pruning", figures=("pruning",))
    ours, random = (summary["methods"][name] for name in ("path kernel", "random"))
    assert ours["kl"][0] < random["kl"][0] / 2
    assert ours["sparsity"] == pytest.approx([0.7, 0.9], abs=1e-3)
    assert summary["seeds"] == 2


def test_a_pulled_trajectory_is_pruned_as_the_one_that_was_recorded(smoke: Smoke, server: Server) -> None:
    trained = smoke("pruning", "seeds=[0]", "project=images", figures=("pruning",))
    (name,) = server.ask("state")["collections"]
    rows = server.history(name.replace("trajectory-", ""))
    assert [row["train/step"] for row in rows] == list(range(5))
    assert all({"train/loss", "loss/kernel/linear1", "residual/test_loss"} <= row.keys() for row in rows)
    pulled = smoke("pruning", "seeds=[0]", f"trajectory=wandb:{name}", figures=("pruning",))
    assert pulled == trained
    assert server.downloads() > 2  # the manifest, a checkpoint, gradients


def test_samples_foretell_retraining(smoke: Smoke) -> None:
    summary = smoke("data_attribution", "magic=false", figures=("lds",))
    cells = [(row["setting"], row["fraction"]) for row in summary["rows"]]
    assert cells == [("smooth", 0.5), ("smooth", 0.9), ("smooth, same start", 0.5), ("smooth, same start", 0.9)]
    assert summary["rows"][-1]["metagradient"] > 0.5
    assert summary["mislabelled, smooth"]["wrong"] == 16
    cost = summary["cost, smooth"]
    assert cost.pop("accuracy") > 0
    assert cost.keys() == {"path kernel", "metagradient", "TracIn", "TRAK"}
    assert all(-1 <= row[name] <= 1 for row in summary["rows"] for name in cost)


def test_a_model_trained_again_from_the_same_start_is_the_run() -> None:
    config = configure("data_attribution", ["preset=smoke"])
    data = images.load(config)
    model = images.build(config, data, config.seed)
    images.fit(config, model, data.x_train, data.y_train, config.seed)
    wanted = data_attribution.log_odds(images.log_probabilities(model, data.x_test), data.y_test)[:, 0]
    x, y, everything = data.x_test, data.y_test, torch.arange(len(data.y_train))
    for same in (True, False):
        found = data_attribution.retrain(config, data, x, y, [everything, everything[1:]], same)
        assert torch.equal(found[0], wanted) == same
        assert not torch.equal(found[1], wanted)


def test_what_influences_say_of_parts_is_what_happens_without_them(smoke: Smoke, grokking: Path) -> None:
    summary = smoke("interventions", f"run={grokking}", figures=("interventions",))
    rows = {(row["part"], row["group"]): row for row in summary["interventions"]}
    assert len(rows) == 12
    derivative = [row for row in summary["correlations"] if row["foretold by"].startswith("derivative")]
    assert [row["interventions"] for row in derivative] == [12, 6, 6]
    assert derivative[0]["pearson"] > 0.8


def test_the_datamodeling_score_is_a_mean_of_rank_correlations() -> None:
    from dattri.metric import lds

    generator = torch.Generator().manual_seed(0)
    scores, truth = torch.randn(50, 7, generator=generator), torch.randn(40, 7, generator=generator)
    subsets = torch.stack([torch.randperm(50, generator=generator)[:20] for _ in range(40)])
    foretold = torch.stack([scores[subset].sum(0) for subset in subsets])
    score, _ = data_attribution.datamodeling_score(scores, truth, subsets, generator)
    assert score == pytest.approx(float(lds(scores, (truth, subsets))[0].mean()), abs=1e-6)
    assert data_attribution.datamodeling_score(scores, foretold.exp(), subsets, generator) == pytest.approx((1, 0))
    score, error = data_attribution.datamodeling_score(scores, foretold + 10 * truth, subsets, generator)
    assert score > 0.2
    assert 0.02 < error < 0.2
    truth[:] = truth[0]
    assert data_attribution.datamodeling_score(scores, truth, subsets, generator) == (0, 0)


def test_a_transplant_moves_the_named_layers_only(grokking: Path) -> None:
    from recipes.modulo_addition import finished

    _, run = finished(str(grokking))
    model, trajectory = run.model, run.trajectory
    own = {name: value.clone() for name, value in model.state_dict().items()}
    donor = trajectory.state_dict(len(trajectory))
    transplant(model, donor, ("att_encoder", "linear1"))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, own[name])}
    assert moved == {"attention.encoder.weight", "linear1.weight", "linear1.bias"}
    assert all(torch.equal(model.state_dict()[name], donor[name]) for name in moved)


def test_systematic_errors_are_those_off_by_few_differences() -> None:
    modulus, counts = 31, torch.eye(31)
    assert systematic(counts) == 0
    shifted = torch.roll(counts, 3, dims=1)
    assert systematic(counts + shifted) == 0.5
    assert systematic(torch.ones(modulus, modulus)) == pytest.approx(5 / 31)


def test_the_greedy_order_takes_the_largest_part_of_the_sum_first() -> None:
    changes = torch.tensor([[1.0, 0, 0], [0, 5.0, 0], [0, 0, 3.0], [0, 0.1, 0]])[:, None]
    assert step_subsampling.greedy(changes).tolist() == [1, 2, 0, 3]
    opposed = torch.tensor([[9.0], [-9.0], [1.0]])[:, None]
    assert step_subsampling.greedy(opposed)[0] == 2  # the big ones cancel


def test_the_image_models_are_the_papers() -> None:
    cnn, resnet = CNN(), ResNet9()
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in cnn.modules()) == 4
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in resnet.modules()) == 9
    assert torch.allclose(cnn(torch.randn(2, 1, 28, 28)).exp().sum(-1), torch.ones(2))
    assert resnet(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_digits_need_no_download_and_no_sample_is_in_both_parts() -> None:
    data = image_data("digits", None, 1000, 797)
    assert data.x_train.shape == (1000, 1, 8, 8)
    assert len(torch.unique(torch.cat([data.x_train, data.x_test]).flatten(1), dim=0)) > 1790
    assert data.x_train.mean() == pytest.approx(0, abs=1e-5)
    assert data.x_train.std() == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="too few"):
        image_data("digits", None, 1700, 200)


def test_images_come_from_parquet_files_in_the_hubs_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes of which CIFAR-2 takes two; colours keep their order and the label theirs."""
    import datasets
    import numpy as np

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    red, blue = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    rows = {"img": [red, blue, red, blue], "label": [3, 5, 0, 5]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = image_data("cifar2", str(tmp_path), 3, 3)
    assert data.y_train.tolist() == [0, 1, 1]
    assert data.x_train.shape == (3, 3, 32, 32)
    assert bool((data.x_train[0, 0] > 0).all())
    assert bool((data.x_train[1, 2] > 0).all())


def image_config(*arguments: str) -> DictConfig:
    return configure("images", ["preset=smoke", *arguments])


def test_a_watched_run_and_a_plain_one_are_the_same(tmp_path: Path) -> None:
    config = image_config("epochs=2", "peak=1")
    data = images.load(config)
    run = images.train(config, data, 0, tmp_path / "trajectory")
    plain = images.build(config, data, 0)
    images.fit(config, plain, data.x_train, data.y_train, 0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])
    assert len(Trajectory.open(tmp_path / "trajectory")) == 10


def test_the_learning_rate_rises_to_its_peak_and_falls() -> None:
    config = image_config("epochs=12", "peak=5", "optimizer.lr=0.1")
    optimizer, schedule = images.make_optimizer(config, nn.Linear(2, 2), 10)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) in (49, 50)
    assert 0 < rates[-1] < 0.002
    assert rates[0] == pytest.approx(0.002)
    with pytest.raises(ValueError, match="peak=5 has to lie between 0 and epochs=5"):
        images.make_optimizer(image_config("epochs=5", "peak=5"), nn.Linear(2, 2), 10)


def test_settings_come_from_the_base_the_file_the_preset_and_the_line() -> None:
    config = configure("epk_validation", ["preset=cifar2", "queries=7"])
    assert config.model == "resnet9"  # of the base's preset
    assert config.nodes == [1, 10]  # of the file's own preset, over its defaults
    assert config.data.train == 10_000  # of the base's preset, over the base's defaults
    assert config.queries == 7
    assert config.batch == 256
    assert "presets" not in config
    with pytest.raises(SystemExit, match="no preset 'nope', only cifar2, digits, smoke"):
        configure("epk_validation", ["preset=nope"])


def test_seeds_are_trained_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preset=smoke", f"out={tmp_path / 'seeds'}"]
    for _ in range(2):
        grokking_seeds.main(arguments)
    summary = json.loads((tmp_path / "seeds" / "summary.json").read_text())
    assert [row["threads"] for row in summary["runs"]] == [1, 2]
    assert summary["apart"]["smoke"]["1"]["5"] < 1e-6  # float64, whatever the order of the sums
    assert "of these below 50% of test" in capsys.readouterr().out
