"""Influence and importance of every single parameter: Ψ_S(θ) and Ψ̄_S(θ), by which the paper prunes (§4.1)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from explaind_track.core.checks import require_int
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query, require_query
from explaind_track.core.step import Step
from explaind_track.core.tensors import cuts, explained_bytes, upcast
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import Quadrature, require_quadrature
from explaind_track.engine.targets import fitted_query, kept_targets, output_count, some_outputs
from explaind_track.explanation.step_source import StepSource, Window
from explaind_track.record.trajectory import Trajectory


class ParameterScores:
    """Takes steps one by one and sums `φ_s^test(x)_{j,θ} part_{s,θ}` for every parameter and target.

    One reverse pass for each target and node, and one copy of the parameters for each target.
    """

    def __init__(
        self,
        model: nn.Module,
        query: Query,
        part: str = "kernel",
        quadrature: Quadrature | None = None,
        memory: int = MEMORY,
        *,
        apart: bool = False,
    ) -> None:
        """apart: keep the targets apart; else they are summed first."""
        kept = query if apart else kept_targets(query, ())
        self.part = part
        self._features = Features(Functional(model), kept, memory)
        self._integrator = Integrator(model, query, {"all": []}, (part,), quadrature, memory)
        self.rows: dict[str, Tensor] = {}
        """By parameter, (targets, *shape); nothing for those that no step has moved."""

    def add(self, step: Step) -> None:
        """Takes one step in. Raises ValueError if it does not have the part."""
        change = step.outside if self.part == "outside" else step
        if change is None or not change.moved:
            return
        self._integrator.parts(step)  # raises for one that there is not
        if self.part not in change.parts:
            return  # such as the past of a run that was watched from its first step on
        for name, value in self._features.of(change, self._integrator.path(change)).items():
            value *= change.parts[self.part][name]
            if name in self.rows:
                self.rows[name] += value
            else:
                self.rows[name] = value


def parameter_scores(
    steps: Trajectory | Iterable[Step],
    model: nn.Module,
    query: Query,
    *,
    window: Window | None = None,
    part: str = "kernel",
    importance: bool = False,
    quadrature: Quadrature | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Scores every parameter by its influence Ψ_S(θ) on the query over a window of steps S (§4.1).

    The score is signed, and of the sum of the query's targets. Summed over a group's parameters, it is the group's.

    Args:
        steps: As in `explain`; they have to last where the importance takes several passes.
        model: The module that was trained.
        query: Whose targets are scored on: X inputs (or one reduction of them) with O outputs each.
        window: `(first, last)`, steps first ≤ s < last; None: all.
        part: "kernel", "regularization", or another of a step's parts.
        importance: Ψ̄_S(θ) = Σ_x Σ_j |Ψ_S(θ, x)_j| instead, which takes one copy of the parameters for each target in
            flight, and so goes through the steps once for every chunk of targets that `memory` holds.
        quadrature: As in `explain`.
        memory: Bytes one pass may take.
        progress: Show a bar.

    Returns:
        Scores by parameter, each of its parameter's shape.

    Raises:
        ValueError: For a window outside of the run, a model that is not the one trained, a part that there is not, a
            query that cannot be differentiated, and steps that have to last and do not.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory
        >>> from explaind_track.analysis import parameter_scores
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(3):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.cross_entropy(model(x), y).backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     scores = parameter_scores(Trajectory.open(directory), model, Query.loss(x, y), progress=False)
        >>> {name: tuple(score.shape) for name, score in scores.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> bool(sum(score.sum() for score in scores.values()) > 0)  # it is subtracted: the loss fell
        True
    """
    require_query(query)
    require_quadrature(quadrature)
    memory = require_int("memory= (bytes)", memory, 1)
    source = StepSource.of(steps, model, window)
    query = fitted_query(model, query)
    chunks = _target_chunks(model, query, memory) if importance else [query]
    if len(chunks) > 1:
        source = source.repeatable()

    total = {name: torch.zeros_like(upcast(value.detach())) for name, value in parameters_of(model).items()}
    count = len(source) * len(chunks) or None
    with tqdm(desc="scores", unit="step", total=count, disable=not progress) as bar:
        for chunk in chunks:
            scores = ParameterScores(model, chunk, part, quadrature, memory, apart=importance)
            for step in source.forwards(source.first, source.last):
                scores.add(step)
                bar.update()
            for name, rows in scores.rows.items():
                total[name] += (rows.abs() if importance else rows).sum(0)
    return total


def _target_chunks(model: nn.Module, query: Query, memory: int) -> list[Query]:
    """The query's targets, as many at a time as may be kept apart."""
    parameters = parameters_of(model)
    device = next(iter(parameters.values())).device
    copies = max(1, memory // (2 * explained_bytes(parameters)))
    outputs = output_count(model, query)

    # all outputs of some rows where they fit, else some outputs of one row; a reduced query has one row
    some = min(outputs, copies)
    rows = query.size if query.reduction else max(1, copies // some)
    chunks: list[Query] = []
    for inputs in cuts(0, query.size, rows):
        chunk = query if query.reduction else query.rows(inputs.start, inputs.stop, device)
        chunks += [chunk] if some == outputs else [some_outputs(chunk, o.start, o.stop) for o in cuts(0, outputs, some)]
    return chunks
