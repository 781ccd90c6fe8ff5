"""The steps of a run, the last one first, each with the optimizer's state before it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.step import Step
from explaind_track.core.tensors import Tensors
from explaind_track.record.schema import StepRecord
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.retraining import records


@dataclass(frozen=True)
class Snapshot:
    """A step, in tensors of its own."""

    step: Step
    """Its `before` and its batches; without updates."""
    after: Tensors
    """The parameters behind it."""
    states: Mapping[str, Mapping[str, Any]]
    """The optimizer's state before it, by parameter; empty before a parameter's first step."""
    settings: Mapping[str, tuple[int, Mapping[str, Any]]]
    """By parameter: its group's place among the optimizer's groups, and the group's settings."""
    record: StepRecord
    optimizer: torch.optim.Optimizer


def snapshots_back(trajectory: Trajectory, first: int, last: int, memory: int) -> Iterator[Snapshot]:
    """The steps last > s ≥ first in this order. Replays piece by piece: from a keyframe to the next at most, and no
    more at once than fit into `memory`, in bytes; one step in any case."""
    sizes = {entry.first: entry.size for entry in trajectory.manifest.entries if entry.is_keyframe}
    stop = last
    while stop > first:
        start = trajectory.keyframe(stop - 1)
        begin = max(start, first, stop - max(1, memory // sizes[start]))
        held = list(_forwards(trajectory, begin, stop))
        while held:
            yield held.pop()  # so that it is freed once it has served
        stop = begin


def _forwards(trajectory: Trajectory, first: int, last: int) -> Iterator[Snapshot]:
    replay = trajectory.replay(first)
    for kept in records(trajectory, first, last):
        record = trajectory.complete(replay, kept)
        states = {
            name: {key: _copied(value) for key, value in replay.optimizer.state.get(parameter, {}).items()}
            for name, parameter in replay.parameters.items()
        }
        step = replay.take(record)
        taken = replace(step, before=step.before.copy(), after=step.before, updates={}, outside=None)
        after = {name: parameter.detach().clone() for name, parameter in replay.parameters.items()}
        settings = {name: (place, group) for place, group in enumerate(record.settings) for name in group["params"]}
        yield Snapshot(taken, after, states, settings, record, replay.optimizer)
        replay.settle()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
