"""A run as people have them, killed at random: what goes on is, bit for bit, the run that was never killed.

It has an LSTM, dropout, amsgrad, accumulation, clipping and a loader with a worker.
"""

import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import in_child
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from explaind_track import Query, Tracker, Trajectory
from explaind_track.record.history import read_rows

STEPS, MICRO_BATCHES = 11, 2


class Reader(nn.Module):
    """An LSTM that classifies sequences by its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(x)
        return self.head(self.dropout(states[:, -1]))  # type: ignore[no-any-return]


def micro_batches(first: int) -> list[list[int]]:
    """The samples of each micro-batch from step `first` on: the loop's own order, that of an epoch after the other."""
    order: list[int] = []
    while len(order) < 4 * MICRO_BATCHES * STEPS:
        order += torch.randperm(20, generator=torch.Generator().manual_seed(len(order))).tolist()
    return [order[begin : begin + 4] for begin in range(4 * MICRO_BATCHES * first, 4 * MICRO_BATCHES * STEPS, 4)]


def train(directory: Path) -> Tracker:
    """Trains to the end, from wherever the record ends."""
    warnings.simplefilter("ignore")  # of the steps that are lost, and of the LSTM's derivatives
    torch.manual_seed(0)
    model, x, y = Reader(), torch.randn(20, 5, 3), torch.arange(20) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1, amsgrad=True)
    query = {"query": Query.outputs(x[:3], y[:3])}
    tracker = Tracker(model, optimizer, queries=query, trajectory=directory, keyframe_every=4, resume=True)
    if tracker.number == STEPS:
        tracker.finish()
        return tracker

    loader = DataLoader(
        TensorDataset(torch.arange(20), x, y),
        batch_sampler=micro_batches(tracker.number),
        num_workers=1,
        generator=torch.Generator(),  # else it draws a seed from the generator that dropout draws from
    )
    batches = iter(loader)
    while tracker.number < STEPS:
        with tracker.step():
            optimizer.zero_grad()
            for _ in range(MICRO_BATCHES):
                index, inputs, labels = next(batches)
                tracker.batch((inputs, labels), index=index, weight=1 / 8)
                (nn.functional.cross_entropy(model(inputs), labels) / MICRO_BATCHES).backward()
            tracker.clip_grad_norm_(0.1)
            optimizer.step()
    tracker.finish()
    return tracker


def content(directory: Path, tracker: Tracker) -> dict[str, Any]:
    """All that is to be the same: weights, the optimizer's state, every step's parts, rows, influences."""
    steps = []
    for step in Trajectory.open(directory).steps():
        parts = {f"{part} {name}": v.tolist() for part in step.parts for name, v in step.parts[part].items()}
        steps.append({**parts, "index": [batch.index.tolist() for batch in step.batches]})
    rows = [{k: v for k, v in row.items() if not k.startswith("cost/")} for row in read_rows(directory)]
    states = tracker.optimizer.state_dict()["state"]
    return {
        "weights": {name: value.tolist() for name, value in tracker.model.state_dict().items()},
        "states": {place: {key: value.tolist() for key, value in state.items()} for place, state in states.items()},
        "steps": steps,
        "rows": rows,
        "influence": tracker.influence("query").data.to_dict(),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """The run that is never killed, and the seconds that it takes."""
    directory, started = tmp_path_factory.mktemp("whole") / "t", time.perf_counter()
    tracker = train(directory)
    return content(directory, tracker), time.perf_counter() - started


def survive(directory: Path, whole: tuple[dict[str, Any], float], chance: random.Random, kills: int) -> None:
    wanted, seconds = whole
    for _ in range(kills):
        child = in_child(lambda: train(directory))
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = content(directory, train(directory))
    for what, value in wanted.items():
        assert found[what] == value, what


def test_a_killed_run_is_the_one_that_never_was(tmp_path: Path, whole: tuple[dict[str, Any], float]) -> None:
    survive(tmp_path / "t", whole, random.Random(1), 2)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path, whole: tuple[dict[str, Any], float]) -> None:
    chance, kills = random.Random(2), 0
    while kills < 200:
        count = chance.randint(1, 3)
        survive(tmp_path / f"{kills}", whole, chance, count)
        kills += count
