"""The torch.func plumbing: the model as a function of its parameters, and derivatives of it in both directions."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from explaind_track.core.step import State
from explaind_track.core.tensors import Tensors, tree_in_dims, tree_map
from explaind_track.errors import ForwardModeFallbackWarning

if TYPE_CHECKING:
    from explaind_track.core.queries import Query

PointFunction = Callable[[Tensors], Tensor]
"""A tensor as a function of the parameters, by name."""


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
        self._jvp_modes = list(_JVP_MODES.items())
        self._vectorized_queries = True

    def __call__(self, state: State, function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` with the parameters and buffers of `state`; those it lacks stay the model's own."""
        swapped = {f"model.{name}": value for name, value in (*state.buffers.items(), *state.parameters.items())}
        return functional_call(self._holder, swapped, (function,))

    def at(self, state: State, function: Callable[[nn.Module], Tensor]) -> PointFunction:
        """`function(model)` as a function of some of the parameters, the others as in `state`."""
        return lambda moved: self(State({**state.parameters, **moved}, state.buffers), function)

    def jvp(self, function: PointFunction, primals: Tensors, tangents: Tensors, together: bool = True) -> Tensor:
        """The derivative of `function` at `primals` in T directions, (T, *output shape).

        tangents: each with a leading axis T. together: whether one call of `function` may serve several directions;
        it may not where it draws random numbers or writes to buffers. Where the model has an operation without a
        forward rule or a `vmap` rule, slower ways are tried in turn, and the first that works is kept; a
        ForwardModeFallbackWarning tells of it.
        """
        first_error: Exception | None = None
        for place, (how, mode) in enumerate(self._jvp_modes):
            if not together and mode is _jvp_vectorized:
                continue
            try:
                result = mode(function, primals, tangents)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                first_error = first_error or error
                continue
            if first_error is not None:
                self._jvp_modes = self._jvp_modes[place:]
                tell_of_fallback(how, first_error)
            return result
        assert first_error is not None  # there is always a mode to try
        raise first_error

    def query_gradients(self, query: "Query", state: State, primals: Tensors) -> dict[str, Tensor]:
        """The gradient of every output of every query with respect to `primals`, (x, O, *shape) each."""

        def of_one(inputs: object, labels: object) -> dict[str, Tensor]:
            output, pullback = vjp(self.at(state, query.single(inputs, labels)), dict(primals))[:2]
            rows = [pullback(direction)[0] for direction in torch.eye(output.numel()).to(output).unsqueeze(1)]
            return {name: torch.stack([row[name] for row in rows]) for name in primals}

        if self._vectorized_queries:
            try:
                result: dict[str, Tensor] = vmap(of_one, in_dims=query.in_dims)(query.inputs, query.labels)
                return result
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                first_error = error
        device = next(iter(primals.values())).device
        ones = [query.rows(row, row + 1, device) for row in range(query.size)]
        rows = [vjp_rows(self.at(state, one), primals) for one in ones]
        if self._vectorized_queries:
            self._vectorized_queries = False
            tell_of_fallback("one query at a time in reverse mode", first_error)
        return {name: torch.cat([row[name] for row in rows]) for name in primals}

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


def _jvp_by_double_reverse(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """As the derivative of w ↦ Jᵀw, which is linear: two reverse passes for each direction."""
    output, leaves = _with_graph(function, primals)
    weight = torch.zeros_like(output, requires_grad=True)
    pulled = {name: row for name, row in _pull(output, leaves, weight, create_graph=True).items() if row is not None}
    if not all(row.requires_grad for row in pulled.values()):
        raise RuntimeError("some operation's derivative cannot be differentiated again")

    def push(row: Tensors) -> Tensor:
        if not pulled:
            return torch.zeros_like(output)
        along = [row[name] for name in pulled]
        return torch.autograd.grad(list(pulled.values()), weight, along, retain_graph=True)[0]

    result = torch.stack([push(row) for row in _rows(tangents)]).detach()
    _prove_adjoint(result, tangents, output, leaves)
    return result


def _prove_adjoint(result: Tensor, tangents: Tensors, output: Tensor, leaves: Tensors) -> None:
    """⟨w, J v⟩ = ⟨Jᵀw, v⟩ for one w: what an operation hides from the second pass would be missing on the left."""
    weight = torch.linspace(1, 2, output.numel()).to(output).reshape(output.shape)
    pulled = {name: row for name, row in _pull(output, leaves, weight).items() if row is not None}
    for pushed, row in zip(result, _rows(tangents), strict=True):
        ahead, back = pushed * weight, [pulled[name] * row[name] for name in pulled]
        size = ahead.abs().sum() + sum(product.abs().sum() for product in back)
        if (ahead.sum() - sum(product.sum() for product in back)).abs() > size * torch.finfo(output.dtype).eps ** 0.5:
            raise RuntimeError("some operation's derivative cannot be differentiated again")


def _jvp_by_rows(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    gradients = vjp_rows(function, primals)
    products = []
    for name, primal in primals.items():
        shape = gradients[name].shape[: gradients[name].ndim - primal.ndim]
        jacobian = gradients[name].reshape(shape.numel(), primal.numel())
        direction = tangents[name].reshape(-1, primal.numel())
        products.append(einsum(jacobian, direction, "o d, r d -> r o").unflatten(1, shape))
    return torch.stack(products).sum(0)


_JVP_MODES: dict[str, Callable[[PointFunction, Tensors, Tensors], Tensor]] = {
    "in forward mode, all directions at once": _jvp_vectorized,
    "in forward mode, one direction at a time": _jvp_one_by_one,
    "in reverse mode, one direction at a time": _jvp_by_double_reverse,
    "in reverse mode, one output at a time": _jvp_by_rows,
}
"""Ways to a directional derivative, the fastest first, and each with fewer demands on the model than the one before."""


def vjp_rows(function: PointFunction, primals: Tensors) -> dict[str, Tensor]:
    """The gradient of every entry of `function(primals)`, by parameter: each (*output shape, *parameter shape).

    One reverse pass for each entry; meant for few of them. Ordinary autograd, which knows every operation.
    """
    output, leaves = _with_graph(function, primals)
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device).reshape(-1, *output.shape)
    rows = [_pull(output, leaves, direction) for direction in basis]

    def gradient(name: str, leaf: Tensor) -> Tensor:
        values = [torch.zeros_like(leaf) if row[name] is None else row[name] for row in rows]
        return torch.stack(values).reshape(*output.shape, *leaf.shape)  # type: ignore[arg-type]

    return {name: gradient(name, primal) for name, primal in primals.items()}


def _with_graph(function: PointFunction, primals: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: primal.detach().requires_grad_() for name, primal in primals.items()}
    with torch.enable_grad():
        return function(leaves), leaves


def _pull(output: Tensor, leaves: Tensors, weight: Tensor, create_graph: bool = False) -> dict[str, Tensor | None]:
    """`Jᵀ weight` by parameter; None for those that the output does not depend on."""
    if not output.requires_grad:
        return dict.fromkeys(leaves)
    pulled = torch.autograd.grad(
        output, list(leaves.values()), weight, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return dict(zip(leaves, pulled, strict=True))


def tell_of_fallback(how: str, reason: Exception) -> None:
    first_line = str(reason).split("\n")[0]
    warnings.warn(f"influences are computed {how}, since: {first_line}", ForwardModeFallbackWarning, stacklevel=4)


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
