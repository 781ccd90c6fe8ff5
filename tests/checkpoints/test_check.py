"""What is told of a series before any work, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_hf import VOCABULARY, gpt2, llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_runs import rows, train

from explaind_track import CheckpointSeries
from explaind_track.errors import CheckpointError, CheckpointWarning

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("trainer") / "run"
    train(llama(), directory, max_steps=60, save_steps=30)
    return directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


BATCH = torch.stack([row["input_ids"] for row in rows()])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(input_ids=batch, labels=batch).loss
    return value


def hashes(directory: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_good_series_has_no_problems_and_nothing_of_it_is_written_to(run: Path) -> None:
    before = hashes(run)
    for path in sorted(run.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    run.chmod(0o555)
    model = llama()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    series = CheckpointSeries.open(run)
    check = series.check(model, BATCH, loss)
    check.require()
    first = check.findings[0]
    assert (first.step, first.optimizer, first.weights, first.state) == (30, "AdamW", ["float32"], ["float32"])
    assert first.correlation is not None
    assert first.correlation > 0.2
    assert first.decay == [0.1, 0.0]
    assert check.findings[-1].rate == [0, 0]
    assert "moves nothing" in str(check)
    assert json.loads(json.dumps(check.as_dict()))["findings"][0]["format"] == "transformers' Trainer"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    # a step taken with mapped state stays in memory
    series[0].load(model)
    optimizer = series[0].optimizer(model)
    assert optimizer is not None
    loss(model, BATCH).backward()
    optimizer.step()
    assert hashes(run) == before
    for path in (run, *run.rglob("*")):
        os.chmod(path, 0o755)


def damaged(run: Path, name: str, change: Callable[[Any], Any]) -> None:
    file = run / "checkpoint-30" / name
    torch.save(change(torch.load(file)), file)


def exchanged(content: Any) -> Any:
    state = content["state"]  # q_proj of both layers
    state[1], state[8] = state[8], state[1]
    return content


def test_states_of_equal_shape_that_were_exchanged_are_told_with_a_batch(run: Path) -> None:
    """By the gradient of a batch; nothing else tells, and a step taken with them adds up as well. So small a model's (8
    by 8) are told of; others are refused (`test_state_match.py`)."""
    damaged(run, "optimizer.pt", exchanged)
    series = CheckpointSeries.open(run)
    assert series.check(llama()).findings[0].problems == []
    (note,) = series.check(llama(), BATCH, loss).findings[0].notes
    both = "model.layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight"
    assert f"the states of {both} fit the batch's gradient better exchanged" in note
    assert not any("exchanged" in note for note in series.check(llama(), BATCH, loss).findings[1].notes)


def test_a_rate_of_the_users_that_is_not_the_files_is_refused(run: Path) -> None:
    rate = torch.load(run / "checkpoint-30" / "optimizer.pt")["param_groups"][0]["lr"]
    CheckpointSeries.open(run / "checkpoint-30", settings={"lr": lambda step: rate}).check(llama()).require()
    wrong = CheckpointSeries.open(run / "checkpoint-30", settings={"lr": 3 * rate})
    with pytest.raises(CheckpointError, match=r"settings= says lr=.*optimizer|checkpoint-30 says"):
        wrong[0].optimizer(llama())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("harm", [cut, lambda path: path.write_bytes(b"something else")], ids=["truncated", "foreign"])
def test_a_truncated_or_foreign_file_is_named(run: Path, name: str, harm: Callable[[Path], Any]) -> None:
    harm(run / "checkpoint-30" / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-30/{name}.*Copy it again"):
        CheckpointSeries.open(run).check(llama()).require()


@pytest.fixture
def foreign(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module whose class the optimizer's file of the run names."""
    folder = run.parent / "modules"
    folder.mkdir()
    (folder / "foreign.py").write_text("class Foreign: pass")
    monkeypatch.syspath_prepend(folder)
    import foreign  # type: ignore[import-not-found]

    damaged(run, "optimizer.pt", lambda content: {**content, "extra": foreign.Foreign()})
    return folder


def test_what_would_have_to_be_unpickled_is_refused_with_the_way_out(run: Path, foreign: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)holds Python objects.*Foreign.*python -c .*weights_only=False"):
        CheckpointSeries.open(run)[0].optimizer(llama())


