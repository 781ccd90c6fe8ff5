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
    return pass_size(functional, state, function)[0]


def pass_size(functional: Functional, state: State, function: Callable[[nn.Module], Tensor]) -> tuple[int, int]:
    """The bytes that `function(model)` would keep for its backward pass, parameters left out, and how many operations
    keep some."""
    known = {value.data_ptr() for value in (*state.parameters.values(), *state.buffers.values())}
    kept: dict[int, int] = {}
    operations = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal operations
        if tensor.data_ptr() not in known:
            operations += 1
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor.detach()  # an output that is saved as it is holds its graph, and so itself, for good

    parameters = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = functional(State(parameters, state.buffers), function)
    return sum(kept.values()) + int(output.numel() * output.element_size()), operations + 1


class QueryChunks:
    """Cuts one query's inputs into chunks whose passes fit the memory."""

    def __init__(self, functional: Functional, query: Query, memory: int) -> None:
        self._functional, self._query, self._memory = functional, query, memory
        self._of_one: tuple[int, int] | None = None

    def of_one(self, state: State) -> tuple[int, int]:
        """The bytes that a pass writes for one input, and the operations it calls."""
        if self._of_one is None:
            first = self._query.rows(0, 1, next(iter(state.parameters.values())).device)
            written, operations = pass_size(self._functional, state, first)
            self._of_one = max(1, written), operations
        return self._of_one

    def size(self, state: State, copies: int, held: int, each: int = 0) -> int:
        """How many inputs go together, such that `copies` of their activations, `each` bytes of results for each of
        them, and `held` bytes beside fit the memory; as even as may be."""
        written = self.of_one(state)[0] * (copies + 1)  # and the pass's own
        room = max(self._memory - held, self._memory // 2)
        fitting = room // (written + written // 4 + each)  # a quarter for what operations need meanwhile
        if next(iter(state.parameters.values())).device.type == "cpu":
            fitting = min(fitting, CPU_PASS // written)

        chunks = -(-self._query.size // max(1, fitting))
        return -(-self._query.size // chunks)

    def size_of_pass(self, state: State) -> int:
        """How many inputs go together in a plain forward and backward pass: one for all of them, where it fits."""
        fitting = max(1, self._memory // self.of_one(state)[0])
        return -(-self._query.size // -(-self._query.size // fitting))

    def cut(self, size: int, device: torch.device) -> Iterator[tuple[int, Query]]:
        """The chunks of `size` inputs, each with its first row."""
        for start in range(0, self._query.size, size):
            yield start, self._query.rows(start, start + size, device)
