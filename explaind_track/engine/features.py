"""Test features φ_s^test, one row of parameters for each target: where the sample axis and parameter scores start."""

from typing import Any

from torch import Tensor

from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.functional import Functional, evaluation, vjp_rows
from explaind_track.engine.path_integral import gauss_legendre, interpolate
from explaind_track.engine.targets import target_of


class Features:
    """φ_s^test of some of a query's inputs, by parameter: (x·O, *shape)."""

    def __init__(self, functional: Functional, query: Query, memory: int) -> None:
        """memory: bytes that the inputs' passes may take beside the result."""
        self._functional, self.query, self._memory = functional, query, memory

    def of(self, step: Step, nodes: int) -> dict[str, Tensor]:
        """∫₀¹ ∇_θ f_{θ_s(t)}(x)_j dt with respect to the parameters that the step moved."""
        total: dict[str, Tensor] = {}
        with evaluation(self._functional.model):
            for time, weight in gauss_legendre(nodes):
                state = interpolate(step, time)
                primals = {name: state.parameters[name] for name in step.updates}
                for start, rows in self._gradients(state, primals):
                    for name, row in rows.items():
                        if name not in total:
                            total[name] = row.new_zeros(row.shape[1] * len(self.query), *row.shape[2:])
                        place = 0 if self.query.reduction else start * row.shape[1]
                        total[name][place : place + row.shape[0] * row.shape[1]].add_(row.flatten(0, 1), alpha=weight)
        return total

    def _gradients(self, state: Any, primals: dict[str, Tensor]) -> Any:
        """(first row, gradients (x, O, *shape)) of a chunk of the inputs after the other."""
        example = next(iter(primals.values()))
        one = sum(value.numel() * value.element_size() for value in primals.values())
        at_once = self.query.size if self.query.reduction else max(1, self._memory // max(1, one))
        for start in range(0, self.query.size, at_once):
            chunk = self.query.rows(start, start + at_once, example.device)
            if self.query.reduction:
                yield 0, vjp_rows(self._functional.at(state, target_of(self.query, chunk)), primals)
            else:
                yield start, self._functional.query_gradients(chunk, state, primals)
