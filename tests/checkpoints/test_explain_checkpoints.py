"""Steps from checkpoints: against the engine that watches, against plain autograd, and what they leave behind."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from cases import OPTIMIZERS
from held_checkpoints import SMALL, HeldCheckpoint, X, Y, learning, small
from helpers import check
from models_hf import gpt2, llama
from torch import Tensor, nn
from trainer_runs import rows, train

from explaind_track import (
    Batch,
    CheckpointSeries,
    Quadrature,
    Query,
    StepObserver,
    explain,
    explain_checkpoints,
)
from explaind_track.checkpoints import explain_checkpoints as explain_module

ROWS = torch.stack([row["input_ids"] for row in rows()])
TRAIN, UNSEEN = ROWS[:12], ROWS[20:]


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].movedim(-1, 1), tokens[:, 1:], reduction="none").mean(1)


def train_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return token_losses(model(input_ids=tokens).logits, tokens)


def unseen_loss(output: Any, tokens: Tensor) -> Tensor:
    return token_losses(output.logits, tokens)


QUERY = Query.loss({"input_ids": UNSEEN}, UNSEEN, unseen_loss).mean()
LANGUAGE: dict[str, Any] = {"train": TRAIN, "loss": train_loss, "query": QUERY, "microbatch": 5, "progress": False}


def watched(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: Callable[[], Tensor], query: Query, found: xr.Dataset
) -> xr.Dataset:
    """The same step as the engine explains it that watches an optimizer, by tensor; at as many nodes."""
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    losses().mean().backward()
    observer.before({})
    optimizer.step()
    asked: dict[str, Any] = {"quadrature": Quadrature.fixed(int(found["nodes"])), "progress": False}
    parts = found["part"].values.tolist()
    return explain([observer.after(0, {})], model, query, groups="tensor", parts=parts, **asked).data


# ------------------------------------------------------------ its numbers


@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"), [(gpt2, torch.float64, 1e-12), (llama, torch.float32, 1e-6)], ids=["gpt2", "llama"]
)
def test_a_trainers_checkpoint_has_the_parts_of_the_engine_that_watches(
    make: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    train(make(), tmp_path, max_steps=4, save_steps=2)
    series, model = CheckpointSeries.open(tmp_path), make().to(dtype).eval()
    found = explain_checkpoints(series, model, groups={"tensor": "tensor", "layer": "layer"}, **LANGUAGE)
    data = found["tensor"].data
    assert data["step"].values.tolist() == [2, 4]
    assert (abs(data["remainder"]) <= np.maximum(1e-4 * abs(data["change"]), 1e-7)).all()

    checkpoint = series[0]  # the rate behind the last is 0
    checkpoint.load(model)
    optimizer = checkpoint.optimizer(model)
    assert optimizer is not None
    wanted = watched(model, optimizer, lambda: train_loss(model, TRAIN), QUERY, data.isel(step=0))
    scale = float(abs(wanted["influence"]).max())
    assert data["part"].values.tolist() == ["kernel", "past", "regularization"]
    check(data["influence"][:, 0], wanted["influence"][:, 0], scale, tolerance)
    check(data["change"][0], wanted["change"][0], scale, 1e-5 if dtype is torch.float32 else tolerance)

    by_layer = found["layer"].data
    check(by_layer["influence"].sum("group"), data["influence"].sum("group"), scale, 1e-12)
    check(by_layer["importance"], abs(by_layer["influence"]), 1.0, 0)
    check(by_layer["loss_after"] - by_layer["loss_before"], by_layer["change"], 1.0, 1e-14)
    check(found["layer"].total() + by_layer["change"], by_layer["remainder"], scale, 1e-10)
    assert set(found["layer"].kept) == {"step", "group"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_parts_are_those_of_the_engine_that_watches(name: str, tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS[name]))
    model.drop.p = 0.0
    data = explain_checkpoints(series, model, **SMALL)["tensor"].data

    series[1].load(model)
    optimizer = series[1].optimizer(model)
    assert optimizer is not None
    losses = lambda: SMALL["loss"](model, SMALL["train"])  # noqa: E731
    wanted = watched(model, optimizer, losses, SMALL["query"], data.isel(step=1))
    check(data["influence"][:, 1], wanted["influence"][:, 0], float(abs(wanted["influence"]).max()), 1e-11)
    has_momentum = any("momentum" in key or key == "exp_avg" for key in state_of(optimizer))
    assert ("past" in data["part"]) == has_momentum
    assert (data["residual"] < 1e-4).all()


def state_of(optimizer: torch.optim.Optimizer) -> set[str]:
    return {key for state in optimizer.state.values() for key, value in state.items() if value is not None}


def test_clipping_weights_and_dropout_are_trainings(tmp_path: Path) -> None:
    """Plain autograd, with the same masks: SGD, whose step is the gradient."""
    rate = 0.3
    series, model = small(tmp_path, lambda model: torch.optim.SGD(model.parameters(), lr=rate), 1)
    weights = torch.tensor([0.5, 0.1, 0.2, 0.0, 1.0, 0.3], dtype=torch.float64)
    batch = Batch(6, weights, data=SMALL["train"])
    torch.manual_seed(4)
    found = explain_checkpoints(series, model, **{**SMALL, "train": batch, "clip": 0.05})["tensor"].data

    plain = deepcopy(model).train()
    torch.manual_seed(4)
    for rows_ in (slice(0, 4), slice(4, 6)):
        (SMALL["loss"](plain, (X[rows_], Y[rows_])) * weights[rows_]).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    assert float(norm) > 0.05
    check(found["gradient_norm"], [float(norm)])

    moved = deepcopy(model).eval()
    with torch.no_grad():
        for parameter, other in zip(moved.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                parameter -= rate * other.grad
    losses = [float(F.cross_entropy(one.eval()(X[6:]), Y[6:]).detach()) for one in (model, moved)]
    check(found["loss_before"], losses[:1])
    check(found["loss_after"], losses[1:])


def test_sources_split_the_batchs_part_by_their_own_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]))
    sources = ["en", "de", "en", "fr", "de", "en"]
    torch.manual_seed(4)
    data = explain_checkpoints(series, model, sources=sources, clip=0.1, **SMALL)["tensor"].data
    assert data["source"].values.tolist() == ["en", "de", "fr"]
    check(data["by_source"].sum("source"), data["influence"].sel(part="kernel"), tolerance=1e-10)
    torch.manual_seed(4)
    by_sample = explain_checkpoints(series, model, sources=range(6), clip=0.1, **SMALL)["tensor"].data["by_source"]
    check(by_sample.sel(source=["0", "2", "5"]).sum("source"), data["by_source"].sel(source="en"), tolerance=1e-10)

    # without dropout: φ · P (1−β₁) α/(1−β₁^{s+1}) w_k ∇L_k, at the midpoint of the step
    model.drop.p = 0.0
    (one,) = CheckpointSeries([series[2]])
    monkeypatch.setattr(explain_module, "FEWEST_NODES", 1)
    asked = {**SMALL, "tolerance": 1e9, "sources": range(6)}
    found = explain_checkpoints(CheckpointSeries([one]), model, **asked)["tensor"].data["by_source"][0]
    wanted = plain_shares(one, model)
    check(found, wanted, tolerance=1e-10)


def plain_shares(checkpoint: Any, model: nn.Module) -> np.ndarray:
    checkpoint.load(model)
    optimizer = checkpoint.optimizer(model)
    names = [name for name, _ in model.named_parameters()]
    own = []
    for k in range(6):
        model.zero_grad()
        SMALL["loss"](model, (X[k : k + 1], Y[k : k + 1])).sum().div(6).backward()
        own.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    middle, after = deepcopy(model), deepcopy(model)
    for name, parameter in after.named_parameters():
        if name in own[0]:
            parameter.grad = sum(one[name] for one in own)
    moving = checkpoint.optimizer(after)
    moving.step()
    with torch.no_grad():
        for parameter, end in zip(middle.parameters(), after.parameters(), strict=True):
            parameter.lerp_(end, 0.5)
    middle.zero_grad()
    F.cross_entropy(middle.eval()(X[6:]), Y[6:]).backward()

    found = np.zeros((6, len(names)))
    settings = optimizer.param_groups[0]
    beta1, beta2 = settings["betas"]
    for place, name in enumerate(names):
        if name in own[0]:
            state = moving.state[after.get_parameter(name)]
            count = float(state["step"])
            scale = settings["lr"] * (1 - beta1) / (1 - beta1**count)
            scale = scale / ((state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + settings["eps"])
            for k in range(6):
                found[k, place] = float((middle.get_parameter(name).grad * scale * own[k][name]).sum())
    return found


def test_the_batchs_part_is_extrapolated_by_its_weight_in_the_first_moment(tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]))
    for checkpoint, step in zip(series.checkpoints, (10, 13, 50), strict=True):
        checkpoint.step = step
    data = explain_checkpoints(series, model, extrapolate=True, **SMALL)["tensor"].data
    factors = [sum(0.8**j for j in range(steps)) for steps in (3, 37, 37)]
    kernel = data["influence"].sel(part="kernel")
    check(data["extrapolated"], kernel * xr.DataArray(factors, dims="step"))
    with pytest.raises(ValueError, match="there is one checkpoint"):
        explain_checkpoints(CheckpointSeries(series.checkpoints[:1]), model, extrapolate=True, **SMALL)


def test_an_optimizer_that_has_not_taken_a_step_has_no_past(tmp_path: Path) -> None:
    """As it is restored of a state with zeros, too."""
    make = learning(OPTIMIZERS["adamw"])
    series, model = small(tmp_path, make)
    first = series[0]
    fresh = explain_checkpoints(
        CheckpointSeries([HeldCheckpoint(0, model, make(model), make, tmp_path)]), model, **SMALL
    )
    assert fresh["tensor"].data["part"].values.tolist() == ["kernel", "regularization"]
    for state in first.state["state"].values():
        state["step"].zero_()
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    zeros = explain_checkpoints(CheckpointSeries([first]), model, **SMALL)
    assert zeros["tensor"].data["part"].values.tolist() == ["kernel", "regularization"]


def test_weights_alone_make_an_estimate_with_an_optimizer_and_nothing_without(tmp_path: Path) -> None:
    make = learning(OPTIMIZERS["adamw"])
    series, model = small(tmp_path, make)
    alone = HeldCheckpoint(9, model, None, make, tmp_path)
    both = CheckpointSeries([*series.checkpoints, alone])
    with pytest.raises(ValueError, match=r"weights alone.*optimizer="):
        explain_checkpoints(both, model, **SMALL)
    data = explain_checkpoints(both, model, optimizer=make, **SMALL)["tensor"].data
    assert data["estimated"].values.tolist() == [0, 0, 0, 1]
    past = data["influence"].sel(part="past")
    assert past[3].isnull().all()
    assert not past[:3].isnull().any()
    assert data["residual"][3] < 1e-4

    # α (1−β₁)/(1−β₁¹⁰) g/√v̂, and v is g²; in a step so short that φ is that of its beginning
    model.drop.p = 0.0
    short = learning(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-7, betas=(0.8, 0.9), eps=0))
    found = explain_checkpoints(CheckpointSeries([alone]), model, optimizer=short, **SMALL)["tensor"].data["influence"]
    bias = model.second.bias
    gradient, slope = (
        torch.autograd.grad(value.mean(), bias)[0]
        for value in (SMALL["loss"](model, SMALL["train"]), SMALL["query"](model))
    )
    count = 10
    scale = 1e-7 * (1 - 0.8) / (1 - 0.8**count) * (1 - 0.9**count) ** 0.5
    wanted = scale * float(slope @ (gradient.sign()))
    check(found.sel(part="kernel", group="second.bias"), [wanted], tolerance=1e-4)


def test_refinement_stops_where_only_rounding_is_left(tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]), 1)
    model.drop.p = 0.0

    def rounded(output: Tensor, y: Tensor) -> Tensor:
        noise = (1e6 * output.detach().sum()).sin() * 1e-3
        return F.cross_entropy(output, y, reduction="none") + noise

    asked = {**SMALL, "query": Query.loss(X[6:], Y[6:], rounded).mean(), "tolerance": 0.0}
    data = explain_checkpoints(series, model, **asked)["tensor"].data
    exact = explain_checkpoints(series, model, **{**SMALL, "tolerance": 0.0})["tensor"].data
    assert abs(data["remainder"][0]) > 1e-5
    assert data["nodes"][0] <= 2 * exact["nodes"][0]
    check(data["influence"], exact["influence"], tolerance=1e-5)


class Image(nn.Module):
    """Convolutions whose weights lie in memory in another order, and statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        images = x.repeat(1, 12).reshape(-1, 3, 4, 4)
        return self.head(self.norm(self.conv(images)).square().mean((2, 3)))


