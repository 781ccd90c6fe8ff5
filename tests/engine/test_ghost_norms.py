"""Norms of samples' gradients from one backward pass: against a backward pass for each sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check
from torch import Tensor, nn

from explaind_track.core.step import Batch, State
from explaind_track.engine.ghost_norms import GhostNorms
from explaind_track.engine.per_sample import PerSampleGradients

SAMPLES = 5


class Words(nn.Module):
    """Tokens, of which some come twice and some are padding, through a layer at every place."""

    def __init__(self, places: int, mean: bool = True) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 6, padding_idx=0), nn.LayerNorm((places, 6) if places < 4 else 6)
        self.wide, self.narrow = nn.Linear(6, 9), nn.Linear(9, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.narrow(F.gelu(self.wide(self.norm(self.embedding(x)))))
        return scores.mean(1)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2, dilation=2, bias=False),
        nn.Tanh(), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def frozen() -> nn.Module:
    model = images()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in ("0.weight", "5.bias"))
    return model


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.layer(self.layer(x).tanh()))
        return scores


class Reused(nn.Module):
    """A layer whose weight has another part in the output, which no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)
        return scores + F.linear(x, self.layer.weight.square())


def tied() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))


def tokens(places: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(7, (SAMPLES, places))


def pixels() -> Tensor:
    return torch.randn(SAMPLES, 1, 8, 8)


def rows() -> Tensor:
    return torch.randn(SAMPLES, 8)


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gradients_and_norms(model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """From a backward pass for each sample."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    total = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    norms = []
    for k, weight in enumerate(batch.weights(torch.zeros(0).double())):
        model.zero_grad()
        sample_loss(model, (batch.data[0][k : k + 1], batch.data[1][k : k + 1])).sum().backward()
        found = {name: model.get_parameter(name).grad for name in names}
        own = {name: torch.zeros_like(total[name]) if value is None else value for name, value in found.items()}
        norms.append(torch.stack([value.square().sum() for value in own.values()]).sum().sqrt())
        total = {name: total[name] + weight * value for name, value in own.items()}
    return total, torch.stack(norms)


@pytest.mark.parametrize("weight", [0.2, torch.tensor([0.5, -1.0, 2.0, 0.1, 0.3])], ids=["mean", "each"])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (vectors, rows), (images, pixels), (frozen, pixels),
        (lambda: Words(3), tokens(3)), (lambda: Words(12), tokens(12)),
    ],
    ids=["vectors", "images", "some frozen", "three words", "twelve words"],
)  # fmt: skip
def test_norms_are_those_of_the_samples(
    make: Callable[[], nn.Module], data: Callable[[], Tensor], weight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = make().double(), Batch(SAMPLES, weight, None, (real(data()), torch.randint(3, (SAMPLES,))))
    total, norms = gradients_and_norms(model, batch)
    samples = PerSampleGradients(model, sample_loss)
    samples.gradient_and_norms(state_of(model), batch)

    monkeypatch.delattr(PerSampleGradients, "_by_samples")  # which proved them
    found, _, of_samples = samples.gradient_and_norms(state_of(model), batch)
    check(of_samples, norms)
    assert found.keys() == total.keys()
    for name, value in total.items():
        check(found[name], value, 1.0)


@pytest.mark.parametrize("make", [Twice, Reused, tied, lambda: nn.Linear(8, 3, bias=False)])
@pytest.mark.parametrize("weight", [0.2, torch.tensor([0.5, 0.0, 2.0, 0.0, 0.3])], ids=["mean", "some without"])
def test_other_models_have_their_samples_gradients_taken(make: Callable[[], nn.Module], weight: Any) -> None:
    torch.manual_seed(0)
    model, batch = make().double(), Batch(SAMPLES, weight, None, (real(rows()), torch.randint(3, (SAMPLES,))))
    total, norms = gradients_and_norms(model, batch)
    found, _, of_samples = PerSampleGradients(model, sample_loss).gradient_and_norms(state_of(model), batch)
    check(of_samples, norms)
    for name, value in total.items():
        check(found[name], value, 1.0)


def test_layers_of_another_kind_are_told_beforehand() -> None:
    for make in (tied, lambda: nn.LSTM(8, 3), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))):
        model = make()
        with pytest.raises(NotImplementedError):
            GhostNorms(model, dict(model.named_parameters()))


def real(data: Tensor) -> Tensor:
    return data.double() if data.is_floating_point() else data


def state_of(model: nn.Module) -> State:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return State(trained, dict(model.named_buffers()))
