"""Similarity of two predictions: the paper's definition, and what its figures plot, under a name of its own.

`similarity` is the cosine of two predictions' whole tensors of influences (§4). The tensors are never made:

    Σ_{s,θ,k,j} ψ(s,θ,k,x)_j ψ(s,θ,k,x')_j = Σ_{s,θ,j} φ_s^test(x)_{j,θ} φ_s^test(x')_{j,θ} Σ_k φ_s^train(k)_θ²

`sample_cosine` is the cosine of two rows of the influences summed over steps and parameters, over the training samples.
"""

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Step, Update
from explaind_track.core.tensors import cuts, size_in_bytes
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional, SampleLoss
from explaind_track.engine.integrator import MEMORY, Integrator
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.per_sample import SampleProducts
from explaind_track.engine.targets import check_query, output_count, some_outputs
from explaind_track.explanation.sample_axis import Array, Data, SampleAxis
from explaind_track.explanation.step_source import Source, choose_samples, reach, source_of

if TYPE_CHECKING:
    from explaind_track.record.trajectory import Trajectory


def similarity(
    steps: "Trajectory | Iterable[Step]",
    model: nn.Module,
    query: Query,
    *,
    sample_loss: SampleLoss,
    data: Data | None = None,
    groups: GroupSpec = None,
    window: tuple[int, int] | None = None,
    samples: Iterable[int] | None = None,
    quadrature: Quadrature | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> xr.DataArray:
    """Sim_{S,Θ,X,J}(x, x') of every two inputs of the query, for each group Θ; (group, query, other).

    J are the query's outputs, S is the window (None: all steps), X all training samples, or those of `samples`; pass
    groups={"all": "*"} for all parameters together. Arguments as in `explain`. Symmetric, 1 on the diagonal, positive
    semi-definite; NaN where a prediction has no influence at all.

    Needs every sample's own momentum, N times the parameters, of which `memory` bytes are held at a time; each such
    chunk of samples goes through the steps once. Raises ValueError as `explain` does, and for a query that is reduced.
    """
    if query.reduction:
        raise ValueError(f"similarity compares inputs, but the query is reduced to its {query.reduction}")
    source = source_of(steps, model, window)
    check_query(model, query)
    first, last = window or (0, len(source))
    chosen = choose_samples(source, last, sample_loss, data, samples, None)
    resolved = resolve_groups(groups, dict(model.named_parameters()))
    bytes_each = size_in_bytes(dict(model.named_parameters()))
    at_once = max(1, memory // (4 * bytes_each))
    integrator = Integrator(model, query, resolved, (), quadrature, memory)
    products = torch.zeros(len(resolved), query.size, query.size, dtype=torch.float64)
    outputs = output_count(model, query)
    each = max(1, min(outputs, memory // (3 * query.size * bytes_each)))
    some = [query if each == outputs else some_outputs(query, o.start, o.stop) for o in cuts(0, outputs, each)]
    features = [Features(Functional(model), one, memory) for one in some]
    pieces = cuts(first, last, at_once)
    total = len(pieces) * -(-len(chosen.labels) // at_once) * (last - first)
    with tqdm(desc="similarity", unit="step", total=total, disable=not progress) as bar:
        for piece in pieces:
            weights = _squares(source, piece, model, chosen, at_once, memory, bar)
            for step in source.steps(piece.start, piece.stop):
                if not step.updates:
                    continue
                nodes = integrator.nodes(step)
                for feature in features:
                    rows = feature.of(step, nodes)
                    for group, names in enumerate(resolved.values()):
                        for name in names:
                            if name in rows:
                                scaled = rows[name] * weights[step.number][name].sqrt()
                                flat = scaled.reshape(query.size, -1)
                                products[group] += (flat @ flat.T).double().cpu()
    return _cosine(products.numpy(), list(resolved))


def _squares(
    source: Source,
    piece: slice,
    model: nn.Module,
    samples: SampleAxis,
    at_once: int,
    memory: int,
    bar: tqdm,
) -> dict[int, dict[str, Tensor]]:
    """Σ_k φ_s^train(k)_θ² by parameter, for each step of the piece."""
    products = SampleProducts(model, samples.loss, {}, memory)
    total: dict[int, dict[str, Tensor]] = {}
    start = reach(source, piece.start, piece.stop, memory)
    for chunk in cuts(0, len(samples.labels), at_once):
        momentum: dict[str, Tensor] = {}
        for step in source.steps(start, piece.stop):
            own = _own_gradients(step, samples, chunk, products)
            squares = {n: _train_features(n, u, own, momentum).square_().sum(0) for n, u in step.updates.items()}
            bar.update()
            if step.number < piece.start:
                continue
            known = total.setdefault(step.number, {})
            for name, square in squares.items():
                known[name] = known[name] + square if name in known else square
    return total


def _own_gradients(step: Step, samples: SampleAxis, chunk: slice, products: SampleProducts) -> dict[str, Tensor]:
    """`Σ w_k ∇L_k(θ_s)` of each of the chunk's samples, (n, *shape), 0 for those that the step did not see."""
    result = {
        name: update.before.new_zeros(chunk.stop - chunk.start, *update.before.shape)
        for name, update in step.updates.items()
    }
    for batch, places, _ in samples.batches(step):
        mine = (places >= chunk.start) & (places < chunk.stop)
        if not bool(mine.any()):
            continue
        for rows, gradients in products.gradients(step, batch):
            here = mine[rows].nonzero()[:, 0]
            where = places[rows][here] - chunk.start
            for name, total in result.items():
                weight = batch.weights(total)[rows][here] * step.updates[name].sign
                total.index_add_(0, where, gradients[name][here] * weight.reshape(-1, *[1] * (total.ndim - 1)))
    return result


def _train_features(name: str, update: Update, own: dict[str, Tensor], momentum: dict[str, Tensor]) -> Tensor:
    """φ_s^train(k) of the chunk's samples, (n, *shape); moves their momentum on by a step."""
    rule, gradient = update.rule, own[name]
    if rule.buffer is None:
        return update.precondition(gradient * rule.d)
    entered = update.into_buffer(gradient.clone())
    momentum[name] = entered.add_(momentum[name], alpha=rule.beta) if name in momentum else entered
    return update.precondition((momentum[name] * rule.e).add_(gradient, alpha=rule.d))


def sample_cosine(influence: xr.DataArray) -> xr.DataArray:
    """The cosine of two queries' rows of influences over the training samples, as the paper's Fig. 5 and 13 plot it.

    influence: Ψ_S(Θ_g, x_k, x), with axes `query` and `sample` (`explain(keep=("group", "query", "sample")).data[
    "influence"]`); any other axes stay. Returns (…, query, other), NaN for rows that are 0. Raises ValueError without
    these axes.
    """
    lost = {"query", "sample"} - set(influence.dims)
    if lost:
        raise ValueError(f"cosines over samples need the axes query and sample; this influence has {influence.dims}")
    others = [axis for axis in influence.dims if axis not in ("query", "sample")]
    rows = influence.transpose(*others, "query", "sample").values.astype(np.float64)
    result = normalized(np.einsum("...ik,...jk->...ij", rows, rows, optimize=True))
    coordinates: dict[Hashable, Any] = {axis: influence[axis].values for axis in others if axis in influence.coords}
    names = influence["query"].values if "query" in influence.coords else np.arange(rows.shape[-2])
    coordinates |= {"query": names, "other": names}
    return xr.DataArray(result, coordinates, (*others, "query", "other"), "sample_cosine")


def normalized(products: Array) -> Array:
    """Cosines from inner products (…, X, X)."""
    sizes = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: Array = products / (sizes[..., :, None] * sizes[..., None, :])
    return cosines


def _cosine(products: Array, groups: list[str]) -> xr.DataArray:
    size = np.arange(products.shape[-1])
    labels = {"group": np.array(groups, dtype=object), "query": size, "other": size}
    return xr.DataArray(normalized(products), labels, ("group", "query", "other"), "similarity")
