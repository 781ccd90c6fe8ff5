"""Predictions that steps and queries share: as if each computed its own, in fewer passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query, Tracker
from explaind_track.engine import step_predictions


class Counting(nn.Module):
    """Returns its scores in a dictionary, and counts the passes that give plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.plain += not torch.is_grad_enabled() and not torch._C._functorch.maybe_get_level(x) > 0
        return {"scores": self.layers(x)}


def trained(queries: dict[str, Query]) -> tuple[list[dict[str, Any]], int]:
    torch.manual_seed(0)
    model, rows = Counting().double(), list[dict[str, Any]]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))

    class Kept:
        def write(self, step: int, row: dict[str, Any]) -> None:
            rows.append({key: value for key, value in row.items() if "seconds" not in key})

    tracker = Tracker(model, optimizer, queries=queries, writers=[Kept()])
    before = model.plain
    for _ in range(4):
        with tracker.step():
            optimizer.zero_grad()
            F.cross_entropy(model(x)["scores"], y).backward()
            optimizer.step()
    tracker.finish()
    return rows, model.plain - before


def test_queries_on_the_same_inputs_share_the_models_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    losses = Query.loss(x.clone(), y, lambda output, y: F.cross_entropy(output["scores"], y, reduction="none"))
    queries = {
        "scores": Query.function(x, lambda output: output["scores"]),
        "loss": losses.mean(),
        "elsewhere": Query.function(x + 1, lambda output: output["scores"]).sum(),
    }
    shared, passes = trained(queries)
    monkeypatch.setattr(step_predictions, "_are_same", lambda one, other: False)
    alone, more = trained(queries)
    assert shared == alone
    # the first step's two ends, and one for each of the next three
    assert more - passes == 2 + 3
