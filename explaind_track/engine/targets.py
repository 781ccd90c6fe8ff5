"""What of a query is differentiated: its targets, by chunks, summed over what is not kept, or some of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.queries import Query, require_query
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.step import State
from explaind_track.core.tensors import tree_map, tree_tensors, tree_with, upcast
from explaind_track.engine.derivatives import refuse_reentrant
from explaind_track.engine.functional import Functional, evaluation, writable

FLOAT64_BYTES = 2**24
"""Of a model's output, what goes through the target in float64 at a time."""


def target_of(query: Query, chunk: Query) -> Callable[..., Tensor]:
    """The targets of a chunk of the query, (x, O), of the model or of its output, if that is known; where the query is
    reduced, the chunk's share of them, (1, O)."""
    if query.reduction is None:
        return chunk
    scale = 1.0 if query.reduction == "sum" else 1.0 / query.size
    return lambda model, output=None: chunk(model, output).sum(0, keepdim=True) * scale


def in_float64(query: Query) -> Query:
    """The query with its target computed in float64 from the model's output: of a loss that changes by a thousandth in
    a step, float32's softmax loses the change's fifth digit."""
    target = query.target

    def of_rows(output: Any, labels: tuple[Tensor, ...]) -> Tensor:
        return target(tree_map(_double, output), *labels)

    def of_output(output: Any, *labels: Tensor) -> Tensor:
        first, *others = _pieces((output, labels))
        if not others:
            return of_rows(*first)
        # again on the way back: a vocabulary's scores in float64, several times over, take more than the model
        values = [checkpoint(of_rows, *piece, use_reentrant=False) for piece in (first, *others)]
        return torch.cat(values)

    return replace(query, target=of_output)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _pieces(tree: Any) -> list[Any]:
    """The tree cut into rows that take so little in float64; the tree itself where its tensors have other rows."""
    tensors = tree_tensors(tree)
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    row_bytes = max(1, 8 * sum(tensor.numel() for tensor in tensors) // max(counts, default=1))
    size = max(1, FLOAT64_BYTES // row_bytes)
    if len(counts) != 1 or size >= max(counts):
        return [tree]
    return [tree_with(tree, rows) for rows in zip(*(tensor.split(size) for tensor in tensors), strict=True)]


def kept_targets(query: Query, keep: Sequence[str]) -> Query:
    """The query whose targets are those of `query`, summed over "query" and "output" where they are not kept: for
    influences are linear in the target."""
    if "output" not in keep:
        target = query.target

        def over_outputs(output: Any, *labels: Tensor) -> Tensor:
            value = upcast(target(output, *labels))
            return value.reshape(value.shape[0], -1).sum(1)

        query = replace(query, target=over_outputs, is_classified=False)
    return query if "query" in keep or query.reduction else query.sum()


def some_outputs(query: Query, start: int, stop: int) -> Query:
    """The query's outputs `start` to `stop` only."""
    target = query.target

    def cut(output: Any, *labels: Tensor) -> Tensor:
        value = target(output, *labels)
        return value.reshape(value.shape[0], -1)[:, start:stop]

    return replace(query, target=cut, is_classified=False)


def output_count(model: nn.Module, query: Query) -> int:
    """O, the targets of one input."""
    one = query.rows(0, 1, next(model.parameters()).device)
    parameters = {name: value.detach() for name, value in parameters_of(model).items()}
    state = State(parameters, buffers_of(model)).upcast()
    with evaluation(model):
        return Functional(model).value(writable(state), one).shape[1]


def fitted_query(model: nn.Module, query: Query) -> Query:
    """The query as the model takes it: where that does not take real numbers in the inputs' precision, they are moved
    into the parameters'.

    Raises TypeError for what is no query; ValueError if it holds NaN, or if its targets are no differentiable function
    of the model's parameters.
    """
    require_query(query)
    refuse_nan(query)
    try:
        check_query(model, query)
    except RuntimeError:
        moved = query.in_precision_of(next(model.parameters()))
        found, made = (tree_tensors(one.inputs) for one in (query, moved))
        if all(tensor.dtype == other.dtype for tensor, other in zip(found, made, strict=True)):
            raise  # so it is not for their precision
        check_query(model, moved)
        return moved
    return query


def refuse_nan(query: Query) -> None:
    """Raises ValueError for a query that holds NaN."""
    for what, tree in (("inputs", query.inputs), ("labels", query.labels)):
        bad = sum(int(tensor.isnan().sum()) for tensor in tree_tensors(tree) if tensor.is_floating_point())
        if bad:
            raise ValueError(f"the query's {what} hold {bad} number(s) that are NaN, and so would every influence be")


def check_query(model: nn.Module, query: Query) -> None:
    """Raises ValueError if the query's targets are no differentiable function of the model's parameters."""
    parameters = {name: value.detach().clone() for name, value in parameters_of(model).items()}
    state = writable(State(parameters, buffers_of(model)).upcast())
    for parameter in state.parameters.values():
        parameter.requires_grad_()
    device = next(iter(parameters.values())).device
    one = query.rows(0, 1, device)

    before = random_state(device)
    versions = {name: value._version for name, value in (*state.parameters.items(), *state.buffers.items())}
    with evaluation(model), replayed_random_state(before), torch.enable_grad():
        value: Tensor = Functional(model)(state, one)
        drawn = any(not torch.equal(now, before[name]) for name, now in random_state(device).items())

    written = [name for name, v in (*state.parameters.items(), *state.buffers.items()) if v._version != versions[name]]
    if written:
        raise ValueError(
            f"the model writes to its own {', '.join(written[:5])} in the forward pass, also in eval mode, so that "
            "what it says depends on how often it was asked; let it do so in training mode only (`if self.training:`)"
        )
    if drawn:
        raise ValueError(
            "the model draws random numbers in eval mode, so that its prediction is no function of its parameters; "
            "draw them in training mode only (`if self.training:`), or pass them in with the query's inputs"
        )
    refuse_reentrant(value)
    if not value.dtype.is_floating_point:
        raise ValueError(f"the query's target is of type {value.dtype}: only real numbers have a derivative")
    if not value.requires_grad:
        raise ValueError(
            "the query's target does not depend differentiably on the model's parameters: it must not detach its "
            "input, leave torch, or go through argmax, comparison or rounding"
        )
