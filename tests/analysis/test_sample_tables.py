"""Samples described and ranked: what tables say is what the model says, and wrong labels come to the top."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import make_job, sample_loss

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain
from explaind_track.analysis import describe_samples, find_mislabelled


def test_samples_are_described_as_the_model_has_them() -> None:
    job = make_job()
    job.model.append(torch.nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    table = describe_samples(job.model, [5, 2], lambda index: (job.x[index], job.y[index]), sample_loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in job.model.modules())

    job.model.eval()
    scores = job.model(job.x[[5, 2]])
    assert table.index.tolist() == [5, 2]
    assert table["label"].tolist() == job.y[[5, 2]].tolist()
    assert table["prediction"].tolist() == scores.argmax(1).tolist()
    assert table["loss"].tolist() == pytest.approx(F.cross_entropy(scores, job.y[[5, 2]], reduction="none").tolist())


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 4),
        (torch.ones(2, 4), torch.ones(2)),
        {"x": torch.ones(2, 4)},
        (torch.ones(2, 4), torch.ones(2, 1)),
    ],
    ids=["inputs", "regression", "mapping", "matrix"],
)
def test_batches_of_another_form_have_no_classes(batch: Any) -> None:
    assert list(describe_samples(make_job().model, [0, 1], lambda _: batch).columns) == []


class TwoInputs(torch.nn.Module):
    """Says its scores as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.linear(x) + shift})()


def test_mappings_with_labels_are_classified_too() -> None:
    model, batch = TwoInputs(), {"x": torch.randn(2, 4), "shift": torch.eye(2, 3) * 100, "labels": torch.tensor([2, 1])}
    table = describe_samples(model, [0, 1], lambda _: batch)
    assert table.values.tolist() == [[2, 0], [1, 1]]
    unfit = {**batch, "other": torch.ones(2)}
    assert list(describe_samples(model, [0, 1], lambda _: unfit).columns) == ["label"]


def test_wrong_labels_come_to_the_top(tmp_path: Path) -> None:
    """60 samples of three separate classes, five of them with another label; learned until all labels are known."""
    torch.manual_seed(0)
    true = torch.arange(60) % 3
    x, y = torch.randn(60, 8) + 4 * F.one_hot(true, 8), true.clone()
    wrong = [3, 17, 28, 40, 55]
    y[wrong] = (y[wrong] + 1) % 3
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3)).double()
    x = x.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    tracker = Tracker(model, optimizer, queries={}, trajectory=tmp_path / "t")
    for index in [torch.arange(start % 60, start % 60 + 20) for start in range(0, 1200, 20)]:
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            optimizer.step()
    tracker.finish()

    trajectory = Trajectory.open(tmp_path / "t")
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": lambda index: (x[index], y[index])}
    found = find_mislabelled(trajectory, model, progress=False, **options)
    assert len(found) == 60
    assert sorted(found["sample"].head(5)) == wrong
    some = find_mislabelled(trajectory, model, samples=[1, 28], progress=False, **options)
    assert some["sample"].tolist() == [28, 1]

    alone = explain(
        trajectory, model, Query.loss(x[[28]], y[[28]]), keep=("sample",), samples=[28], progress=False,
        quadrature=Quadrature.fixed(1), **options,
    )  # fmt: skip
    assert some["own_influence"][0] == pytest.approx(float(alone.data["influence"][0]), rel=1e-9)

    with pytest.raises(ValueError, match="gives other losses"):
        twice = {**options, "sample_loss": lambda model, batch: 2 * sample_loss(model, batch)}
        find_mislabelled(trajectory, model, progress=False, **twice)
    with pytest.raises(ValueError, match="inputs, …, classes"):
        floats = {**options, "data": lambda index: (x[index], y[index].double())}
        find_mislabelled(trajectory, model, progress=False, **floats)