@pytest.mark.slow
def test_the_way_out_leads_out(run: Path, foreign: Path) -> None:
    """The command in the refusal, run where the class can be imported, gives a file that is read."""
    with pytest.raises(CheckpointError) as refused:
        CheckpointSeries.open(run)[0].optimizer(llama())
    code = str(refused.value).split('python -c "')[1].split('"')[0]
    folder = run / "checkpoint-30"
    environment = {**os.environ, "PYTHONPATH": str(foreign)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=environment)
    (folder / "optimizer.pt.new").replace(folder / "optimizer.pt")
    assert CheckpointSeries.open(run)[0].optimizer(llama()) is not None


def test_a_missing_shard_is_named(run: Path) -> None:
    folder = run / "checkpoint-30"
    model = llama()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1

    loaded = llama()
    CheckpointSeries.open(folder)[0].load(loaded)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of {len(shards)} shards: {shards[1].name}"):
        CheckpointSeries.open(folder)[0].load(llama())


def test_another_tokenizers_vocabulary_is_refused(run: Path) -> None:
    other = llama()
    other.resize_token_embeddings(VOCABULARY + 5)
    with pytest.raises(CheckpointError, match=r"another tokenizer's vocabulary.*embed_tokens.*\(11, 8\).*\(16, 8\)"):
        CheckpointSeries.open(run)[0].load(other)
    tokenizer = {"model": {"vocab": {f"t{n}": n for n in range(50)}}, "added_tokens": []}
    (run / "checkpoint-30" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another model's tokenizer" in CheckpointSeries.open(run).check(llama()).findings[0].notes[0]


def test_bfloat16_weights_without_a_copy_are_told(run: Path) -> None:
    file = run / "checkpoint-30" / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    (checkpoint,) = CheckpointSeries.open(run / "checkpoint-30")
    model = llama()
    checkpoint.load(model)
    assert next(model.parameters()).dtype is torch.float32
    with pytest.warns(CheckpointWarning, match="weights are bfloat16 and there is no float32 copy"):
        checkpoint.optimizer(model)
    with pytest.raises(CheckpointError, match="make the model float32"):
        CheckpointSeries.open(run / "checkpoint-60")[0].load(model.bfloat16())


def test_another_model_is_refused_with_the_names(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of this GPT2LMHeadModel. the file lacks: transformer"):
        CheckpointSeries.open(run)[0].load(gpt2())
    with pytest.raises(CheckpointError, match=r"not this model's: its groups have 16, 5 parameters"):
        CheckpointSeries.open(run)[0].optimizer(gpt2())


def test_tied_weights_are_loaded_once_and_untied_ones_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = gpt2(), gpt2()
    folder = tmp_path / "step5"
    source.save_pretrained(folder)
    (checkpoint,) = CheckpointSeries.open(tmp_path)
    checkpoint.load(target)
    assert torch.equal(target.lm_head.weight, source.transformer.wte.weight)
    assert target.lm_head.weight is target.transformer.wte.weight

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied in the model, but not in the file"):
        checkpoint.load(target)


def test_weights_alone_have_no_first_moment(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "step7")
    series = CheckpointSeries.open(tmp_path)
    assert series[0].optimizer(llama()) is None
    (found,) = series.check(llama(), BATCH, loss).findings
    assert (found.step, found.optimizer, found.problems) == (7, None, [])
    assert "no part of the past" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "config"), [("GPTNeoXForCausalLM", "GPTNeoXConfig"), ("MixtralForCausalLM", "MixtralConfig")]
)
def test_files_with_other_names_than_the_modules_are_converted(name: str, config: str, tmp_path: Path) -> None:
    """The head of GPT-NeoX is `embed_out` in files; those of a mixture hold each expert by itself."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2} if "Mixtral" in name else {}
    made = getattr(transformers, config)(**sizes, **experts, num_attention_heads=2)
    source, target = getattr(transformers, name)(made), getattr(transformers, name)(made)
    source.save_pretrained(tmp_path / "step5")
    (checkpoint,) = CheckpointSeries.open(tmp_path)
    assert set(checkpoint.weights()) != set(source.state_dict())
    checkpoint.load(target)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
