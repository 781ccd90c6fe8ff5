"""Test features φ_s^test, one row of parameters for each target: where the sample axis and parameter scores start."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.autodiff import Functional, evaluation, vjp_rows
from explaind_track.path import gauss_legendre, interpolate
from explaind_track.plans import target_of
from explaind_track.queries import Query
from explaind_track.step import State, Step


def kept_targets(query: Query, keep: Sequence[str]) -> Query:
    """The query whose targets are those of `query`, summed over "query" and "output" where they are not kept: for
    influences are linear in the target."""
    if "output" not in keep:
        target = query.target

        def over_outputs(output: Any, *labels: Tensor) -> Tensor:
            value = target(output, *labels)
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
    with evaluation(model), torch.no_grad():
        return int(one(model).shape[1])


def check_query(model: nn.Module, query: Query) -> None:
    """Raises ValueError if the query's targets cannot be differentiated with respect to the model's parameters."""
    parameters = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    device = next(iter(parameters.values())).device
    one = query.rows(0, 1, device)
    with evaluation(model), torch.enable_grad():
        value: Tensor = Functional(model)(State(parameters, dict(model.named_buffers())), one)
    if not value.dtype.is_floating_point:
        raise ValueError(f"the query's target is of type {value.dtype}: only real numbers have a derivative")
    if not value.requires_grad:
        raise ValueError(
            "the query's target does not depend differentiably on the model's parameters: it must not detach its "
            "input, leave torch, or go through argmax, comparison or rounding"
        )


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
