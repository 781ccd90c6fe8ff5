"""The model as a function of its parameters and buffers, and the modes in which queries call it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from explaind_track.core.modules import keeping_modes, modules_of, parameters_of, uncompiled
from explaind_track.core.rng import replayed_random_state
from explaind_track.core.step import State
from explaind_track.core.tensors import Tensors, low_precision
from explaind_track.engine.derivatives import Jvp, PointFunction, elsewhere, prove_same, tell_of_fallback, vjp_rows
from explaind_track.engine.renormalizing import renormalizing, written_to_nothing

if TYPE_CHECKING:
    from explaind_track.core.queries import Query


CAST_BY_NAME = (
    "Parameters in bfloat16 or float16 are explained in float32, and so are queries and batches: where the model, the "
    "query or sample_loss casts to a type by its name, as x.bfloat16() does, let it cast to that of the parameters, "
    "x.to(next(model.parameters()).dtype)"
)


@contextmanager
def differentiable_attention(fused: bool = False) -> Iterator[None]:
    """Attention by its formula: the fused kernels have no forward-mode derivative, nor a rule for `vmap`. fused: by
    these kernels, for plain backward passes alone."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def evaluation(model: nn.Module, fused: bool = False) -> Iterator[None]:
    """The model as queries see it: in eval mode. Every module gets its own mode back. fused: see
    `differentiable_attention`."""
    with keeping_modes(model), differentiable_attention(fused):
        for module in modules_of(model):
            if module.training:
                module.training = False
        yield


def writable(state: State) -> State:
    """The state with copies of its buffers, which a model in training mode writes to."""
    return State(state.parameters, {name: value.clone() for name, value in state.buffers.items()})


class Functional:
    """The model as a function of its parameters and buffers.

    What is called is a function of the *model*, with its tensors swapped, not just the model's `forward`: so a
    user's `sample_loss(model, batch)` may use any method or submodule of it.
    """

    class _Holder(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, function: Callable[[nn.Module], Any]) -> Any:
            return function(self.model)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.jvp = Jvp()
        """Finds, for this model, the fastest way to derivatives in some directions."""
        self._holder = self._Holder(model)
        self._renormalizing = renormalizing(model)
        self._is_low_precision = low_precision(parameters_of(model)) is not None
        self._vectorized_queries = True
        self._queries_proven = False

    def __call__(self, state: State, function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` with the parameters and buffers of `state`; those it lacks stay the model's own."""
        swapped = {f"model.{name}": value for name, value in (*state.buffers.items(), *state.parameters.items())}
        with uncompiled(self.model), written_to_nothing(self._renormalizing):
            try:
                return functional_call(self._holder, swapped, (function,))
            except RuntimeError as error:
                if self._is_low_precision and "dtype" in str(error) and not getattr(error, "__notes__", ()):
                    error.add_note(CAST_BY_NAME)
                raise

    def at(self, state: State, function: Callable[[nn.Module], Tensor]) -> PointFunction:
        """`function(model)` as a function of some of the parameters, the others as in `state`."""

        def run(moved: Tensors, use: Callable[[Tensor], Any]) -> Any:
            return self(State({**state.parameters, **moved}, state.buffers), lambda model: use(function(model)))

        return PointFunction(run)

    def value(self, state: State, function: Callable[[nn.Module], Tensor]) -> Tensor:
        """`function(model)` without a graph."""
        with torch.no_grad():
            result: Tensor = self(state, function)
            return result

    def replay(self, state: State, random_state: Mapping[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` as training ran it: with the random numbers drawn from `random_state` on, and with buffers
        that it may write to without a trace."""
        with replayed_random_state(random_state):
            return self(writable(state), function)

    def query_gradients(self, query: "Query", state: State, primals: Tensors) -> dict[str, Tensor]:
        """The gradient of every output of every query with respect to `primals`, (x, O, *shape) each."""
        if self._vectorized_queries:
            try:
                if not self._queries_proven:
                    self._prove_vectorized(query, state, primals)
                return self._vectorized_gradients(query, state, primals)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                reason = error

        device = next(iter(primals.values())).device
        singles = [query.rows(row, row + 1, device) for row in range(query.size)]
        rows = [vjp_rows(self.at(state, single), primals) for single in singles]
        if self._vectorized_queries:  # only now, since an error of the query itself has no way around it
            self._vectorized_queries = False
            tell_of_fallback("one query at a time in reverse mode", reason)
        return {name: torch.cat([row[name] for row in rows]) for name in primals}

    def _prove_vectorized(self, query: "Query", state: State, primals: Tensors) -> None:
        """Compares them for one query, once, with a backward pass. They are taken when the model has its own parameters
        back, so that a model which looks at them then must be noticed."""
        single = query.rows(0, 1, next(iter(primals.values())).device)
        point = State({**state.parameters, **elsewhere(primals)}, state.buffers)
        moved = {name: point.parameters[name] for name in primals}
        prove_same(self._vectorized_gradients(single, point, moved), vjp_rows(self.at(point, single), moved))
        self._queries_proven = True

    def _vectorized_gradients(self, query: "Query", state: State, primals: Tensors) -> dict[str, Tensor]:
        def of_one(tensors: list[Tensor]) -> dict[str, Tensor]:
            output, pullback = vjp(self.at(state, query.single(tensors)), dict(primals))[:2]
            rows = [pullback(direction)[0] for direction in torch.eye(output.numel()).to(output).unsqueeze(1)]
            return {name: torch.stack([row.pop(name) for row in rows]) for name in primals}

        result: dict[str, Tensor] = vmap(of_one)(query.tensors)
        return result
