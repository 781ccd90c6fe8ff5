"""A Tracker of what Accelerate prepares and Fabric sets up: the same influences, to the bit, as in a plain loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from explaind_track import Query, Tracker, Trajectory, explain

ROWS = 22
X, Y = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(5)).double(), torch.arange(ROWS) % 3
pytestmark = pytest.mark.filterwarnings("ignore", "error::explaind_track.errors.SampleMismatchWarning")


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def made() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model with statistics and dropout, its optimizer, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    data = torch.utils.data.TensorDataset(X, Y, torch.arange(ROWS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    return model, optimizer, torch.utils.data.DataLoader(data, batch_size=4)


def tracker_of(model: nn.Module, optimizer: Any, directory: Path) -> Tracker:
    return Tracker(model, optimizer, queries={"test": Query.outputs(X[:3])}, sample_loss=losses, trajectory=directory)


def with_accelerate(accumulated: int, directory: Path) -> Tracker:
    """Every batch in a context of its own; the optimizer takes a step in every so many, and in the last."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=accumulated, cpu=True)
    model, optimizer, loader = accelerator.prepare(*made())
    tracker = tracker_of(model, optimizer, directory)
    for _ in range(2):
        for batch in loader:
            with tracker.step(), accelerator.accumulate(model):
                tracker.batch(batch[:2], index=batch[2], weight=1 / len(batch[0]) / accumulated)
                accelerator.backward(losses(model, batch).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
    tracker.finish()
    return tracker


def by_hand(accumulated: int, directory: Path) -> Tracker:
    model, optimizer, loader = made()
    tracker = tracker_of(model, optimizer, directory)
    for _ in range(2):
        batches = list(loader)
        for first in range(0, len(batches), accumulated):
            with tracker.step():
                optimizer.zero_grad()
                for batch in batches[first : first + accumulated]:
                    tracker.batch(batch[:2], index=batch[2], weight=1 / len(batch[0]) / accumulated)
                    (losses(model, batch).mean() / accumulated).backward()
                tracker.clip_grad_norm_(0.05)
                optimizer.step()
    tracker.finish()
    return tracker


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 12), (4, 4)])
def test_what_accelerate_prepares_is_tracked(accumulated: int, steps: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found, expected = with_accelerate(accumulated, tmp_path / "a"), by_hand(accumulated, tmp_path / "b")
    assert found.number == expected.number == steps
    xr.testing.assert_identical(found.influence("test").data, expected.influence("test").data)

    question: dict[str, Any] = {"keep": ("group", "query", "sample"), "sample_loss": losses, "progress": False}
    samples = [
        explain(
            Trajectory.open(tmp_path / own), tracker.model, Query.outputs(X[:3]), **question,
            data=lambda index: (X[index], Y[index]),
        ).data
        for own, tracker in (("a", found), ("b", expected))
    ]  # fmt: skip
    xr.testing.assert_identical(*samples)
    assert float(samples[0]["mismatch"].max()) < 1e-8


def test_what_fabric_sets_up_is_tracked(tmp_path: Path) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, optimizer, loader = made()
    prepared, stepping = fabric.setup(model, optimizer)
    tracker = tracker_of(prepared, stepping, tmp_path / "a")
    assert list(tracker.groups) == ["0", "1", "4"]
    for batch in loader:
        with tracker.step():
            stepping.zero_grad()
            tracker.batch(batch[:2], index=batch[2])
            fabric.backward(losses(prepared, batch).mean())
            fabric.clip_gradients(prepared, stepping, max_norm=0.05)
            stepping.step()
    tracker.finish()

    model, optimizer, loader = made()
    plain = tracker_of(model, optimizer, tmp_path / "b")
    for batch in loader:
        with plain.step():
            optimizer.zero_grad()
            plain.batch(batch[:2], index=batch[2])
            losses(model, batch).mean().backward()
            plain.clip_grad_norm_(0.05)
            optimizer.step()
    plain.finish()
    xr.testing.assert_identical(tracker.influence("test").data, plain.influence("test").data)


def test_samples_in_a_precision_of_fabrics_choice_are_refused(tmp_path: Path) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model, optimizer, _ = made()
    prepared, stepping = fabric.setup(model, optimizer)
    with pytest.raises(ValueError, match="pass the module itself"):
        tracker_of(prepared, stepping, tmp_path / "t")
