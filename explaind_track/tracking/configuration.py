"""What was asked of a Tracker, as W&B's configuration of the run has it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from explaind_track.core.groups import Groups
from explaind_track.core.queries import Query
from explaind_track.engine.path_integral import Quadrature


def configuration(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    queries: Mapping[str, Query],
    quadrature: Quadrature,
    every: int,
    samples_every: int | None,
) -> dict[str, Any]:
    """Groups, queries, quadrature and intervals by name, and the plain settings of the optimizer's first group."""
    settings = optimizer.param_groups[0].items()
    return {
        "groups": {name: list(members) for name, members in groups.items()},
        "queries": {name: {"targets": len(query), "loss": query.is_loss} for name, query in queries.items()},
        "quadrature": asdict(quadrature),
        "optimizer": {
            "class": type(optimizer).__name__,
            **{key: value for key, value in settings if isinstance(value, int | float | bool | tuple)},
        },
        "every": every,
        "samples_every": samples_every,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
