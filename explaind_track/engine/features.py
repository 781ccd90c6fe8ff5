"""Test features φ_s^test, one row of parameters for each target: where the sample axis and parameter scores start."""

import warnings

import torch
from torch import Tensor

from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.core.tensors import Tensors, size_in_bytes
from explaind_track.engine.derivatives import vjp_rows
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.memory import QueryChunks
from explaind_track.engine.path_integral import Nodes
from explaind_track.engine.targets import target_of
from explaind_track.errors import GradientMismatchWarning

PROVE_EVERY = 50
"""Steps from one comparison with forward mode to the next; the first step is always compared."""


class Features:
    """φ_s^test of some of a query's inputs, by parameter: (x·O, *shape); of a reduced query, (O, *shape)."""

    def __init__(self, functional: Functional, query: Query, memory: int) -> None:
        """memory: bytes that the inputs' passes may take beside the result."""
        self._functional, self.query, self._memory = functional, query, memory
        self._chunks = QueryChunks(functional, query, memory)
        self._steps = 0

    def of(self, step: Change, nodes: Nodes) -> dict[str, Tensor]:
        """∫₀¹ ∇_θ f_{θ_s(t)}(x)_j dt with respect to the parameters that the step moved."""
        total: dict[str, Tensor] = {}
        if not step.moved:
            return total
        device = next(iter(step.before.parameters.values())).device
        with evaluation(self._functional.model):
            for start, chunk in self._chunks.cut(self._chunk_size(step), device):
                for time, weight in nodes:
                    state = step.point(time)
                    primals = {name: state.parameters[name] for name in step.moved}
                    self._add(total, start, self._gradients(chunk, state, primals), weight)
        if self._steps % PROVE_EVERY == 0:
            self._prove(step, nodes, total)
        self._steps += 1
        return total

    def _prove(self, step: Change, nodes: Nodes, features: dict[str, Tensor]) -> None:
        """Compares ⟨φ, θ_s − θ_{s+1}⟩ with the derivative in that direction by forward mode, in which no backward pass
        has a part; warns where they differ."""
        direction = {name: step.before.parameters[name] - step.after.parameters[name] for name in features}
        products = [rows.reshape(len(rows), -1) @ direction[name].flatten() for name, rows in features.items()]
        found, expected = torch.stack(products).sum(0), self._derivative(step, nodes, direction)

        # what float rounding allows: of the sum, and of what cancels in it
        eps = torch.finfo(found.dtype).eps
        lengths = [float(rows.norm()) * float(direction[name].norm()) for name, rows in features.items()]
        off, size = float((found - expected).norm()), float(expected.norm())
        if not off <= eps**0.4 * size + 64 * eps * sum(lengths):
            warnings.warn(
                f"at step {step.number}, the gradients of the query's targets miss the derivative that forward mode "
                f"gives by {off / max(size, 1e-30):.2g} of its norm: some backward pass of the model is not the "
                "derivative of its forward pass (a gradient that is reversed, scaled or clipped on its way, or an "
                "estimate). Influences of samples and of single parameters are along those gradients, and do not add "
                "up to the change; of groups, the residual tells. explaind_track.audit shows the numbers",
                GradientMismatchWarning,
                stacklevel=4,
            )

    def _derivative(self, step: Change, nodes: Nodes, direction: Tensors) -> Tensor:
        """∫₀¹ ⟨∇_θ f_{θ_s(t)}(x)_j, direction⟩ dt by forward mode, (x·O,)."""
        some = next(iter(direction.values()))
        tangents = {name: value[None] for name, value in direction.items()}
        pieces = []
        with evaluation(self._functional.model):
            size = self._chunks.size(step.before, copies=1, held=2 * size_in_bytes(step.before.parameters))
            for _, chunk in self._chunks.cut(size, some.device):
                function = target_of(self.query, chunk)
                total: Tensor | None = None
                for time, weight in nodes:
                    state = step.point(time)
                    primals = {name: state.parameters[name] for name in direction}
                    slope = self._functional.jvp(self._functional.at(state, function), primals, tangents)[0] * weight
                    total = slope if total is None else total + slope
                assert total is not None  # there is a node
                pieces.append(total.flatten())
        return torch.stack(pieces).sum(0) if self.query.reduction else torch.cat(pieces)

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
