"""The torch.func plumbing: the model as a function of its parameters, and derivatives of it in both directions."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from explaind_track.step import State, Tensors
from explaind_track.trees import tree_in_dims, tree_map

PointFunction = Callable[[Tensors], Tensor]
"""A tensor as a function of the parameters, by name."""


class ForwardModeFallback(UserWarning):
    """Some operation of the model cannot be differentiated the fast way; the results are the same, only later."""


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by its formula: the fused kernels have no forward-mode derivative, nor a rule for `vmap`."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model as queries see it: in eval mode. Every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with differentiable_attention():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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
        self._holder = self._Holder(model)
        self._jvp_modes = [_jvp_vectorized, _jvp_one_by_one, _jvp_by_reverse]

    def __call__(self, state: State, function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` with the parameters and buffers of `state`; those it lacks stay the model's own."""
        swapped = {f"model.{name}": value for name, value in (*state.buffers.items(), *state.parameters.items())}
        return functional_call(self._holder, swapped, (function,))

    def at(self, state: State, function: Callable[[nn.Module], Tensor]) -> PointFunction:
        """`function(model)` as a function of some of the parameters, the others as in `state`."""
        return lambda moved: self(State({**state.parameters, **moved}, state.buffers), function)

    def jvp(self, function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
        """The derivative of `function` at `primals` in T directions, (T, *output shape).

        tangents: each with a leading axis T. Where the model has an operation without a forward rule or a `vmap`
        rule, slower ways are tried in turn, and the first that works is kept; a ForwardModeFallback tells of it.
        """
        first_error: Exception | None = None
        while True:
            try:
                result = self._jvp_modes[0](function, primals, tangents)
            except (RuntimeError, NotImplementedError) as error:
                first_error = first_error or error
                if len(self._jvp_modes) == 1 or isinstance(error, torch.OutOfMemoryError):
                    raise first_error from None
                self._jvp_modes = self._jvp_modes[1:]
                continue
            if first_error is not None:
                how = (self._jvp_modes[0].__doc__ or "").strip(".")
                reason = str(first_error).split("\n")[0]
                warnings.warn(f"influences are computed {how}, since: {reason}", ForwardModeFallback, stacklevel=2)
            return result

    def value(self, state: State, function: Callable[[nn.Module], Tensor]) -> Tensor:
        with torch.no_grad():
            result: Tensor = self(state, function)
            return result


def _jvp_vectorized(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """With all directions at once in forward mode."""
    primals = dict(primals)
    with torch.no_grad():
        result: Tensor = vmap(lambda tangent: jvp(function, (primals,), (tangent,))[1])(dict(tangents))
        return result


def _rows(tangents: Tensors) -> Iterator[dict[str, Tensor]]:
    count = next(iter(tangents.values())).shape[0]
    return ({name: tangent[row] for name, tangent in tangents.items()} for row in range(count))


def _jvp_one_by_one(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """One direction at a time in forward mode."""
    with torch.no_grad():
        return torch.stack([jvp(function, (dict(primals),), (row,))[1] for row in _rows(tangents)])


def _jvp_by_reverse(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """In reverse mode, as the derivative of w ↦ Jᵀw, which is linear."""
    output, pullback = _vjp(function, primals)
    _, pushforward = vjp(lambda weight: pullback(weight)[0], torch.zeros_like(output))[:2]
    return torch.stack([pushforward(row)[0] for row in _rows(tangents)]).detach()


def _vjp(function: PointFunction, primals: Tensors) -> tuple[Tensor, Callable[[Tensor], tuple[dict[str, Tensor]]]]:
    output, pullback = vjp(function, dict(primals))[:2]
    return output, pullback


def vjp_rows(function: PointFunction, primals: Tensors) -> dict[str, Tensor]:
    """The gradient of every entry of `function(primals)`, by parameter: each (*output shape, *parameter shape).

    One reverse pass for each entry; meant for few of them.
    """
    output, pullback = _vjp(function, primals)
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device).reshape(-1, *output.shape)
    rows = [pullback(direction)[0] for direction in basis]
    return {
        name: torch.stack([row[name] for row in rows]).reshape(*output.shape, *primal.shape)
        for name, primal in primals.items()
    }


SampleLoss = Callable[[nn.Module, Any], Tensor]
"""`sample_loss(model, batch)` → the unreduced loss of every sample, (N,)."""


def sample_gradients(
    functional: Functional, sample_loss: SampleLoss, state: State, batch: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of every sample of `batch` by parameter, (N, *shape) each, and their losses (N,).

    The model is called on one sample at a time (a batch of one, under `vmap`), in whatever mode it is in; random
    operations draw for each sample afresh.
    """

    def loss_of_one(parameters: Tensors, sample: Any) -> Tensor:
        one = tree_map(lambda tensor: tensor.unsqueeze(0), sample)
        losses: Tensor = functional(State(parameters, state.buffers), lambda model: sample_loss(model, one))
        return losses.reshape(())

    in_dims = (None, tree_in_dims(batch))
    with differentiable_attention():
        gradients, losses = vmap(grad_and_value(loss_of_one), in_dims=in_dims, randomness="different")(
            dict(state.parameters), batch
        )
    return gradients, losses


def activation_bytes(functional: Functional, state: State, function: Callable[[nn.Module], Tensor]) -> int:
    """The bytes that `function(model)` would keep for its backward pass, parameters left out: what a pass costs."""
    own = {value.data_ptr() for value in (*state.parameters.values(), *state.buffers.values())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    parameters = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = functional(State(parameters, state.buffers), function)
    return sum(kept.values()) + int(output.numel() * output.element_size())
