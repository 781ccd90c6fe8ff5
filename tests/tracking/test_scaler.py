"""GradScalers: an overflowed step leaves no trace, whoever leaves it out, the scaler or the fused optimizer itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query, Tracker, Trajectory

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
}


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(name: str, fused: bool, mark: str, overflows: tuple[int, ...], directory: Path) -> Tracker:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    cls, settings = OPTIMIZERS[name]
    optimizer, scaler = cls(model.parameters(), fused=fused, **settings), torch.amp.GradScaler("cpu", init_scale=2.0**6)
    options = {"sample_loss": sample_loss, "on_nonfinite": mark, "trajectory": directory}
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(x[:4])}, **options)
    for number in range(6):
        with tracker.step():
            optimizer.zero_grad()
            index = torch.arange(number, number + 5)
            tracker.batch((x[index], y[index]), index=index)
            loss = sample_loss(model, (x[index], y[index])).mean()
            scaler.scale(loss * float("inf") if number in overflows else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    tracker.finish()
    return tracker


@pytest.mark.parametrize("mark", ["raise", "mark"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_overflow_leaves_no_trace(name: str, mark: str, tmp_path: Path) -> None:
    fused = train(name, True, mark, (2, 4), tmp_path / "fused")
    plain = train(name, False, mark, (2, 4), tmp_path / "plain")
    assert fused.number == plain.number == 4
    assert len(Trajectory.open(tmp_path / "fused")) == 4
    found, wanted = (run.influence("q").data["influence"] for run in (fused, plain))
    assert float(abs(found - wanted).max()) <= 1e-4 * float(abs(wanted).max())

    prediction = torch.from_numpy(fused.influence("q", ("query", "output")).prediction().values)
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))  # of the same shape: any prediction will do
    assert prediction.shape == fused.model(inputs[:4]).shape
