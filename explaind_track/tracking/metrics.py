"""From the influences of a step to the numbers of its row."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from explaind_track.record.history import (
    DIFFERENCE,
    KERNEL,
    LOSS,
    MOMENTUM,
    TOTAL,
    change_key,
    importance_key,
    section_of_part,
    share_row,
    whole_change_key,
)


def importance_row(
    parts: Sequence[str], groups: Sequence[str], row: Mapping[str, Tensor], query: str = ""
) -> dict[str, float]:
    """Ψ̄ of every part through every group and all together, and D; row: of an accumulator that keeps step and group.

    query: the query's name, empty for the first. What has changed the model behind the last step has no D.
    """
    metrics: dict[str, float] = {}
    for part, values, total in zip(parts, row["importance"].tolist(), row["total_importance"].tolist(), strict=True):
        section = section_of_part(part)
        for group, value in zip(groups, values, strict=True):
            metrics[importance_key(section, group, query)] = value
        metrics[importance_key(section, TOTAL, query)] = total

    if "kernel" not in parts:
        return metrics
    kernel, decay = (row["influence"][parts.index(part)] for part in ("kernel", "regularization"))
    difference = kernel - decay
    for group, value in zip(groups, difference.tolist(), strict=True):
        metrics[importance_key(DIFFERENCE, group, query)] = value
    metrics[importance_key(DIFFERENCE, TOTAL, query)] = float(difference.sum())
    return metrics


def change_row(
    parts: Sequence[str], groups: Sequence[str], row: Mapping[str, Tensor], scale: float, loss: str = LOSS
) -> dict[str, float]:
    """−Ψ of every part through every group: how much each changed the loss in this step, times `scale`.

    loss: the query's name, for all but the first loss. Of the momentum share, only the sum over the groups is shown.
    """
    metrics: dict[str, float] = {}
    for part, values in zip(parts, (row["influence"] * -scale).tolist(), strict=True):
        section = section_of_part(part)
        if part != "momentum":
            for group, value in zip(groups, values, strict=True):
                metrics[change_key(section, group, loss)] = value
        metrics[change_key(section, TOTAL, loss)] = sum(values)
    metrics[whole_change_key(loss)] = float(row["change"]) * scale

    # of the kernel, the gradients of this step and those of earlier ones
    if "momentum" in parts and "kernel" in parts:
        totals = {section_of_part(part): metrics[change_key(section_of_part(part), TOTAL, loss)] for part in parts}
        totals[KERNEL] -= totals[MOMENTUM]
        metrics |= share_row(totals, loss)
    return metrics
