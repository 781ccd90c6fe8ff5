"""Derivatives of a tensor that is a function of the parameters: in some directions (jvp), or of every entry (vjp)."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from einops import einsum
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from explaind_track.core.tensors import Tensors
from explaind_track.engine.shared_passes import SharedPasses
from explaind_track.errors import ForwardModeFallbackWarning

Result = TypeVar("Result")

SAME_VALUE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""By how much (of its norm) the value of a function may differ between two ways of running it: kernels round in other
places. Another dropout mask changes it by percents."""

OTHER_VALUE = 3e-2
"""Above it, no coarse arithmetic explains the difference (a percent is bfloat16's): it is another function."""


class PointFunction:
    """A tensor as a function of the parameters, by name.

    Some models look at their parameters again in the backward pass: activation checkpointing runs its block once more
    then; hooks and autograd functions may. So whatever goes back through the graph of a value belongs into `held`,
    where the model still has the parameters that the value was computed with.
    """

    def __init__(self, run: Callable[[Tensors, Callable[[Tensor], Any]], Any]) -> None:
        """run: `(parameters, use)` → `use(value)`, with the parameters in the model until `use` has returned."""
        self._run = run

    def __call__(self, parameters: Tensors) -> Tensor:
        value: Tensor = self._run(parameters, lambda value: value)
        return value

    def held(self, parameters: Tensors, use: Callable[[Tensor], Result]) -> Result:
        """`use(value)`, with the value's graph kept, while the model has the parameters."""
        with torch.enable_grad():
            result: Result = self._run(parameters, use)
            return result

    def then(self, change: Callable[[Tensor], Tensor]) -> "PointFunction":
        """`change(value)` as a function of the parameters."""
        return PointFunction(lambda parameters, use: self._run(parameters, lambda value: use(change(value))))


class Jvp:
    """J v: tries the ways below, the fastest first, and stays with the first that the model's operations allow."""

    def __init__(self) -> None:
        self._ways = list(_WAYS.items())

    def __call__(
        self,
        function: PointFunction,
        primals: Tensors,
        tangents: Tensors,
        together: bool = True,
        expected: Tensor | None = None,
        shared: SharedPasses | None = None,
    ) -> Tensor:
        """The derivative of `function` at `primals` in T directions, (T, *output shape).

        tangents: each with a leading axis T.
        together: whether one call of `function` may serve several directions; it may not where it draws random numbers
        or writes to buffers.
        expected: the value of the function in a plain pass. A way that gives another value has run something else (the
        mask of a dropout is drawn in the order of memory, which is not the same in all ways) and is passed over.
        shared: what passes in other directions at the same primals compute alike.

        Where the model has an operation without a forward rule or a `vmap` rule, slower ways are tried in turn, and the
        first that works is kept; a ForwardModeFallbackWarning tells of it. Raises ValueError where no way gives the
        expected value.
        """
        first_error: Exception | None = None
        closest, smallest = None, float("inf")
        for place, (how, way) in enumerate(self._ways):
            if way is _vectorized and not together:
                continue
            try:
                if shared is not None and way is _vectorized:
                    with shared.without(tangents):
                        value, result = way(function, primals, tangents)
                else:
                    value, result = way(function, primals, tangents)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                first_error = first_error or error
                continue

            miss = 0.0 if expected is None else _relative(value - expected, expected)
            if miss <= SAME_VALUE.get(result.dtype, OTHER_VALUE):
                if first_error is not None:
                    tell_of_fallback(how, first_error)
                if first_error is not None or closest is not None:
                    self._ways = self._ways[place:]
                return result
            if miss < smallest:
                closest, smallest = result, miss

        if closest is None:
            assert first_error is not None  # there is always a way to try
            raise first_error
        if not smallest <= OTHER_VALUE:
            raise ValueError(
                f"no derivative of the batch's losses can be had: every pass that gives one finds other losses than a "
                f"plain pass does, by {smallest:.2g} of their norm or more. Does sample_loss draw random numbers that "
                "are not torch's, or keep a state of its own?"
            )
        return closest


