"""Influence and importance of every single parameter: Ψ_S(θ) and Ψ̄_S(θ), by which the paper prunes (§4.1)."""

from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.core.tensors import size_in_bytes
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.integrator import MEMORY, Integrator
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.targets import check_query, kept_targets, output_count, some_outputs

if TYPE_CHECKING:
    from explaind_track.record.trajectory import Trajectory


class ParameterScores:
    """Takes steps one by one and sums `φ_s^test(x)_{j,θ} part_{s,θ}` for every parameter and target.

    One reverse pass for each target and node, and one copy of the parameters for each target.
    """

    def __init__(
        self, model: nn.Module, query: Query, part: str = "kernel", quadrature: Quadrature | None = None,
        memory: int = MEMORY, *, apart: bool = False,
    ) -> None:  # fmt: skip
        """apart: keep the targets apart; else they are summed first."""
        kept = query if apart else kept_targets(query, ())
        self.part = part
        self._features = Features(Functional(model), kept, memory)
        self._integrator = Integrator(model, query, {"all": []}, (part,), quadrature, memory)
        self.rows: dict[str, Tensor] = {}
        """By parameter, (targets, *shape); nothing for those that no step has moved."""

    def add(self, step: Step) -> None:
        if not step.updates:
            return
        self._integrator.parts(step)  # raises for one that there is not
        for name, value in self._features.of(step, self._integrator.nodes(step)).items():
            value *= step.parts[self.part][name]
            if name in self.rows:
                self.rows[name] += value
            else:
                self.rows[name] = value


def parameter_scores(
    steps: "Trajectory | Iterable[Step]",
    model: nn.Module,
    query: Query,
    *,
    window: tuple[int, int] | None = None,
    part: str = "kernel",
    importance: bool = False,
    quadrature: Quadrature | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Ψ_S(θ) of every parameter, of its shape: the signed influence on the sum of the query's targets over a window of
    steps S (None: all). Summed over a group's parameters, it is the group's.

    importance: Ψ̄_S(θ) = Σ_x Σ_j |Ψ_S(θ, x)_j| instead, which takes one copy of the parameters for each target in
                flight, and so goes through the trajectory once for every chunk of them that `memory` bytes hold.
    part:       "kernel", "regularization", or another of a step's parts.

    Raises ValueError for a window outside of the record, a model that is not the one trained, a part that there is not,
    a query that cannot be differentiated, and importance of steps that can be gone through only once.
    """
    from explaind_track.record.trajectory import Trajectory

    if isinstance(steps, Trajectory):
        steps.check_model(model)
        first, last = window or (0, len(steps))
        source: Iterable[Step] = _Again(steps, first, last)
    elif window is not None:
        raise ValueError("a window is for trajectories; pass the steps that you want")
    else:
        source = steps
    check_query(model, query)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()}
    chunks = list(_chunks(model, query, memory)) if importance else [query]
    if len(chunks) > 1 and iter(source) is source:
        raise ValueError(
            f"the importance takes {len(chunks)} passes over the steps, but these can be gone through only once; pass "
            "the trajectory, a list of lasting steps, or more memory="
        )
    with tqdm(desc="scores", unit="step", total=_length(source, len(chunks)), disable=not progress) as bar:
        for chunk in chunks:
            scores = ParameterScores(model, chunk, part, quadrature, memory, apart=importance)
            for step in source:
                scores.add(step)
                bar.update()
            for name, rows in scores.rows.items():
                total[name] += (rows.abs() if importance else rows).sum(0)
    return total


class _Again:
    """A trajectory's steps, as often as wanted."""

    def __init__(self, trajectory: "Trajectory", first: int, last: int) -> None:
        self._trajectory, self._first, self._last = trajectory, first, last

    def __iter__(self) -> Iterator[Step]:
        return self._trajectory.steps(self._first, self._last)

    def __len__(self) -> int:
        return self._last - self._first


def _length(steps: Iterable[Step], times: int) -> int | None:
    return len(steps) * times if isinstance(steps, Sized) else None


def _chunks(model: nn.Module, query: Query, memory: int) -> Iterator[Query]:
    """The query's targets, as many at a time as may be kept apart."""
    parameters = dict(model.named_parameters())
    copies = max(1, memory // (2 * size_in_bytes(parameters)))
    outputs = output_count(model, query)
    device = next(iter(parameters.values())).device
    some = min(outputs, copies)
    rows = query.size if query.reduction else max(1, copies // some)
    for start in range(0, query.size, rows):
        chunk = query.rows(start, start + rows, device) if not query.reduction else query
        for low in range(0, outputs, some):
            yield chunk if some == outputs else some_outputs(chunk, low, low + some)
