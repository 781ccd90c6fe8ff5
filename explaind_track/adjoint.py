"""The optimizer, walked backwards: how the targets depend on each step's gradient, with all that momentum carried on.

The kernel part of step s is `P_s (e_s M_s + d_s G_s)` with `M_s = β_s M_{s−1} + b_s Q_s G_s` (see `rules`). Its adjoint
is

    μ_s = e_s P_s φ_s^test + β_{s+1} μ_{s+1}

and sample k acts through its gradient at step i by `w_{i,k} ⟨b_i Q_i μ_i + d_i P_i φ_i^test, ∇L_k(θ_i)⟩`: all that this
gradient does in step i and later, without a momentum buffer for the sample.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from explaind_track.step import Step, Tensors


class Adjoint:
    """μ of R targets, for each of A acting steps (one for each step of a window, or one for all of them together).
    Takes A × R copies of the parameters."""

    def __init__(self, acting: int = 1) -> None:
        self._acting = acting
        self._mu: dict[str, Tensor] = {}
        self._decay: dict[str, float] = {}

    def back(self, step: Step, features: Mapping[str, Tensor] | None, slot: int = 0) -> dict[str, Tensor]:
        """Goes back over a step. features: φ^test (R, *shape) by parameter (written over), None for a step outside of
        the window; slot: which of the A acting steps they belong to.

        Returns the directions whose product with `w_k ∇L_k` is the influence, (A·R, *shape) by parameter.
        """
        directions = {}
        for name, update in step.updates.items():
            own = None if features is None else update.precondition(features.pop(name))  # type: ignore[attr-defined]
            direction = self._through_buffer(name, step, own, slot)
            if own is not None and update.rule.d:
                if direction is None:
                    direction = own.new_zeros(self._acting, *own.shape)
                direction[slot].add_(own, alpha=update.rule.d)
            if direction is not None:
                directions[name] = direction.flatten(0, 1)
        return directions

    def _through_buffer(self, name: str, step: Step, own: Tensor | None, slot: int) -> Tensor | None:
        update = step.updates[name]
        if update.rule.buffer is None:
            return None
        mu = self._mu.get(name)
        if mu is None:
            if own is None:
                return None
            mu = self._mu[name] = own.new_zeros(self._acting, *own.shape)
        if own is not None:
            mu[slot].add_(own, alpha=update.rule.e)
            self._decay[name] = 1.0
        direction = update.entered(mu.clone())
        mu.mul_(update.rule.beta)
        self._decay[name] *= abs(update.rule.beta)
        return direction

    @property
    def spent(self) -> bool:
        """Whether no parameter's μ can be told from 0 any more, next to what it was within the window."""
        return all(decay < torch.finfo(self._mu[name].dtype).eps for name, decay in self._decay.items())


def inner(directions: Tensors, gradient: Tensors) -> Tensor:
    """⟨direction, gradient⟩ over all parameters, (R,)."""
    products = [value.reshape(len(value), -1) @ gradient[name].flatten() for name, value in directions.items()]
    return torch.stack(products).sum(0)
