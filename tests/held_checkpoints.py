"""A checkpoint that is held in memory, of a training of any model and optimizer; and a small one, with a question."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import OPTIMIZERS, Make
from torch import Tensor, nn

from explaind_track import Checkpoint, CheckpointSeries, Query


class HeldCheckpoint(Checkpoint):
    """What a run was at one moment."""

    format = "held"

    def __init__(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, make: Callable[..., Any], path: Path
    ) -> None:
        """make: the optimizer of a model."""
        super().__init__(path, step)
        self.parameters = deepcopy(model.state_dict())
        self.state = None if optimizer is None else deepcopy(optimizer.state_dict())
        self.make = make
        self.loaded = 0

    @classmethod
    def find(cls, path: Path) -> tuple["HeldCheckpoint", ...]:
        return ()

    def weights(self) -> dict[str, torch.Tensor]:
        return self.parameters

    def saved_optimizer(self, model: nn.Module) -> None:
        return None

    def load(self, model: nn.Module) -> None:
        self.loaded += 1
        model.load_state_dict(self.parameters)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        if self.state is None:
            return None
        made: torch.optim.Optimizer = self.make(model)
        made.load_state_dict(deepcopy(self.state))
        return made


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 6), nn.Dropout(0.4), nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(x)) * self.frozen))


GENERATOR = torch.Generator().manual_seed(2)
X, Y = torch.randn(9, 4, generator=GENERATOR, dtype=torch.float64), torch.arange(9) % 3
SMALL: dict[str, Any] = {
    "train": (X[:6], Y[:6]),
    "loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
    "query": Query.loss(X[6:], Y[6:]).mean(),
    "microbatch": 4,
    "progress": False,
}


def small(path: Path, make: Make = OPTIMIZERS["adamw"], steps: int = 3) -> tuple[CheckpointSeries, nn.Module]:
    """Checkpoints behind 1, 2 … steps of training, and a model with other weights."""
    torch.manual_seed(0)
    model = Small().double()
    optimizer, checkpoints = make(model), []
    for number in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        checkpoints.append(HeldCheckpoint(number + 1, model, optimizer, make, path))
    return CheckpointSeries(checkpoints), Small().double()


def learning(make: Make) -> Make:
    """Of the parameters that learn: what is frozen belongs to no optimizer."""
    return lambda model: make(nn.ParameterList([p for p in model.parameters() if p.requires_grad]))
