"""Test features φ_s^test, one row of parameters for each target: where the sample axis and parameter scores start."""

from torch import Tensor

from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.core.tensors import Tensors, size_in_bytes
from explaind_track.engine.derivatives import vjp_rows
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.memory import QueryChunks
from explaind_track.engine.path_integral import gauss_legendre, interpolate
from explaind_track.engine.targets import target_of


class Features:
    """φ_s^test of some of a query's inputs, by parameter: (x·O, *shape); of a reduced query, (O, *shape)."""

    def __init__(self, functional: Functional, query: Query, memory: int) -> None:
        """memory: bytes that the inputs' passes may take beside the result."""
        self._functional, self.query, self._memory = functional, query, memory
        self._chunks = QueryChunks(functional, query, memory)

    def of(self, step: Change, nodes: int) -> dict[str, Tensor]:
        """∫₀¹ ∇_θ f_{θ_s(t)}(x)_j dt with respect to the parameters that the step moved."""
        total: dict[str, Tensor] = {}
        if not step.moved:
            return total
        device = next(iter(step.before.parameters.values())).device
        with evaluation(self._functional.model):
            for start, chunk in self._chunks.cut(self._chunk_size(step), device):
                for time, weight in gauss_legendre(nodes):
                    state = interpolate(step, time)
                    primals = {name: state.parameters[name] for name in step.moved}
                    self._add(total, start, self._gradients(chunk, state, primals), weight)
        return total

    def _add(self, total: dict[str, Tensor], start: int, gradients: Tensors, weight: float) -> None:
        """Adds a node's gradients, (x, O, *shape), of the chunk whose first input is `start`."""
        for name, rows in gradients.items():
            outputs = rows.shape[1]
            if name not in total:
                total[name] = rows.new_zeros(len(self.query) * outputs, *rows.shape[2:])
            # a reduced query's chunks are shares of one target; those of any other have rows of their own
            first = 0 if self.query.reduction else start * outputs
            total[name][first : first + len(rows) * outputs].add_(rows.flatten(0, 1), alpha=weight)

    def _chunk_size(self, step: Change) -> int:
        """By their activations where one reverse pass serves all of the chunk, else by their gradients."""
        if self.query.reduction:
            return self._chunks.size(step.before, copies=1, held=2 * size_in_bytes(step.before.parameters))
        moved = {name: step.before.parameters[name] for name in step.moved}
        return max(1, self._memory // max(1, size_in_bytes(moved)))

    def _gradients(self, chunk: Query, state: State, primals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients (x, O, *shape) of the chunk's targets; (1, O, *shape) of its share of a reduced query's."""
        if self.query.reduction:
            return vjp_rows(self._functional.at(state, target_of(self.query, chunk)), primals)
        return self._functional.query_gradients(chunk, state, primals)
