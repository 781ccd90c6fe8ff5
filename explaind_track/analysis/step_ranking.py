"""Which steps matter: rankings, the decomposition that keeps only some steps (§4.2, G.2), and what checkpoints far
apart leave out of the first moment (Remark F.3)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

from explaind_track.core.faithfulness import faithfulness
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.targets import target_of
from explaind_track.explanation.explain import explain
from explaind_track.explanation.step_source import StepSource, Window
from explaind_track.record.trajectory import Trajectory

By = Literal["loss", "size", "influence"]


def step_scores(
    steps: Trajectory | Iterable[Step],
    model: nn.Module,
    query: Query | None = None,
    *,
    by: By = "loss",
    window: Window | None = None,
    quadrature: Quadrature | None = None,
    progress: bool = True,
) -> xr.DataArray:
    """Scores every step, to rank them by.

    Args:
        steps: As in `explain`.
        model: The module that was trained.
        query: What the steps are scored on; not needed for their size.
        by: "loss", the absolute change of the query's summed targets (its loss, held out: G.2); "size",
            ‖θ_{s+1} − θ_s‖₂; "influence", the importance of all parameters and parts together on the query.
        window: `(first, last)`, steps first ≤ s < last; None: all.
        quadrature: Of the influence; None: one node for each step.
        progress: Show a bar.

    Returns:
        The scores (step), called as they are ranked.

    Raises:
        ValueError: Without a query where one is needed, for a ranking that there is not, and as `explain` does.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory
        >>> from explaind_track.analysis import step_scores
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(4):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.cross_entropy(model(x), y).backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     scores = step_scores(Trajectory.open(directory), model, Query.loss(x, y), progress=False)
        >>> int(scores.idxmax("step"))  # plain gradient descent slows down
        0
    """
    if by not in get_args(By):
        raise ValueError(f"steps are ranked by one of {get_args(By)}, not by={by!r}")
    score: Callable[[Step], float]
    if by == "size":
        score = _size
    elif query is None:
        raise ValueError(f"steps are ranked by {by} on a query: pass one, such as Query.loss(x, y)")
    elif by == "influence":
        rule = quadrature or Quadrature.fixed(1)
        found = explain(steps, model, query, keep=("step",), window=window, quadrature=rule, progress=progress)
        return found.total_importance().sum("part").rename("influence")
    else:
        score = partial(_change, model=model, query=query)

    source = StepSource.of(steps, model, window)
    every = source.forwards(source.first, source.last)
    numbers, scores = [], []
    for step in tqdm(every, "ranking", len(source) or None, unit="step", disable=not progress):
        numbers.append(step.number)
        scores.append(score(step))
    return xr.DataArray(np.array(scores), {"step": np.array(numbers)}, ("step",), by)


def _size(step: Step) -> float:
    before, after = step.before.parameters, step.after.parameters
    return float(sum(float((after[name] - before[name]).double().square().sum()) for name in step.updates) ** 0.5)


def _change(step: Step, model: nn.Module, query: Query) -> float:
    functional, device = Functional(model), next(iter(step.before.parameters.values())).device
    chunk = query.rows(0, query.size, device)
    with evaluation(model), torch.no_grad():
        before, after = (functional.value(state, target_of(query, chunk)) for state in (step.before, step.after))
    return abs(float((after - before).double().sum()))


def top_steps(scores: xr.DataArray, fraction: float) -> np.ndarray:
    """The numbers of the fraction of steps with the largest scores, in their order."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is between 0 and 1, not {fraction}")
    count = round(fraction * scores.sizes["step"])
    order = np.argsort(-scores.values, kind="stable")[:count]
    return np.sort(scores["step"].values[order])


def sparse_prediction(influence: Influence, steps: Sequence[int] | np.ndarray) -> xr.DataArray:
    """f'(x) = f_{θ_0}(x) − Σ_{s ∈ steps} (Ψ_s + Ψ_s^reg)(x), with what buffers did in these steps added: the
    decomposition that keeps only some steps (G.2), (query, output).

    influence: kept over step, query and output. Raises ValueError otherwise, and for steps that it does not have.
    """
    if "initial" not in influence.data or "step" not in influence.kept:
        raise ValueError(
            f"a sparse decomposition needs keep=('step', 'query', 'output'), this one kept {influence.kept}"
        )
    lost = sorted({int(step) for step in steps} - set(influence.data["step"].values.tolist()))
    if lost:
        raise ValueError(f"the influence does not have the steps {lost[:10]}")
    total, buffers = (
        values.sel(step=list(steps)).sum("step") for values in (influence.total(), influence.data["buffers"])
    )
    return (influence.data["initial"] - total + buffers).rename("sparse_prediction")


def accuracy_curve(influence: Influence, scores: xr.DataArray, fractions: Sequence[float]) -> xr.Dataset:
    """How well the decomposition that keeps the top steps stands for the model, for each fraction kept (Fig. 8):
    `agreement` with its decisions, and `kl` of its outputs, as `Influence.faithfulness`; (fraction)."""
    model = torch.from_numpy(influence.data["final"].values)
    found = []
    for fraction in fractions:
        kept = sparse_prediction(influence, top_steps(scores, fraction)).transpose("query", "output")
        found.append(faithfulness(model, torch.from_numpy(kept.values)))

    variables = {name: ("fraction", [values[name] for values in found]) for name in ("agreement", "kl")}
    return xr.Dataset(variables, {"fraction": np.array(fractions)})


def extrapolate_first_moment(explicit: xr.DataArray, beta: float, steps: int) -> xr.DataArray:
    """All that a batch does within `steps` steps (its own among them), from its influence through its own step, where
    the others are not recorded: that times 1 + β + … + β^{steps−1} (Remark F.3).

    An estimate: exact where preconditioner, learning rate and test features stay the same over these steps. Raises
    ValueError unless 0 ≤ β < 1 and steps ≥ 1.
    """
    if not 0 <= beta < 1 or steps < 1:
        raise ValueError(f"expected 0 <= beta < 1 and steps >= 1, got beta={beta}, steps={steps}")
    return explicit * ((1 - beta**steps) / (1 - beta))