def test_buffers_and_memory_formats_are_the_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = OPTIMIZERS["adamw"]
    trained, model = Image().double(), Image().double()
    optimizer = make(trained)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(trained(X), Y).backward()
        optimizer.step()
    assert not trained.conv.weight.is_contiguous()
    checkpoint = HeldCheckpoint(2, trained, optimizer, make, tmp_path)
    asked = {**SMALL, "microbatch": 6}  # whose statistics are the batch's
    data = explain_checkpoints(CheckpointSeries([checkpoint]), model, **asked)["tensor"].data
    for name, value in checkpoint.parameters.items():
        assert torch.equal(model.state_dict()[name], value), name
    check(data["loss_before"], [F.cross_entropy(trained.eval()(X[6:]), Y[6:]).item()])

    optimizer = checkpoint.optimizer(model)
    assert optimizer is not None
    observer, buffers = StepObserver(optimizer, dict(model.named_parameters())), dict(model.named_buffers())
    kept = {name: value.clone() for name, value in buffers.items()}
    SMALL["loss"](model.train(), SMALL["train"]).mean().backward()
    for name, value in buffers.items():
        value.copy_(kept[name])
    observer.before(buffers)
    optimizer.step()
    more: dict[str, Any] = {"quadrature": Quadrature.fixed(int(data["nodes"][0])), "progress": False}
    wanted = explain([observer.after(0, buffers)], model, SMALL["query"], groups="tensor", **more).data
    parts = data["part"].values
    check(data["influence"][:, 0], wanted["influence"].sel(part=parts)[:, 0], float(abs(wanted["influence"]).max()))


def test_a_folder_is_not_written_to(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    train(gpt2(), tmp_path, max_steps=2, save_steps=2)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    explain_checkpoints(CheckpointSeries.open(tmp_path), gpt2(), **LANGUAGE)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
