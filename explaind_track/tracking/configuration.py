"""What was asked of a Tracker, as W&B's configuration of the run has it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from explaind_track.core.queries import Query

if TYPE_CHECKING:
    from explaind_track.tracking.tracker import Tracker


def configuration(tracker: "Tracker", queries: Mapping[str, Query]) -> dict[str, Any]:
    """Groups, queries, quadrature and intervals by name, and the plain settings of the optimizer's first group."""
    settings = tracker.optimizer.param_groups[0].items()
    return {
        "groups": {name: list(members) for name, members in tracker.groups.items()},
        "queries": {name: {"targets": len(query), "loss": query.is_loss} for name, query in queries.items()},
        "quadrature": asdict(tracker.quadrature),
        "optimizer": {
            "class": type(tracker.optimizer).__name__,
            **{key: value for key, value in settings if isinstance(value, int | float | bool | tuple)},
        },
        "every": tracker.every,
        "samples_every": tracker.samples_every,
        "parameters": sum(parameter.numel() for parameter in tracker.model.parameters()),
    }
