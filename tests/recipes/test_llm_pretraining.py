"""Language models from their checkpoints: the command and the recipe, on what the real Trainer has written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import xarray as xr
from click.testing import CliRunner, Result
from servers import Server

from explaind_track import Influence
from explaind_track.analysis.checkpoint_plots import draw_sources
from explaind_track.checkpoints.language_model import LanguageModel
from explaind_track.checkpoints.sequences import make_sequences, read_rows
from explaind_track.cli.main import main as command
from explaind_track.record.history import read_rows as read_history
from recipes import llm_data, llm_pretraining
from recipes.common import configure
from recipes.llm_claims import CLAIMS, Curves, turns

pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("closing_wandb"), pytest.mark.filterwarnings("ignore::FutureWarning")]

PARTS = ("kernel", "past", "regularization")
SMOKE = ["preset=smoke", "steps=3", "checkpoints=[1,3]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe leaves: a series of two checkpoints with texts beside it, and its study."""
    out = tmp_path_factory.mktemp("llm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        llm_pretraining.main([*SMOKE, f"out={out}"])
    return out


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Studies without their figures, each of which takes a second; those of the recipe are drawn."""
    patch.setattr("explaind_track.analysis.checkpoint_study.study_figures", lambda *_: {})


def call(trained: Path, out: Path, *options: str) -> Result:
    seed = trained / "seed-0"
    files = ["--train", seed / "train.jsonl", "--unseen", seed / "unseen.jsonl"]
    sizes = ["--batch", "6", "--queries", "3", "--microbatch", "4", "--length", "32", "--clip", "1"]
    arguments = ["checkpoints", seed / "checkpoints", *files, *sizes, "--out", out, *options]
    return CliRunner().invoke(command, list(map(str, arguments)))


def test_the_recipe_says_of_every_claim_whether_it_holds(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert [claim["claim"] for claim in summary["claims"]] == [claim.text for claim in CLAIMS]
    assert [row["step"] for row in summary["seeds"]["0"]] == [1, 3]
    figures = {path.stem for path in (trained / "figures").glob("*.png")}
    assert figures == {"batch", "first_moment", "regularization", "losses"}
    with pytest.raises(SystemExit, match="holds a run with other settings: batch=4"):
        llm_pretraining.main([*SMOKE, f"out={trained}", "batch=5"])


@pytest.mark.slow
def test_the_same_command_goes_on_and_has_nothing_left_to_do(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints, steps = trained / "seed-0" / "checkpoints", trained / "seed-0" / "study" / "steps"
    written = {path: path.stat().st_mtime_ns for root in (checkpoints, steps) for path in root.rglob("*")}
    llm_pretraining.main([*SMOKE, f"out={trained}"])
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "holds for" in capsys.readouterr().out
    assert (trained / "seed-0" / "study" / "figures" / "batch.png").is_file()


def test_every_checkpoint_has_a_row_that_adds_up(trained: Path) -> None:
    study = trained / "seed-0" / "study"
    rows = json.loads((study / "summary.json").read_text())
    influence = Influence.load(study / "influence.safetensors").data["influence"]
    for row, panel in zip(rows, read_history(study), strict=True):
        assert row["change"] == pytest.approx(row["loss_after"] - row["loss_before"])
        assert abs(row["residual"]) <= max(1e-4 * abs(row["change"]), 1e-7)
        assert row["sum"] + row["residual"] == pytest.approx(row["change"])
        changes = -influence.sel(step=row["step"])
        assert float(changes.sum()) + row["rounding"] == pytest.approx(row["sum"], rel=1e-6)
        assert row["peak_mb"] > 50

        # the panels have the same numbers, summed by type and by layer
        for section, part in zip(("kernel", "past", "reg"), PARTS, strict=True):
            for loss in ("loss", "layer"):
                whole = panel[f"{loss}/{section}/total"]
                assert whole == pytest.approx(float(changes.sel(part=part).sum()), rel=1e-5)
                groups = {key: value for key, value in panel.items() if key.startswith(f"{loss}/{section}/")}
                assert sum(groups.values()) == pytest.approx(2 * whole)
        assert panel["train/step"] == row["step"]


def test_the_command_splits_by_source_and_goes_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    done = call(trained, tmp_path / "out", "--mixture", "prose:.5,code:.5", "--by-source", "--extrapolate")
    assert done.exit_code == 0, done.output
    for words in ("the first moment", "weight decay", "about", "correlation"):
        assert words in done.output
    data = Influence.load(tmp_path / "out" / "influence.safetensors").data
    kernel = data["influence"].sel(part="kernel", drop=True)
    assert set(data["source"].values) == {"prose", "code"}
    assert np.allclose(data["by_source"].sum("source"), kernel, atol=1e-5 * float(abs(kernel).max()))
    panels = draw_sources(-data["by_source"]).get_axes()
    assert {panel.get_title() for panel in panels} > {"through sequences of prose", "through sequences of code"}

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "steps").iterdir()}
    again = call(trained, tmp_path / "out", "--mixture", "prose:1,code:1", "--by-source", "--extrapolate", "--json")
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads(again.stdout)["rows"] == json.loads((tmp_path / "out" / "summary.json").read_text())

    report = CliRunner().invoke(command, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")])
    assert report.exit_code == 0, report.output
    page = (tmp_path / "page.html").read_text()
    assert "through the first moment from before (layer)" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mixture", "de:1"], "has 0 sequences of 'de'"),
        (["--mixture", "prose"], "a mixture is written en:.4,de:.2"),
        (["--groups", "kind"], "'kind'"),
        (["--length", "64"], "at most 32 tokens at once"),
        (["--batch", "100000"], "and 100000 are asked for"),
        (["--setting", "lr=high"], "--setting is written lr=3e-4"),
        (["--setting", "lr=0.5"], "says lr=0.5"),
        (["--model", "/nowhere"], "/nowhere does not describe a causal language model"),
    ],
)
def test_what_cannot_be_is_refused_before_work(trained: Path, tmp_path: Path, options: list[str], words: str) -> None:
    done = call(trained, tmp_path / "out", *options)
    assert done.exit_code == 1
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_its_files_is_none(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 20, "n_embd": 4, "n_layer": 1, "n_head": 1}
    transformers.GPT2Config(**sizes).save_pretrained(tmp_path)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 1
    assert LanguageModel.of(tmp_path).tokenizer is None


def test_weights_alone_are_an_estimate_with_the_rate_that_is_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    alone = tmp_path / "seed-0"
    shutil.copytree(trained / "seed-0", alone, ignore=shutil.ignore_patterns("optimizer.pt", "scheduler.pt", "study"))
    refused = call(tmp_path, tmp_path / "out")
    assert refused.exit_code == 1
    assert "say --setting lr=… --setting weight_decay=…" in refused.output

    done = call(tmp_path, tmp_path / "out", "--setting", "lr=1e-3", "--setting", "weight_decay=0.1")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(row["estimated"] for row in rows)
    parts = Influence.load(tmp_path / "out" / "influence.safetensors").data["part"].values
    assert set(parts) == {"kernel", "regularization"}


@pytest.mark.slow
def test_rows_and_result_go_to_wandb_with_their_lineage(trained: Path, tmp_path: Path, server: Server) -> None:
    done = call(trained, tmp_path / "out", "--project", "llm")
    assert done.exit_code == 0, done.output
    (run,) = server.ask("state")["runs"].values()
    name = f"{run['entity']}/llm/{run['name']}"
    rows = server.history(name)
    assert [row["train/step"] for row in rows] == [1, 3]
    for arrived, kept in zip(rows, read_history(tmp_path / "out"), strict=True):
        assert kept.items() <= arrived.items()

    result = wandb.Api().artifact(f"{run['entity']}/llm/influence-{run['name']}:latest")
    assert "checkpoints-" in result.metadata["made_from"]
    assert len(run["inputs"]) == 1


# ------------------------------------------------------------------ the recipe's pieces


def test_python_itself_is_prose_and_code_without_it() -> None:
    source = 'def f():\n    """Say\n    hello."""\n    return 1\n'
    assert llm_data.split_docstrings(source) == ("Say\nhello.", "def f():\n    return 1")
    documents = llm_data.of_python(["prose", "code"], 5, seed=0)
    assert all(documents.values())


def test_a_language_is_trained_on_whole_before_any_of_it_twice(tmp_path: Path) -> None:
    corpus = {"a": ["x" * 30], "b": ["y" * 300]}
    llm_data.write_rows(tmp_path / "rows.jsonl", corpus)
    rows = read_rows(tmp_path / "rows.jsonl")
    sequences = make_sequences(rows, 10, 200, encode=lambda text: list(text.encode()))
    order = llm_data.training_order(sequences, 20, {"a": 0.3, "b": 0.7}, seed=0)
    assert order.composition() == {"a": 6, "b": 14}


def data_settings(*arguments: str) -> Any:
    return configure("llm_pretraining", ["preset=smoke", *arguments]).data


def test_folders_of_text_are_languages(tmp_path: Path) -> None:
    for language in ("de", "en"):
        (tmp_path / language).mkdir()
        for number in range(4):
            (tmp_path / language / f"{number}.txt").write_text(f"{language} {number}")
    found = llm_data.load(data_settings(f"data.path={tmp_path}"), ["de", "en"], seed=0)
    assert sorted([*found.train["de"], *found.unseen["de"]]) == [f"de {number}" for number in range(4)]
    assert len(found.unseen["en"]) == 1
    with pytest.raises(SystemExit, match=r"no texts in fr/ \(it has: de, en\)"):
        llm_data.load(data_settings(f"data.path={tmp_path}"), ["fr"], seed=0)


def test_what_is_not_there_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="two different places"):
        llm_data.load(data_settings("data.path=x", "data.hub=y"), ["en"], seed=0)
    with pytest.raises(SystemExit, match="Python's own library is prose and code, not en"):
        llm_data.load(data_settings(), ["en"], seed=0)
    for preset in ("pythia", "eurollm"):
        with pytest.raises(SystemExit, match=r"sees no CUDA device here"):
            llm_pretraining.main([f"preset={preset}"])
    with pytest.raises(SystemExit, match="are not public: say where yours are"):
        llm_pretraining.main(["preset=eurollm", "device=cpu"])


# ------------------------------------------------------------------ claims


def curves(kernel: Callable[[int], dict[str, float]], steps: int = 20) -> Curves:
    """A run whose batch changes the loss by `kernel(step)`; its other parts by nothing."""
    groups = list(kernel(0))
    values = np.zeros((3, steps, len(groups)))
    values[0] = [[kernel(step)[group] for group in groups] for step in range(steps)]
    labels = {"part": list(PARTS), "step": range(1, steps + 1), "group": groups}
    types = xr.DataArray(values, labels, ("part", "step", "group"))
    layers = types.isel(group=[0, 1]).assign_coords(group=["layer.0", "layer.1"])
    return Curves(types, layers)


def test_phases_are_found_where_they_are_and_not_in_a_drift() -> None:
    sudden = curves(lambda step: {"mlp.up": -3.0 if step < 8 else -1.0, "attention.q": -1.0 if step < 8 else -3.0})
    steady = curves(lambda step: {"mlp.up": -20.0 + step, "attention.q": -1.0 - step})
    assert sudden.step_of_change() == 9
    assert sudden.phases_over_drift() > 0.2
    assert steady.phases_over_drift() < 0
    held = {claim.text: claim.test(sudden)["holds"] for claim in CLAIMS}
    assert held["in the first, mostly the MLPs learn"]
    assert held["… relative to the MLPs'"]
    assert not held["upper layers first, intermediate and lower ones later"]  # the second is attention's here


def test_turns_are_changes_of_sign() -> None:
    assert turns(np.array([1.0, -1.0, 1.0, -2.0])) == 1
    assert turns(np.array([1.0, 2.0, -1.0])) == 0.5
