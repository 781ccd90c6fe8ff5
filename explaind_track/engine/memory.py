"""Memory: what a pass through the model takes, and how many of a query's inputs go through it at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from explaind_track.core.queries import Query
from explaind_track.core.step import State
from explaind_track.engine.functional import Functional

MEMORY = 2**28
"""Bytes that one pass over queries × directions may take, unless the caller says otherwise."""

CPU_PASS = 2**26
"""On a CPU, passes are no larger than this: one that does not find its memory again in the allocator faults it in page
by page. Measured on the MNIST CNN (1,024 queries, one thread): 0.85 s a step instead of 1.8 s."""


def activation_bytes(functional: Functional, state: State, function: Callable[[nn.Module], Tensor]) -> int:
    """The bytes that `function(model)` would keep for its backward pass, parameters left out: what a pass costs."""
    known = {value.data_ptr() for value in (*state.parameters.values(), *state.buffers.values())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    parameters = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = functional(State(parameters, state.buffers), function)
    return sum(kept.values()) + int(output.numel() * output.element_size())


class QueryChunks:
    """Cuts one query's inputs into chunks whose passes fit the memory."""

    def __init__(self, functional: Functional, query: Query, memory: int) -> None:
        self._functional, self._query, self._memory = functional, query, memory
        self._activation_bytes: int | None = None

    def size(self, state: State, copies: int, held: int) -> int:
        """How many inputs go together, such that `copies` of their activations and `held` bytes beside fit the memory;
        as even as may be."""
        device = next(iter(state.parameters.values())).device
        if self._activation_bytes is None:
            first = self._query.rows(0, 1, device)
            self._activation_bytes = max(1, activation_bytes(self._functional, state, first))

        room = max(self._memory - held, self._memory // 2)
        if device.type == "cpu":
            room = min(room, CPU_PASS)
        fitting = max(1, room // (self._activation_bytes * (copies + 1)))  # and the pass's own

        chunks = -(-self._query.size // fitting)
        return -(-self._query.size // chunks)

    def cut(self, size: int, device: torch.device) -> Iterator[tuple[int, Query]]:
        """The chunks of `size` inputs, each with its first row."""
        for start in range(0, self._query.size, size):
            yield start, self._query.rows(start, start + size, device)
