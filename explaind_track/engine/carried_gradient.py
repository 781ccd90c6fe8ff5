"""The trapezoid of a query's one target, with its gradient carried from each step to the one that follows.

    Ψ_s(part, Θ_g) = ½ ⟨∇f_{θ_s} + ∇f_{θ_{s+1}}, part restricted to Θ_g⟩

∇f_{θ_s} is kept, one copy of the parameters; a pass at θ_{s+1} multiplies it, together with the new one, by the step's
parts, parameter by parameter, and leaves the new one in its place. Where a step does not follow on the one before, a
pass at θ_s comes first.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from explaind_track.core.groups import Groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Change, State
from explaind_track.engine.live_gradients import Take
from explaind_track.engine.step_products import Feature, step_products

GradientAt = Callable[[State, Collection[str], Sequence[Query], Take], Tensor]
"""Gives out the gradient at a state with respect to these parameters, of a query in chunks; returns the target."""


class CarriedGradient:
    """For one query and one set of groups."""

    def __init__(self, gradient_at: GradientAt, groups: Groups, on_host: bool) -> None:
        """on_host: whether what is kept between steps lies in the host's memory, not on the model's device."""
        self._gradient_at, self._on_host = gradient_at, on_host
        self._group_of = {name: place for place, names in enumerate(groups.values()) for name in names}
        self._groups = len(groups)
        self._mark: object = None
        """Of the change at whose end the gradient was taken; None: there is none."""
        self._kept: dict[str, Tensor] = {}
        """The gradient there; of a parameter that the target does not depend on, nothing."""
        self._covered: frozenset[str] = frozenset()
        """The parameters with respect to which it was taken."""
        self._value = torch.zeros(())

    def along(
        self, change: Change, chunks: Sequence[Query], parts: Sequence[str], rest: bool, buffers_move: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The influences of a change's parts, and with `rest`, last of what they leave over, by group, (R, G) in
        float64; and the target at both ends, with the buffers of the first, (1, 1).

        buffers_move: whether the model's buffers are others at the end, so that what was found there serves no more.
        """
        moved = frozenset(change.moved)
        follows = self._mark is not None and change.follows is self._mark and moved <= self._covered
        self._mark = None  # until all is in its place
        names = self._covered | moved
        before = self._value if follows else self._start(change.before, names, chunks)

        sums = torch.zeros(len(parts) + rest, self._groups, dtype=torch.float64)
        products = _Products(change, self._kept, self._group_of, parts, rest, self._on_host, sums)
        after = self._gradient_at(change.point(1), names, chunks, products.take)
        products.finish(names)

        self._covered, self._value = names, after
        self._mark = None if buffers_move else change.mark
        return sums, before, after

    def _start(self, state: State, names: frozenset[str], chunks: Sequence[Query]) -> Tensor:
        self._kept.clear()

        def keep(name: str, gradient: Tensor, is_last: bool) -> None:
            _put(self._kept, name, gradient, self._on_host)

        return self._gradient_at(state, names, chunks, keep)


class _Products:
    """Those of a change's parts with the mean of two gradients: that at its beginning, which is kept, and that at its
    end, whose chunks come one after the other and take its place."""

    def __init__(
        self,
        change: Change,
        kept: dict[str, Tensor],
        group_of: dict[str, int],
        parts: Sequence[str],
        rest: bool,
        on_host: bool,
        sums: Tensor,
    ) -> None:
        """sums: of the products, (R, G), to be added to."""
        self._change, self._kept, self._group_of = change, kept, group_of
        self._parts, self._rest, self._on_host = parts, rest, on_host
        self._moved = frozenset(change.moved)
        self._begun: set[str] = set()
        """The parameters of which what is kept is of the end by now."""
        self._done: set[str] = set()
        """Those whose products are all in."""
        self._sums = sums

    def take(self, name: str, gradient: Tensor, is_last: bool) -> None:
        """Takes in the gradient of one parameter on one chunk."""
        if name in self._begun:
            _put(self._kept, name, gradient, self._on_host)
            if is_last:
                self._multiply_kept(name)
                self._done.add(name)
            return

        if is_last:  # both together: one sweep
            self._multiply(name, self._mean_with(name, gradient.view(-1)))
            self._done.add(name)
        else:
            self._multiply_kept(name)
        self._kept.pop(name, None)
        _put(self._kept, name, gradient, self._on_host)
        self._begun.add(name)

    def finish(self, names: Collection[str]) -> None:
        """Takes in what the last chunk's pass did not come to."""
        for name in names:
            if name not in self._done:
                self._multiply_kept(name)
            if name not in self._begun:  # the target does not depend on it there
                self._kept.pop(name, None)

    def _mean_with(self, name: str, gradient: Tensor) -> Feature:
        if name not in self._kept:
            return lambda rows: gradient[rows] * 0.5
        kept = self._kept[name].view(-1)
        # ½ (∇f_{θ_s} + ∇f_{θ_{s+1}})
        return lambda rows: kept[rows].to(gradient.device).add(gradient[rows]).mul_(0.5)

    def _multiply_kept(self, name: str) -> None:
        """What is kept counts half, whichever end it is of."""
        if name in self._kept:
            kept = self._kept[name].view(-1)
            device = self._change.before.parameters[name].device
            self._multiply(name, lambda rows: kept[rows].to(device) * 0.5)

    def _multiply(self, name: str, feature: Feature) -> None:
        if name in self._moved and len(self._sums):
            found = step_products(self._change, name, feature, self._parts, self._rest)
            self._sums[:, self._group_of[name]] += found.cpu()


def _put(kept: dict[str, Tensor], name: str, gradient: Tensor, on_host: bool) -> None:
    """Adds a gradient, which nobody else holds, to what is kept of the parameter."""
    own = gradient.cpu() if on_host else gradient
    if name in kept:
        kept[name].add_(own)
    else:
        kept[name] = own.contiguous()
