"""⟨φ, part⟩ of one parameter for every part of a step, without the parts.

Every part is linear in what the optimizer was given, by way of P, which is its own adjoint (`core.rules`):

    ⟨φ, P (e M + d G)⟩ = e ⟨P φ, M⟩ + d ⟨P φ, G⟩

So φ goes through P once, and the rest are inner products with what lies there: the momentum buffer, the gradient, θ_s,
and the shares of both. They are taken piece by piece, in float64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from explaind_track.core.step import Change, Step
from explaind_track.core.update import Contribution, Update
from explaind_track.engine.streaming import inner_product

Feature = Callable[[slice], Tensor]
"""φ at some of a parameter's entries, flat: a fresh tensor. It is asked for all of them, each once."""


def step_products(change: Change, name: str, feature: Feature, parts: Sequence[str], rest: bool) -> Tensor:
    """The products of a parameter's φ with these parts of its change, and with `rest`, last with what they leave over;
    float64, (R,)."""
    if isinstance(change, Step):
        found = [_products(piece, feature(rows), parts, rest) for rows, piece in change.updates[name].pieces()]
    else:
        found = [
            torch.stack([inner_product(feature(rows), row) for row in pieces])
            for rows, pieces in change.pieces(name, parts, rest)
        ]
    # of many processes, some have no entries of a small parameter
    return torch.stack(found).sum(0) if found else torch.zeros(len(parts) + rest, dtype=torch.float64)


def _products(update: Update, feature: Tensor, parts: Sequence[str], rest: bool) -> Tensor:
    rule, zero = update.rule, feature.new_zeros((), dtype=torch.float64)
    wide = feature.to(torch.float64, copy=True) if rule.decoupled or rest else feature  # P may write over φ
    through = update.precondition(feature.reshape(update.before.shape))  # P φ
    wide_through = _wide(through)

    def product(tensor: Tensor | None, factor: float = 1.0) -> Tensor:
        """The product ⟨P φ, tensor⟩, times a factor."""
        return zero if tensor is None or not factor else torch.dot(wide_through, _wide(tensor)) * factor

    def given(part: Contribution) -> Tensor:
        """⟨φ, P (e · buffer + d · gradient)⟩."""
        return product(part.buffer, rule.e) + product(part.gradient, rule.d)

    # u_s = P (e B + d G), less what others than the samples have put in
    found = {part: given(contribution) for part, contribution in update.contributions.items()}
    kernel = given(Contribution(rule.buffer, update.gradient)) - sum(found.values(), zero)

    # r_s = P (e R + d λ θ_s) + γ θ_s
    decay = found.get("regularization", zero) + product(update.before, rule.d * rule.coupled)
    if rule.decoupled:
        decay = decay + torch.dot(wide, _wide(update.before)) * rule.decoupled
    found |= {"kernel": kernel, "regularization": decay}

    if rest:
        moved = torch.dot(wide, _wide(update.before) - _wide(update.after))
        found["rest"] = moved - sum(found.values(), zero)
    if "momentum" in parts and rule.buffer is not None:
        # P e β M_{s−1} = u_s − P (d G + e b Q G)
        gradient = update.kernel_gradient()
        found["momentum"] = kernel - product(gradient, rule.d + (0 if rule.enter else rule.e * rule.b))
        if rule.enter is not None:
            found["momentum"] -= torch.dot(_wide(update.into_buffer(through)), _wide(gradient)) * rule.e
    return torch.stack([found.get(part, zero) for part in (*parts, *(["rest"] if rest else []))])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).double()
