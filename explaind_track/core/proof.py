"""The proof of a step: a rule is only believed where it explains how the optimizer moved a parameter."""

from collections.abc import Mapping

import torch
from torch import Tensor

from explaind_track.core.update import Update
from explaind_track.errors import UnexplainedUpdateError

LOW_PRECISION_UNITS = 16
"""In bfloat16 and float16, a part may be off by so many eps: each of an optimizer's operations, about five, rounds by
half of one. In bfloat16, the 64 of float32 would be half of the part, and no rule could be told from a wrong one."""

LOW_PRECISION_SHARE = 1 / 8
"""θ itself is rounded twice at most, by weight decay and by the step: two eps of it may be rounding."""


def require_explained(optimizer: str, updates: Mapping[str, Update], types: Mapping[str, torch.dtype]) -> None:
    """Raises UnexplainedUpdateError where a rule does not explain a step to within float rounding.

    optimizer: the name of its class. types: those of the parameters in training, by name.
    """
    kept = [torch.le(*_rest_and_limit(update, types[name])).all() for name, update in updates.items()]
    if not kept or bool(torch.stack([flag.to(kept[0].device) for flag in kept]).all()):
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
