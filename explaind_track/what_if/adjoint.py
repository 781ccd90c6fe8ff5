"""The adjoint of a run: how its targets depend on parameters and optimizer state before each step, carried backwards.

With λ = ∂f/∂θ_{s+1} and λ_B = ∂f/∂B_{s+1} for every tensor B of the optimizer's state, the optimizer's own arithmetic
gives, by its vjp, the adjoints of what it was given: of θ_s, of B_s, of the gradient G_s, and of its rate and decay. Of
AdamW, for one,

    λ_m ← λ_m − α/(c₁ den) λ          λ_v ← λ_v + α m̂ / (2 c₂ √v̂ den²) λ          den = √v̂ + ε
    λ_G = (1−β₁) λ_m + 2 (1−β₂) G λ_v,    λ ← (1 − αλ_wd) λ,    λ_m ← β₁ λ_m,    λ_v ← β₂ λ_v

What the loop has done to the gradient (clipping) is gone back through next. What is left to add is the dependence of
the gradient itself on θ_s: a Hessian-vector product, see `curvature`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.alterations import Alteration
from explaind_track.core.tensors import Tensors
from explaind_track.errors import UnexplainedUpdateError
from explaind_track.what_if.optimizer_steps import differentiable_step
from explaind_track.what_if.snapshots import Snapshot
from explaind_track.what_if.step_gradients import alter

COUNTS = ("step", "mu_product")
"""What optimizers keep that depends on no gradient."""


@dataclass
class Adjoint:
    """λ and λ_B of R targets."""

    parameters: dict[str, Tensor]
    """(R, *shape) by parameter."""
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By parameter and by name in the optimizer's state, (R, *shape) each."""

    def through_optimizer(self, snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """Goes back through the optimizer's step.

        Returns λ_G by parameter, (R, *shape); and by the optimizer's group, what the targets' derivatives by its
        rate and decay in this step are, (R,) each.
        """
        gradients: dict[str, Tensor] = {}
        settings: dict[int, tuple[Tensor, Tensor]] = {}
        for name, gradient in snapshot.record.gradients.items():
            found = self._through_one(snapshot, name, gradient)
            place = snapshot.settings[name][0]
            rate, decay = settings.get(place, (0.0, 0.0))
            settings[place] = (rate + found["lr"], decay + found["weight_decay"])
            if name not in snapshot.record.frozen:
                gradients[name] = found["gradient"]
        return gradients, settings

    def _through_one(self, snapshot: Snapshot, name: str, gradient: Tensor) -> dict[str, Tensor]:
        before, state = snapshot.step.before.parameters[name], snapshot.states[name]
        own = snapshot.settings[name][1]

        # what it depends on
        inputs = {"parameter": before, "gradient": gradient}
        inputs |= {key: before.new_tensor(own[key]) for key in ("lr", "weight_decay") if key in own}
        kept = {key: value for key, value in state.items() if key not in COUNTS and _is_like(value, before)}
        leaves = {key: value.detach().clone().requires_grad_() for key, value in (*inputs.items(), *kept.items())}

        # the step
        with torch.enable_grad():
            settings = {**own, "lr": leaves["lr"], "weight_decay": leaves.get("weight_decay", 0.0)}
            held = {**state, **{key: leaves[key] for key in kept}}
            after, made = differentiable_step(
                snapshot.optimizer, leaves["parameter"], leaves["gradient"], held, settings
            )
        _require_same(snapshot, name, after.detach())

        # its vjp
        adjoints, outputs = [self.parameters[name]], [after]
        own_state = self.state.get(name, {})
        for key, value in made.items():
            if key in own_state:
                adjoints.append(own_state[key])
                outputs.append(value)
        rows = torch.autograd.grad(
            outputs, list(leaves.values()), adjoints, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
        found = dict(zip(leaves, rows, strict=True))
        self.parameters[name] = found["parameter"]
        self.state[name] = {key: found[key] for key in kept}
        return {**found, "weight_decay": found.get("weight_decay", torch.zeros_like(found["lr"]))}


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()


def _require_same(snapshot: Snapshot, name: str, after: Tensor) -> None:
    """Raises UnexplainedUpdateError where the differentiable step is not the optimizer's own."""
    wanted, before = snapshot.after[name], snapshot.step.before.parameters[name]
    off, way = float((after - wanted).norm()), float((wanted - before).norm())
    eps = torch.finfo(after.dtype).eps
    if not off <= max(eps**0.6, 64 * eps) * way + 16 * eps * float(before.norm()):
        raise UnexplainedUpdateError(
            f"at step {snapshot.step.number}, the differentiable step of {type(snapshot.optimizer).__name__} takes "
            f"'{name}' elsewhere than the optimizer's own did, by {off / max(way, 1e-300):.2g} of its way: this class "
            "needs a step of its own, registered with @explaind_track.what_if.differentiable_step.register"
        )


def through_alterations(
    alterations: Sequence[Alteration], gradient: Mapping[str, Tensor], adjoint: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Goes back through what the loop has done to a step's whole gradient.

    gradient: as it was before. adjoint: of what became of it, (R, *shape) by parameter.
    """
    now = {name: value.clone() for name, value in gradient.items()}
    met: list[tuple[Alteration, dict[str, Tensor], float]] = []
    for alteration in alterations:
        start = {name: value.clone() for name, value in now.items()}
        met.append((alteration, start, alter(alteration, now)))

    for alteration, start, factor in reversed(met):
        if alteration.kind == "value":
            limit = alteration.amount
            adjoint = {name: value * (start[name].abs() <= limit) for name, value in adjoint.items()}
            continue
        scaled = {name: value * factor for name, value in adjoint.items()}

        # c = M / (‖G‖ + 1e-6), where that is below 1:  λ_G = c λ − c²/(M ‖G‖) ⟨λ, G⟩ G
        if alteration.kind == "norm" and factor < 1:
            norm = float(sum(value.square().sum() for value in start.values())) ** 0.5
            along = inner(adjoint, start) * (factor**2 / (alteration.amount * norm))
            scaled = {name: value - _times(along, start[name]) for name, value in scaled.items()}
        adjoint = scaled
    return adjoint


def _times(factors: Tensor, tensor: Tensor) -> Tensor:
    """The tensor times each of R numbers, (R, *shape)."""
    return factors.reshape(-1, *[1] * tensor.ndim) * tensor


def inner(rows: Tensors, tensors: Tensors) -> Tensor:
    """⟨row, tensor⟩ over all parameters, (R,)."""
    return torch.stack([value.flatten(1) @ tensors[name].flatten() for name, value in rows.items()]).sum(0)