def refuse_reentrant(value: Tensor) -> None:
    """Raises ValueError for a graph with a reentrant checkpoint in it. Its block is cut off from the graph unless its
    inputs require gradients, so that a derivative by some of the parameters would miss what goes through it."""
    met, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "the model checkpoints activations with use_reentrant=True, which knows no derivatives but those of a "
                "whole backward pass; use use_reentrant=False (torch recommends it; in transformers: "
                'gradient_checkpointing_enable({"use_reentrant": False}))'
            )
        met.add(node)
        waiting += [following for following, _ in node.next_functions]


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp(min=torch.finfo(whole.dtype).tiny))


Way = Callable[[PointFunction, Tensors, Tensors], tuple[Tensor, Tensor]]
"""The value of the function at the primals, and its derivatives in T directions, (T, *output shape)."""


def _vectorized(function: PointFunction, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """With all directions at once in forward mode."""
    primals = dict(primals)
    with torch.no_grad():
        values, derivatives = vmap(lambda tangent: _value_and_jvp(function, primals, tangent))(dict(tangents))
        return values[0], derivatives


def _one_by_one(function: PointFunction, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """One direction at a time in forward mode."""
    with torch.no_grad():
        pairs = [_value_and_jvp(function, dict(primals), tangent) for tangent in _directions(tangents)]
        return pairs[0][0], torch.stack([derivative for _, derivative in pairs])


def _value_and_jvp(function: PointFunction, primals: dict[str, Tensor], tangent: Tensors) -> tuple[Tensor, Tensor]:
    value, derivative = jvp(function, (primals,), (dict(tangent),))[:2]
    return value, derivative


def _by_dual_numbers(function: PointFunction, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """One direction at a time in forward mode, by plain dual numbers: tensors lie in memory as in a plain pass."""
    pairs = []
    for tangent in _directions(tangents):
        with torch.no_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(primal.detach(), tangent[name]) for name, primal in primals.items()}
            value, derivative = forward_ad.unpack_dual(function(duals))
            pairs.append((value, torch.zeros_like(value) if derivative is None else derivative))
    return pairs[0][0], torch.stack([derivative for _, derivative in pairs])


def _by_double_reverse(function: PointFunction, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """As the derivative of w ↦ Jᵀw, which is linear: two reverse passes for each direction."""
    leaves = _leaves(primals)

    def derivatives(output: Tensor) -> tuple[Tensor, Tensor]:
        # w → Jᵀw, with a graph; w itself does not matter
        weight = torch.zeros_like(output, requires_grad=True)
        rows = _pull(output, leaves, weight, create_graph=True)
        pulled = {name: row for name, row in rows.items() if row is not None}
        if not all(row.requires_grad for row in pulled.values()):
            raise RuntimeError("some operation's derivative cannot be differentiated again")

        # d⟨Jᵀw, v⟩/dw = J v
        def push(tangent: Tensors) -> Tensor:
            if not pulled:
                return torch.zeros_like(output)
            along = [tangent[name] for name in pulled]
            return torch.autograd.grad(list(pulled.values()), weight, along, retain_graph=True)[0]

        result = torch.stack([push(tangent) for tangent in _directions(tangents)]).detach()
        _prove_adjoint(result, tangents, output, leaves)
        return output.detach(), result

    return function.held(leaves, derivatives)


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


def _by_rows(function: PointFunction, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """From the whole Jacobian: a reverse pass for each output."""
    with torch.no_grad():
        value = function(primals)
    gradients = vjp_rows(function, primals)
    products = []
    for name, primal in primals.items():
        shape = gradients[name].shape[: gradients[name].ndim - primal.ndim]
        jacobian = gradients[name].reshape(shape.numel(), primal.numel())
        direction = tangents[name].reshape(-1, primal.numel())
        products.append(einsum(jacobian, direction, "o d, r d -> r o").unflatten(1, shape))
    return value, torch.stack(products).sum(0)


_WAYS: dict[str, Way] = {
    "in forward mode, all directions at once": _vectorized,
    "in forward mode, one direction at a time": _one_by_one,
    "by dual numbers, one direction at a time": _by_dual_numbers,
    "in reverse mode, one direction at a time": _by_double_reverse,
    "in reverse mode, one output at a time": _by_rows,
}
"""Ways to a directional derivative, the fastest first, and each with fewer demands on the model than the one before."""


def _directions(tangents: Tensors) -> Iterator[dict[str, Tensor]]:
    """One direction after the other, by parameter."""
    count = next(iter(tangents.values())).shape[0]
    return ({name: tangent[row] for name, tangent in tangents.items()} for row in range(count))


def vjp_rows(function: PointFunction, primals: Tensors, some: slice = slice(None)) -> dict[str, Tensor]:
    """The gradient of every entry of `function(primals)`, by parameter: each (*output shape, *parameter shape).

    One reverse pass for each entry; meant for few of them. Ordinary autograd, which knows every operation. some: of the
    entries along the last axis.
    """

    def weights(output: Tensor) -> Tensor:
        places = torch.arange(output.shape[-1], device=output.device)[some]
        return _basis(output).index_select(output.ndim - 1, places)

    return vjp_in(function, primals, weights)


def vjp_in(function: PointFunction, primals: Tensors, weights: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`Jᵀ w` for some weights w, by parameter: a reverse pass for each.

    weights: from the value of the function to the weights, (*rows, *output shape).

    Returns: each (*rows, *parameter shape).
    """
    leaves = _leaves(primals)

    def pull(output: Tensor) -> dict[str, Tensor]:
        given = weights(output)
        shape = given.shape[: given.ndim - output.ndim]
        rows = [_pull(output, leaves, weight) for weight in given.reshape(-1, *output.shape)]
        stacks = {name: _stacked([row[name] for row in rows], leaf) for name, leaf in leaves.items()}
        return {name: stack.reshape(*shape, *stack.shape[1:]) for name, stack in stacks.items()}

    return function.held(leaves, pull)


def prove_same(found: Tensors, wanted: Tensors) -> None:
    """Raises RuntimeError where gradients, which were taken in a faster way, are not those of a plain backward pass."""
    off = sum(float((found[name] - value).square().sum()) for name, value in wanted.items()) ** 0.5
    size = sum(float(value.square().sum()) for value in wanted.values()) ** 0.5
    eps = torch.finfo(next(iter(wanted.values())).dtype).eps
    if not off <= size * eps**0.4 + eps:
        raise RuntimeError(f"the fast way to gradients misses those of a backward pass by {off / max(size, 1e-30):.2g}")


def elsewhere(parameters: Tensors) -> dict[str, Tensor]:
    """Parameters that are not the model's own, at which a pass can be told from one that looks at the model's."""
    return {name: value * 1.01 + 1e-3 for name, value in parameters.items()}


def _basis(output: Tensor) -> Tensor:
    """(*output shape, *output shape): each entry alone."""
    return torch.eye(output.numel(), dtype=output.dtype, device=output.device).reshape(*output.shape, *output.shape)


def _stacked(rows: list[Tensor | None], like: Tensor) -> Tensor:
    filled = [torch.zeros_like(like) if row is None else row for row in rows]
    return (filled[0].unsqueeze(0) if len(filled) == 1 else torch.stack(filled)).detach()


def _leaves(primals: Tensors) -> dict[str, Tensor]:
    return {name: primal.detach().requires_grad_() for name, primal in primals.items()}


def _pull(output: Tensor, leaves: Tensors, weight: Tensor, create_graph: bool = False) -> dict[str, Tensor | None]:
    """`Jᵀ weight` by parameter; None for those that the output does not depend on."""
    if not output.requires_grad:
        return dict.fromkeys(leaves)
    if create_graph:
        pulled = torch.autograd.grad(
            output, list(leaves.values()), weight, retain_graph=True, create_graph=True, allow_unused=True
        )
        return dict(zip(leaves, pulled, strict=True))

    # A backward pass as training's: checkpointing with use_reentrant=True knows no other.
    for leaf in leaves.values():
        leaf.grad = None
    output.backward(weight, retain_graph=True)
    return {name: leaf.grad for name, leaf in leaves.items()}


def tell_of_fallback(how: str, reason: Exception) -> None:
    """Warns that influences are computed `how` from now on, since the faster way met the `reason`."""
    first_line = str(reason).split("\n")[0]
    warnings.warn(f"influences are computed {how}, since: {first_line}", ForwardModeFallbackWarning, stacklevel=4)
