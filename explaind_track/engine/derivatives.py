"""Derivatives of a tensor that is a function of the parameters: in some directions (jvp), or of every entry (vjp)."""

import warnings
from collections.abc import Callable, Iterator

import torch
from einops import einsum
from torch import Tensor
from torch.func import jvp, vmap

from explaind_track.core.tensors import Tensors
from explaind_track.errors import ForwardModeFallbackWarning

PointFunction = Callable[[Tensors], Tensor]
"""A tensor as a function of the parameters, by name."""


class Jvp:
    """J v: tries the ways below, the fastest first, and stays with the first that the model's operations allow."""

    def __init__(self) -> None:
        self._ways = list(_WAYS.items())

    def __call__(self, function: PointFunction, primals: Tensors, tangents: Tensors, together: bool = True) -> Tensor:
        """The derivative of `function` at `primals` in T directions, (T, *output shape).

        tangents: each with a leading axis T. together: whether one call of `function` may serve several directions;
        it may not where it draws random numbers or writes to buffers. Where the model has an operation without a
        forward rule or a `vmap` rule, slower ways are tried in turn, and the first that works is kept; a
        ForwardModeFallbackWarning tells of it.
        """
        first_error: Exception | None = None
        for place, (how, way) in enumerate(self._ways):
            if way is _vectorized and not together:
                continue
            try:
                result = way(function, primals, tangents)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                first_error = first_error or error
                continue
            if first_error is not None:  # only now, since an error of the function itself has no way around it
                self._ways = self._ways[place:]
                tell_of_fallback(how, first_error)
            return result
        assert first_error is not None  # there is always a way to try
        raise first_error


def _vectorized(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """With all directions at once in forward mode."""
    primals = dict(primals)
    with torch.no_grad():
        result: Tensor = vmap(lambda tangent: jvp(function, (primals,), (tangent,))[1])(dict(tangents))
        return result


def _one_by_one(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """One direction at a time in forward mode."""
    with torch.no_grad():
        return torch.stack([jvp(function, (dict(primals),), (tangent,))[1] for tangent in _directions(tangents)])


def _by_double_reverse(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """As the derivative of w ↦ Jᵀw, which is linear: two reverse passes for each direction."""
    output, leaves = _with_graph(function, primals)

    # w → Jᵀw, with a graph; w itself does not matter
    weight = torch.zeros_like(output, requires_grad=True)
    pulled = {name: row for name, row in _pull(output, leaves, weight, create_graph=True).items() if row is not None}
    if not all(row.requires_grad for row in pulled.values()):
        raise RuntimeError("some operation's derivative cannot be differentiated again")

    def push(tangent: Tensors) -> Tensor:
        if not pulled:
            return torch.zeros_like(output)
        # d⟨Jᵀw, v⟩/dw = J v
        along = [tangent[name] for name in pulled]
        return torch.autograd.grad(list(pulled.values()), weight, along, retain_graph=True)[0]

    result = torch.stack([push(tangent) for tangent in _directions(tangents)]).detach()
    _prove_adjoint(result, tangents, output, leaves)
    return result


def _prove_adjoint(result: Tensor, tangents: Tensors, output: Tensor, leaves: Tensors) -> None:
    """⟨w, J v⟩ = ⟨Jᵀw, v⟩ for one w: what an operation hides from the second pass would be missing on the left."""
    weight = torch.linspace(1, 2, output.numel()).to(output).reshape(output.shape)
    pulled = {name: row for name, row in _pull(output, leaves, weight).items() if row is not None}
    for pushed, tangent in zip(result, _directions(tangents), strict=True):
        left = pushed * weight  # w · J v
        right = [pulled[name] * tangent[name] for name in pulled]  # Jᵀw · v
        size = left.abs().sum() + sum(product.abs().sum() for product in right)
        miss = (left.sum() - sum(product.sum() for product in right)).abs()
        if miss > size * torch.finfo(output.dtype).eps ** 0.5:
            raise RuntimeError("some operation's derivative cannot be differentiated again")


def _by_rows(function: PointFunction, primals: Tensors, tangents: Tensors) -> Tensor:
    """From the whole Jacobian: a reverse pass for each output."""
    gradients = vjp_rows(function, primals)
    products = []
    for name, primal in primals.items():
        shape = gradients[name].shape[: gradients[name].ndim - primal.ndim]
        jacobian = gradients[name].reshape(shape.numel(), primal.numel())
        direction = tangents[name].reshape(-1, primal.numel())
        products.append(einsum(jacobian, direction, "o d, r d -> r o").unflatten(1, shape))
    return torch.stack(products).sum(0)


_WAYS: dict[str, Callable[[PointFunction, Tensors, Tensors], Tensor]] = {
    "in forward mode, all directions at once": _vectorized,
    "in forward mode, one direction at a time": _one_by_one,
    "in reverse mode, one direction at a time": _by_double_reverse,
    "in reverse mode, one output at a time": _by_rows,
}
"""Ways to a directional derivative, the fastest first, and each with fewer demands on the model than the one before."""


def _directions(tangents: Tensors) -> Iterator[dict[str, Tensor]]:
    """One direction after the other, by parameter."""
    count = next(iter(tangents.values())).shape[0]
    return ({name: tangent[row] for name, tangent in tangents.items()} for row in range(count))


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
    """`function(primals)` with its graph, and the graph's leaves."""
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
    """Warns that influences are computed `how` from now on, since the faster way met the `reason`."""
    first_line = str(reason).split("\n")[0]
    warnings.warn(f"influences are computed {how}, since: {first_line}", ForwardModeFallbackWarning, stacklevel=4)
