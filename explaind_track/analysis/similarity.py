"""Similarity of two predictions: the paper's definition, and what its figures plot, under a name of its own.

`similarity` is the cosine of two predictions' whole tensors of influences (§4). The tensors are never made:

    Σ_{s,θ,k,j} ψ(s,θ,k,x)_j ψ(s,θ,k,x')_j = Σ_{s,θ,j} φ_s^test(x)_{j,θ} φ_s^test(x')_{j,θ} Σ_k φ_s^train(k)_θ²

`sample_cosine` is the cosine of two rows of the influences summed over steps and parameters, over the training samples.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from explaind_track.core.checks import require_int
from explaind_track.core.groups import Groups, GroupSpec, resolve_groups
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query, require_query
from explaind_track.core.step import Step
from explaind_track.core.tensors import Tensors, cuts, explained_bytes
from explaind_track.core.update import Update
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import Quadrature, require_quadrature
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.engine.targets import fitted_query, output_count, some_outputs
from explaind_track.explanation.sample_axis import Array, Data, SampleAxis, choose_samples, chosen_rows
from explaind_track.explanation.step_source import RepeatableSteps, StepSource, Window
from explaind_track.record.trajectory import Trajectory


def similarity(
    steps: Trajectory | Iterable[Step],
    model: nn.Module,
    query: Query,
    *,
    sample_loss: SampleLoss,
    data: Data | None = None,
    groups: GroupSpec = None,
    window: Window | None = None,
    samples: Iterable[int | str] | None = None,
    quadrature: Quadrature | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> xr.DataArray:
    """Compares the predictions for every two inputs: Sim_{S,Θ,X,J}(x, x') of §4, for each group of parameters Θ.

    Needs every sample's own momentum, N times the parameters, of which `memory` bytes are held at a time; each such
    chunk of samples goes through the steps once.

    Args:
        steps: As in `explain`, but that a stream's steps have to last.
        model: The module that was trained.
        query: J are its outputs; not reduced, since its X inputs are what is compared.
        sample_loss: `(model, batch)` → unreduced losses (N,).
        data: From an index tensor (N,) to the batch that `sample_loss` takes; not needed where the trajectory holds the
            batches themselves.
        groups: As in `explain`; {"all": "*"} for all parameters together.
        window: S, `(first, last)`, steps first ≤ s < last; None: all.
        samples: The training indices to sum over; None: all.
        quadrature: As in `explain`.
        memory: Bytes one pass may take.
        progress: Show a bar.

    Returns:
        Cosines (group, query, other): symmetric, 1 on the diagonal, positive semi-definite; NaN where a prediction has
        no influence at all.

    Raises:
        ValueError: As `explain` does, and for a query that is reduced.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory
        >>> from explaind_track.analysis import similarity
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(3):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x, y), index=torch.arange(8))
        ...             loss(model, (x, y)).mean().backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     found = similarity(
        ...         Trajectory.open(directory), model, Query.outputs(x[:4]), sample_loss=loss,
        ...         data=lambda index: (x[index], y[index]), groups={"all": "*"}, progress=False,
        ...     )
        >>> dict(found.sizes)
        {'group': 1, 'query': 4, 'other': 4}
        >>> found.sel(group="all").values.diagonal().round(6).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    require_query(query)
    if query.reduction:
        raise ValueError(f"similarity compares inputs, but the query is reduced to its {query.reduction}")
    require_quadrature(quadrature)
    memory = require_int("memory= (bytes)", memory, 1)
    source = StepSource.of(steps, model, window).repeatable()
    query = fitted_query(model, query)
    chosen = choose_samples(source, sample_loss, data, samples)
    resolved = resolve_groups(groups, model)

    # as many samples, outputs and steps at a time as the memory holds
    bytes_each = explained_bytes(parameters_of(model))
    at_once = max(1, memory // (4 * bytes_each))
    outputs = output_count(model, query)
    each = max(1, min(outputs, memory // (3 * query.size * bytes_each)))
    some = [query if each == outputs else some_outputs(query, o.start, o.stop) for o in cuts(0, outputs, each)]
    features = [Features(Functional(model), part, memory) for part in some]
    integrator = Integrator(model, query, resolved, (), quadrature, memory)
    pieces = cuts(source.first, source.last, at_once)

    products = torch.zeros(len(resolved), query.size, query.size, dtype=torch.float64)
    total = len(pieces) * -(-len(chosen.labels) // at_once) * len(source)
    with tqdm(desc="similarity", unit="step", total=total, disable=not progress) as bar:
        for piece in pieces:
            weights = _squares(source, piece, model, chosen, at_once, memory, bar)
            for step in source.forwards(piece.start, piece.stop):
                if not step.updates:
                    continue
                nodes = integrator.path(step)
                for feature in features:
                    _add_products(products, feature.of(step, nodes), weights[step.number], resolved)

    size = np.arange(query.size)
    labels = {"group": np.array(list(resolved), dtype=object), "query": size, "other": size}
    return xr.DataArray(_normalized(products.numpy()), labels, ("group", "query", "other"), "similarity")


def _add_products(products: Tensor, features: Tensors, weights: Tensors, groups: Groups) -> None:
    """Adds Σ_{θ,j} φ_s^test(x)_{j,θ} φ_s^test(x')_{j,θ} w_θ of one step to (group, x, x').

    features: φ_s^test by parameter, (x·O, *shape); weights: w, the squares that all samples make, of its shape.
    """
    queries = products.shape[1]
    for group, names in enumerate(groups.values()):
        for name in names:
            if name in features:
                scaled = features[name] * weights[name].sqrt()
                flat = scaled.reshape(queries, -1)
                products[group] += (flat @ flat.T).double().cpu()


def _squares(
    source: RepeatableSteps,
    piece: slice,
    model: nn.Module,
    samples: SampleAxis,
    at_once: int,
    memory: int,
    bar: tqdm,
) -> dict[int, dict[str, Tensor]]:
    """Σ_k φ_s^train(k)_θ² by parameter, for each step of the piece."""
    per_sample = PerSampleGradients(model, samples.loss, memory)
    total: dict[int, dict[str, Tensor]] = {}
    start = source.reach(piece.start, piece.stop, memory)
    for chunk in cuts(0, len(samples.labels), at_once):
        momentum: dict[str, Tensor] = {}
        for step in source.forwards(start, piece.stop):
            gradients = _own_gradients(step, samples, chunk, per_sample)
            squares = {
                name: _train_features(name, update, gradients, momentum).square_().sum(0)
                for name, update in step.updates.items()
            }
            bar.update()
            if step.number < piece.start:  # momentum alone leads from there into the piece
                continue

            known = total.setdefault(step.number, {})
            for name, square in squares.items():
                known[name] = known[name] + square if name in known else square
    return total


def _own_gradients(step: Step, samples: SampleAxis, chunk: slice, per_sample: PerSampleGradients) -> dict[str, Tensor]:
    """`Σ w_k ∇L_k(θ_s)` of each of the chunk's samples, (n, *shape), 0 for those that the step did not see."""
    result = {
        name: update.before.new_zeros(chunk.stop - chunk.start, *update.before.shape)
        for name, update in step.updates.items()
    }
    for batch, places, _ in samples.batches(step):
        mine = (places >= chunk.start) & (places < chunk.stop)
        if not bool(mine.any()):
            continue
        if not bool(mine.all()) and per_sample.stands_alone(step.before, batch):
            batch, places, mine = chosen_rows(batch, mine), places[mine], mine[mine]

        for rows, gradients in per_sample.gradients(step.before, batch):
            here = mine[rows].nonzero()[:, 0]
            where = places[rows][here] - chunk.start
            for name, total in result.items():
                if step.updates[name].frozen:
                    continue
                weight = batch.weights(total)[rows][here] * step.updates[name].sign
                total.index_add_(0, where, gradients[name][here] * weight.reshape(-1, *[1] * (total.ndim - 1)))
    return result


def _train_features(name: str, update: Update, gradients: Tensors, momentum: dict[str, Tensor]) -> Tensor:
    """φ_s^train(k) of the chunk's samples, (n, *shape); moves their momentum on by a step."""
    rule, gradient = update.rule, gradients[name]
    if rule.buffer is None:
        return update.precondition(gradient * rule.d)

    # M_s = β M_{s−1} + b Q ∇L_k, then P (e M_s + d ∇L_k)
    entered = update.into_buffer(gradient.clone())
    momentum[name] = entered.add_(momentum[name], alpha=rule.beta) if name in momentum else entered
    return update.precondition((momentum[name] * rule.e).add_(gradient, alpha=rule.d))


def sample_cosine(influence: xr.DataArray) -> xr.DataArray:
    """Compares queries by the cosine of their rows of influences over the training samples (Fig. 5 and 13).

    Args:
        influence: Ψ_S(Θ_g, x_k, x), with axes `query` and `sample`, as in `explain(…, keep=("group", "query",
            "sample")).data["influence"]`; any other axes stay.

    Returns:
        Cosines (…, query, other), NaN for rows that are 0. Rows that are 0 by mathematics only, and rounding in truth,
        cannot be told from small ones: theirs are the cosines of rounding.

    Raises:
        ValueError: Without the axes `query` and `sample`.

    Example:
        >>> import numpy as np, xarray as xr
        >>> from explaind_track.analysis import sample_cosine
        >>> influence = xr.DataArray(np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), dims=("query", "sample"))
        >>> sample_cosine(influence).values.round(3).tolist()
        [[1.0, 0.6, nan], [0.6, 1.0, nan], [nan, nan, nan]]
    """
    lacking = {"query", "sample"} - set(influence.dims)
    if lacking:
        raise ValueError(f"cosines over samples need the axes query and sample; this influence has {influence.dims}")
    others = [axis for axis in influence.dims if axis not in ("query", "sample")]
    rows = influence.transpose(*others, "query", "sample").values.astype(np.float64)
    cosines = _normalized(np.einsum("...ik,...jk->...ij", rows, rows, optimize=True))

    labels: dict[Hashable, Any] = {axis: influence[axis].values for axis in others if axis in influence.coords}
    queries = influence["query"].values if "query" in influence.coords else np.arange(rows.shape[-2])
    labels |= {"query": queries, "other": queries}
    return xr.DataArray(cosines, labels, (*others, "query", "other"), "sample_cosine")


def _normalized(products: Array) -> Array:
    """Cosines from inner products (…, X, X)."""
    sizes = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: Array = products / (sizes[..., :, None] * sizes[..., None, :])
    return cosines
