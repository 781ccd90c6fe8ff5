"""The proof of a step: a rule is only believed where it explains how the optimizer moved a parameter."""

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from explaind_track.core.update import Update
from explaind_track.errors import UnexplainedUpdateError

LOW_PRECISION_UNITS = 16
"""In bfloat16 and float16, a part may be off by so many eps: each of an optimizer's operations, about five, rounds by
half of one. In bfloat16, the 64 of float32 would be half of the part, and no rule could be told from a wrong one."""

LOW_PRECISION_SHARE = 1 / 8
"""θ itself is rounded twice at most, by weight decay and by the step: two eps of it may be rounding."""


WHOLLY_PROVEN, PROVE_EVERY, SHARE = 10, 100, 8


class Proof:
    """Proves an optimizer's steps, each wholly; or `in_part`: so are the first, and from then on one in so many, and of
    the others each time another eighth of the parameters' entries."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self._optimizer, self._parameters = type(optimizer).__name__, parameters
        self.in_part = False

    def prove(self, number: int, updates: Mapping[str, Update], wholly: bool = False) -> None:
        """Raises UnexplainedUpdateError where the rule does not explain a step to within float rounding."""
        wholly |= not self.in_part or number < WHOLLY_PROVEN or number % PROVE_EVERY == 0
        types = {name: self._parameters[name].dtype for name in updates}
        require_explained(
            self._optimizer, updates, types, slice(None) if wholly else slice(number % SHARE, None, SHARE)
        )


def require_explained(
    optimizer: str, updates: Mapping[str, Update], types: Mapping[str, torch.dtype], pieces: slice = slice(None)
) -> None:
    """Raises UnexplainedUpdateError where a rule does not explain a step to within float rounding.

    optimizer: the name of its class. types: those of the parameters in training, by name. pieces: which of all updates'
    pieces are looked at.
    """
    every = ((name, piece) for name, update in updates.items() for _, piece in update.pieces())
    above = [_above(piece, types[name]) for name, piece in islice(every, pieces.start, None, pieces.step)]
    if not above or bool((torch.stack([value.to(above[0]) for value in above]) <= 0).all()):
        return

    excess = {name: _excess(update, types[name]) for name, update in updates.items()}
    name = max(excess, key=excess.__getitem__)
    if excess[name] <= 1:
        return  # whatever is not finite was so before the step
    raise UnexplainedUpdateError(
        f"the rule for {optimizer} does not explain how it changed '{name}': "
        f"{excess[name]:.3g} times what float rounding allows. Either something else "
        f"changed the parameter between {optimizer}.step()'s start and end, or this class needs a rule of its "
        f"own: register one with @explaind_track.update_rule.register{_float16_advice(types[name])}"
    )


def _above(update: Update, dtype: torch.dtype) -> Tensor:
    """By how much the rest is above what float rounding allows, where that is most; NaN where any of it is."""
    rest, limit = _rest_and_limit(update, dtype)
    return rest.sub_(limit).amax() if rest.numel() else rest.new_zeros(())


def _excess(update: Update, dtype: torch.dtype) -> float:
    """The largest |θ_s − θ_{s+1} − parts| in units of what float rounding allows, infinite where finite numbers became
    others; numbers that were not finite before the step tell nothing."""
    rest, limit = _rest_and_limit(update, dtype)

    # where momentum and gradient cancel, the rounding of both stays: |P e M_s| ≤ |u_s| + |P d G_s|
    own = update.precondition(update.kernel_gradient() * update.rule.d).abs_()
    limit += own.mul_(64 * torch.finfo(update.rule.precision or limit.dtype).eps)
    excess = torch.where(rest <= limit, 0.0, (rest / limit).nan_to_num(nan=torch.inf))
    told = update.before.isfinite() & update.gradient.isfinite()
    return float(torch.where(told, excess, 0.0).max()) if excess.numel() else 0.0


def _rest_and_limit(update: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """|θ_s − θ_{s+1} − parts|, and what float rounding allows of it, elementwise.

    dtype: the parameter's in training.
    """
    rest, size = update.before - update.after, update.before.abs()
    is_low = dtype is not size.dtype  # upcast: what was rounded to `dtype` is rounded far coarser than float32
    if is_low:
        size.mul_(LOW_PRECISION_SHARE)

    def take(part: Tensor) -> None:  # one at a time, for of a large embedding each is as large
        nonlocal rest, size
        rest -= part
        size += part.abs_()

    take(update.kernel())
    take(update.regularization())
    for name in update.contributions:
        if name != "regularization":
            take(update.contribution(name))

    if is_low and update.rule.precision is None:
        info = torch.finfo(dtype)
        return rest.abs_(), size.mul_(LOW_PRECISION_UNITS * info.eps).add_(info.smallest_normal * info.eps)
    return rest.abs_(), size.mul_(64 * torch.finfo(update.rule.precision or size.dtype).eps)


def _float16_advice(dtype: torch.dtype) -> str:
    if dtype is not torch.float16:
        return ""
    return (
        ". In float16, squared gradients below 6e-8 vanish from the optimizer's state and an eps of 1e-8 is 0, so "
        "that a step may divide by 0, and that of a fused optimizer does not follow from what it keeps: train float32 "
        "parameters under autocast, or pass eps=1e-4 and foreach=True"
    )
