"""Which steps matter: rankings, the decomposition that keeps only some steps (§4.2, G.2), and what checkpoints far
apart leave out of the first moment (Remark F.3)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from explaind_track.core.checks import require_finite, require_int, require_number, require_one_of, whole_numbers
from explaind_track.core.faithfulness import faithfulness
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.path_integral import Quadrature, require_quadrature
from explaind_track.engine.targets import fitted_query, target_of
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
    require_one_of("by=", by, get_args(By))
    require_quadrature(quadrature)
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
        score = partial(_change, model=model, query=fitted_query(model, query))

    source = StepSource.of(steps, model, window)
    every = source.forwards(source.first, source.last)
    numbers, scores = [], []
    for step in tqdm(every, "ranking", len(source) or None, unit="step", disable=not progress):
        numbers.append(step.number)
        scores.append(score(step))
    return xr.DataArray(np.array(scores), {"step": np.array(numbers)}, ("step",), by)


def _size(step: Step) -> float:
    """‖θ_{s+1} − θ_s‖₂, from where the step before has ended."""
    before, after = step.start.parameters, step.after.parameters
    moved = dict.fromkeys((*step.moved, *(step.outside.moved if step.outside is not None else ())))
    return float(sum(float((after[name] - before[name]).double().square().sum()) for name in moved) ** 0.5)


def _change(step: Step, model: nn.Module, query: Query) -> float:
    functional, device = Functional(model), next(iter(step.before.parameters.values())).device
    chunk = query.rows(0, query.size, device)
    with evaluation(model), torch.no_grad():
        before, after = (functional.value(state, target_of(query, chunk)) for state in (step.start, step.after))
    return abs(float((after - before).double().sum()))


def top_steps(scores: xr.DataArray, fraction: float) -> np.ndarray:
    """The numbers of the fraction of steps with the largest scores, in their order. Raises ValueError for a fraction
    outside of 0 to 1."""
    fraction = require_number("fraction", fraction, 0, 1)
    require_finite("the scores", torch.from_numpy(np.asarray(scores.values, dtype=np.float64)))
    count = round(fraction * scores.sizes["step"])
    order = np.argsort(-scores.values, kind="stable")[:count]
    return np.sort(scores["step"].values[order])


def sparse_prediction(influence: Influence, steps: Sequence[int] | np.ndarray) -> xr.DataArray:
    """Predicts by the decomposition that keeps only some steps (G.2), with what buffers did in these steps added.

    f'(x) = f_{θ_0}(x) − Σ_{s ∈ steps} (Ψ_s + Ψ_s^reg)(x)

    Args:
        influence: Kept over step, query and output.
        steps: The numbers of the steps that are kept.

    Returns:
        The prediction (query, output).

    Raises:
        ValueError: For an influence that keeps other axes, and for steps that it does not have.

    Example:
        >>> import torch
        >>> from explaind_track import Explainer, Query, StepObserver, resolve_groups
        >>> from explaind_track.analysis import sparse_prediction
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> parameters = dict(model.named_parameters())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> observer, groups = StepObserver(optimizer, parameters), resolve_groups(None, parameters)
        >>> explainer = Explainer(model, Query.outputs(x), groups, [("step", "query", "output")])
        >>> for number in range(4):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     observer.before({})
        ...     optimizer.step()
        ...     _ = explainer.add(observer.after(number, {}))
        >>> (influence,) = explainer.results()
        >>> kept = sparse_prediction(influence, [0, 1, 2, 3])
        >>> torch.allclose(torch.from_numpy(kept.values), model(x), atol=1e-5)
        True
    """
    _require_single_steps(influence)
    kept = whole_numbers("steps", steps, some=False)
    lacking = sorted(set(kept) - set(influence.data["step"].values.tolist()))
    if lacking:
        raise ValueError(f"the influence does not have the steps {lacking[:10]}")

    total, buffers = (values.sel(step=kept).sum("step") for values in (influence.total(), influence.data["buffers"]))
    return (influence.data["initial"] - total + buffers).rename("sparse_prediction")


def accuracy_curve(influence: Influence, scores: xr.DataArray, fractions: Sequence[float]) -> xr.Dataset:
    """Measures how well the decomposition that keeps only the top steps stands for the model (Fig. 8).

    Args:
        influence: Kept over step, query and output; the outputs score classes.
        scores: Of the steps, as `step_scores` gives them.
        fractions: Of the steps that are kept, each between 0 and 1.

    Returns:
        `agreement` with the model's decisions and `kl` of its outputs, as `Influence.faithfulness`; both (fraction).

    Raises:
        ValueError: For an influence that keeps other axes, and for fractions outside of 0 to 1.

    Example:
        >>> import torch
        >>> from explaind_track import Explainer, Query, StepObserver, resolve_groups
        >>> from explaind_track.analysis import accuracy_curve
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> parameters = dict(model.named_parameters())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> observer, groups = StepObserver(optimizer, parameters), resolve_groups(None, parameters)
        >>> explainer = Explainer(model, Query.outputs(x), groups, [("step", "query", "output"), ("step",)])
        >>> for number in range(4):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     observer.before({})
        ...     optimizer.step()
        ...     _ = explainer.add(observer.after(number, {}))
        >>> influence, of_steps = explainer.results()
        >>> curve = accuracy_curve(influence, of_steps.total_importance().sum("part"), [0.0, 0.5, 1.0])
        >>> bool(curve["kl"].sel(fraction=0.0) > curve["kl"].sel(fraction=1.0))
        True
    """
    _require_single_steps(influence)
    model = torch.from_numpy(influence.data["final"].values)
    found = []
    for fraction in fractions:
        kept = sparse_prediction(influence, top_steps(scores, fraction)).transpose("query", "output")
        found.append(faithfulness(model, torch.from_numpy(kept.values)))

    variables = {name: ("fraction", [values[name] for values in found]) for name in ("agreement", "kl")}
    return xr.Dataset(variables, {"fraction": np.array(fractions)})


def _require_single_steps(influence: Influence) -> None:
    """Raises ValueError unless the influence tells of every step's part in every prediction."""
    if "initial" not in influence.data or "step" not in influence.kept:
        raise ValueError(
            f"a sparse decomposition needs keep=('step', 'query', 'output'), this one kept {influence.kept}"
        )


def extrapolate_first_moment(explicit: xr.DataArray, beta: float, steps: int) -> xr.DataArray:
    """Extrapolates what a batch does through momentum, where the steps after its own are not recorded (Remark F.3).

    An estimate: exact where preconditioner, learning rate and test features stay the same over these steps.

    Args:
        explicit: The influence of the batch through its own step alone, over any axes.
        beta: β of the first moment, 0 ≤ β < 1.
        steps: How many steps to count, its own among them; at least 1.

    Returns:
        The influence within so many steps: `explicit` times 1 + β + … + β^{steps−1}.

    Raises:
        ValueError: For β and steps outside of these.

    Example:
        >>> import xarray as xr
        >>> from explaind_track.analysis import extrapolate_first_moment
        >>> explicit = xr.DataArray([1.0, -2.0], dims="sample")
        >>> extrapolate_first_moment(explicit, beta=0.5, steps=3).values.tolist()
        [1.75, -3.5]
    """
    steps, beta = require_int("steps", steps, 1), require_number("beta", beta, 0)
    if not beta < 1:
        raise ValueError(f"beta is below 1, not {beta}")
    return explicit * ((1 - beta**steps) / (1 - beta))
