"""The streaming reverse plan: a backward pass for each target, whose gradients are multiplied and dropped one by one.

For targets that are one or a few scalars; beside the step, one copy of the parameters is held, θ_s(t). A hook on every
parameter takes its inner products with each part of the step, Σ_θ φ_θ part_θ in float64, as soon as its gradient is
there, and drops it: φ never exists as a whole, nor does any part. It is plain autograd, with attention by the fused
kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.core.tensors import Tensors, cuts, size_in_bytes
from explaind_track.engine.directions import Wanted
from explaind_track.engine.functional import Functional
from explaind_track.engine.targets import target_of

BLOCK = 2**20
"""Entries that are multiplied in float64 at a time."""


@contextmanager
def streamed(leaves: Tensors, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, whenever a backward pass has a parameter's gradient, `take(name, gradient)` gets it, and nobody keeps it.

    leaves: the parameters that the pass goes back to, by name.
    """

    def hook(name: str) -> Callable[[Tensor], None]:
        def taken(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None  # the hook is called right behind its accumulation
            take(name, gradient)

        return taken

    handles = [leaf.register_post_accumulate_grad_hook(hook(name)) for name, leaf in leaves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for leaf in leaves.values():
            leaf.grad = None


def inner_product(one: Tensor, other: Tensor) -> Tensor:
    """⟨one, other⟩ of two flat tensors, in float64."""
    blocks = [torch.dot(one[rows].double(), other[rows].double()) for rows in cuts(0, len(one), BLOCK)]
    return torch.stack(blocks).sum() if blocks else one.new_zeros((), dtype=torch.float64)


class StreamingDerivatives:
    """A backward pass for each target of each query, or for each of those that all queries are reduced to."""

    copies = 1

    def __init__(self, functional: Functional, query: Query, step: Change, wanted: Wanted) -> None:
        self._functional, self._query, self._step, self._wanted = functional, query, step, wanted
        self._group_of = {name: place for place, names in enumerate(wanted.groups.values()) for name in names}
        self.held = size_in_bytes(step.before.parameters)  # θ_s(t)

    def at(self, state: State, chunk: Query) -> tuple[Tensor, Tensor]:
        leaves = {name: state.parameters[name].detach().requires_grad_() for name in self._step.moved}
        function = self._functional.at(state, target_of(self._query, chunk))
        products = function.held(leaves, lambda targets: self._products(targets, leaves))
        parts = len(self._wanted.parts)
        return products[:parts], products[parts:].sum((0, 1))

    def _products(self, targets: Tensor, leaves: Tensors) -> Tensor:
        """The gradients' inner products with each part, and last the rounding if wanted, by group: (R, G, x, O)."""
        wanted = self._wanted
        products = torch.zeros(wanted.rows, len(wanted.groups), targets.numel(), dtype=torch.float64)

        for place, target in enumerate(targets.flatten()):
            # Σ_{θ of this parameter} φ_θ part_θ
            def take(name: str, gradient: Tensor, place: int = place) -> None:
                flat = gradient.reshape(-1)
                for piece, rows in self._step.pieces(name, wanted.parts, wanted.rounding):
                    found = torch.stack([inner_product(flat[piece], row) for row in rows])
                    products[:, self._group_of[name], place] += found.cpu()

            if target.requires_grad:
                with streamed(leaves, take):
                    target.backward(retain_graph=place + 1 < targets.numel())
        return products.reshape(*products.shape[:2], *targets.shape).to(targets)
