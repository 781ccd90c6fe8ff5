"""The gradient of a query's one target, given out parameter by parameter as a backward pass comes to it.

At any state, of parameters that are put into the model's place; or of the model as it stands, where nothing can be put
into it (its parameters are in pieces, say), with the gradients of training set aside. Of parameters, both assume no
more than that they have a gradient once a pass has come to them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from explaind_track.core.queries import Query
from explaind_track.core.step import State
from explaind_track.core.tensors import Tensors
from explaind_track.engine.functional import Functional
from explaind_track.engine.streaming import streamed
from explaind_track.engine.targets import target_of

Take = Callable[[str, Tensor, bool], None]
"""Gets a parameter's name, its gradient, which nobody else keeps, and whether that is of the last chunk of the query:
those of all chunks are to be added up. A chunk that does not reach a parameter gives nothing for it."""


@contextmanager
def gradients_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, the parameters have no gradients; behind it, their own again: the same tensors, not copies."""
    held = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def gradient_at(
    functional: Functional, query: Query, state: State, names: Collection[str], chunks: Sequence[Query], take: Take
) -> Tensor:
    """Gives out the gradient at a state, and returns the target's value, (1, 1). The model is in the mode of queries.

    query: the whole one, which is reduced to one target. names: of the parameters whose gradients are wanted. chunks:
    of the query, each with some of its inputs.
    """
    # the parameters' storage, without the hooks that training may have put on them
    leaves = {name: state.parameters[name].detach().requires_grad_() for name in names}

    def backward(chunk: Query) -> Tensor:
        return functional.at(state, target_of(query, chunk)).held(leaves, _value_behind)

    return _of_chunks(leaves, chunks, backward, take)


def gradient_in_place(
    model: nn.Module, query: Query, parameters: Tensors, chunks: Sequence[Query], take: Take
) -> Tensor:
    """`gradient_at` of the model as it stands. parameters: those of the model's own that learn, by name."""
    with gradients_aside(parameters.values()), torch.enable_grad():
        return _of_chunks(parameters, chunks, lambda chunk: _value_behind(target_of(query, chunk)(model)), take)


def _of_chunks(leaves: Tensors, chunks: Sequence[Query], backward: Callable[[Query], Tensor], take: Take) -> Tensor:
    values = []
    for place, chunk in enumerate(chunks, 1):

        def given(name: str, gradient: Tensor, is_last: bool = place == len(chunks)) -> None:
            take(name, gradient, is_last)

        with streamed(leaves, given):
            values.append(backward(chunk))
    return sum(values[1:], values[0])


def _value_behind(target: Tensor) -> Tensor:
    """The target's value, once a backward pass has been through its graph."""
    if target.requires_grad:
        target.sum().backward()
    return target.detach()
