"""Folders of transformers' Trainer give back the very optimizer that wrote them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_hf import bert, gpt2, llama
from torch import nn
from trainer_runs import train

from explaind_track import CheckpointSeries
from explaind_track.errors import CheckpointError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("trainer") / "run"
    train(llama(), directory)
    return directory


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_next_step_from_a_checkpoint_is_that_of_training(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Trained on from the middle with gradients of its own, the Trainer's optimizer and ours stay equal to the bit."""
    torch.manual_seed(0)
    trainer = train(make(), tmp_path, max_steps=3)
    theirs, optimizer = trainer.model, trainer.optimizer.optimizer
    (checkpoint,) = CheckpointSeries.open(tmp_path)
    ours = make()
    checkpoint.load(ours)
    loaded = checkpoint.optimizer(ours)
    assert loaded is not None
    assert checkpoint.step == 3

    for model, stepping in ((theirs, optimizer), (ours, loaded)):
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        stepping.step()

    for (name, wanted), (_, found) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(wanted, found), name


def test_a_series_has_the_runs_steps_and_rates(folder: Path) -> None:
    series = CheckpointSeries.open(folder)
    assert series.steps == [3, 6, 9]
    rates = []
    for checkpoint in series:
        optimizer = checkpoint.optimizer(llama())
        assert type(optimizer) is torch.optim.AdamW
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] > rates[1] > rates[2] == 0  # as of the next step: behind the last one nothing is left


def test_a_rate_that_the_scheduler_has_not_set_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / name).write_bytes((folder / "checkpoint-6" / name).read_bytes())
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 6}))
    content = torch.load(tmp_path / "optimizer.pt")
    content["param_groups"][0]["lr"] *= 2
    torch.save(content, tmp_path / "optimizer.pt")
    (checkpoint,) = CheckpointSeries.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"rates of the optimizer .* not those that scheduler\.pt"):
        checkpoint.optimizer(llama())
