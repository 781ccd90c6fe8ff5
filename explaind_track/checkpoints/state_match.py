"""Whether an optimizer's states belong to their parameters, told by the gradient of one batch.

A second moment `v` is a mean of squared gradients, so that a batch's `g²` is large where `v` is. A sum that adds up
does not tell: a step taken with another parameter's state adds up as well.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from explaind_track.core.tensors import Tensors

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""What torch's optimizers call a mean or sum of squared gradients."""
SIDE = 64
"""Columns of a tensor that are compared, and rows; more rows where there are fewer columns."""
CERTAIN = 2.0
"""Standard errors by which another's state has to fit better, to be called the parameter's own. Right states of three
checkpoints of the recipe `llm_pretraining`, by batches of 8 sequences, reach 1.2 at most."""
TINY = 1e-38


@dataclass(frozen=True)
class StateMatch:
    """What one batch's gradient tells of the states."""

    correlation: float
    """The median over tensors of the rank correlation between the row means of `v` and of `g²`: around 0.3 to 0.7
    where states are their parameters', 0 where they are others'."""
    misplaced: dict[str, str]
    """Parameters whose state is another's, each with the one whose state fits it; among tensors of one shape."""
    undecided: int
    """Tensors whose state this batch cannot tell from that of another of their shape; a larger one may."""


def match_states(second: Tensors, gradients: Tensors) -> StateMatch:
    """Compares second moments with the gradient of a batch.

    Args:
        second: `v` by parameter.
        gradients: Of one batch of the training mixture, at the checkpoint's weights, by parameter; of `v`'s shapes.
    """
    correlations = [_correlation(_rows(second[name]), _rows(gradients[name].square())) for name in second]
    known = [value for value in correlations if not math.isnan(value)]
    median = float(torch.tensor(known).median()) if known else math.nan

    # g² of a batch and v differ by a factor that is the same everywhere: that of their batch sizes
    logs = {name: (_sampled(gradients[name]).square().clamp_(TINY).log_(), _sampled(second[name]).clamp_(TINY).log_())
            for name in second}  # fmt: skip
    scale = (
        torch.cat([(squared - held).flatten() for squared, held in logs.values()]).median() if logs else torch.zeros(())
    )

    misplaced: dict[str, str] = {}
    undecided = 0
    for names in _of_one_shape(second):
        squared, held = (torch.stack([logs[name][side] for name in names]) for side in (0, 1))
        order, unsure = _best_order(squared - scale, held)
        misplaced |= {name: names[place] for name, place in zip(names, order, strict=True) if names[place] != name}
        undecided += unsure
    return StateMatch(median, misplaced, undecided)


def _best_order(squared: Tensor, held: Tensor) -> tuple[list[int], int]:
    """Which state fits which parameter, found by exchanging the two that gain most, until none gains for certain.

    Args:
        squared: The logs of `g²`, (N, rows, columns).
        held: The logs of `v`, (N, rows, columns).

    Returns:
        For every parameter the place of the state that fits it, and how many have a state which others might fit.
    """
    order = list(range(len(held)))
    for _ in order:
        gains = torch.stack([_gains_of_exchange(squared, held[order], place) for place in range(len(order))])
        first, second = divmod(int(gains.argmax()), len(order))
        if gains[first, second] < CERTAIN:
            break
        order[first], order[second] = order[second], order[first]
    unsure = (gains > -CERTAIN).sum(1) > 1  # with itself, nothing is gained
    return order, int(unsure.sum())


def _gains_of_exchange(squared: Tensor, held: Tensor, place: int) -> Tensor:
    """By how many standard errors all would fit better, had a parameter and each other exchanged their states (N,).

    Numbers of a row go up and down together, and so do those of a column: only their means are independent,
    var = var(row means) / rows + var(column means) / columns.
    """
    own = _misfit(squared, held)
    exchanged = _misfit(squared[place], held) + _misfit(squared, held[place])
    gain = own + own[place] - exchanged
    variance = _variance_of_mean(gain.mean(2)) + _variance_of_mean(gain.mean(1))
    return gain.mean((1, 2)) / (variance.sqrt() + TINY)


def _variance_of_mean(values: Tensor) -> Tensor:
    """Of independent values, (N, values) to (N,); 0 of a single one."""
    count = values.shape[1]
    return values.var(1) / count if count > 1 else values.new_zeros(len(values))


def _misfit(squared: Tensor, held: Tensor) -> Tensor:
    """Minus the log-likelihood of each number, where `g/√v` is Cauchy's: a few outliers decide nothing."""
    return torch.log1p((squared - held).exp()) + held / 2


def _of_one_shape(tensors: Tensors) -> Iterator[list[str]]:
    shapes: dict[torch.Size, list[str]] = {}
    for name, value in tensors.items():
        shapes.setdefault(value.shape, []).append(name)
    return (names for names in shapes.values() if len(names) > 1)


def _sampled(tensor: Tensor) -> Tensor:
    """Some rows and columns of a tensor, which depend on its shape alone, in float64: (rows, columns)."""
    matrix = tensor.detach().reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.detach().reshape(-1, 1)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator).to(tensor.device) for size in matrix.shape)
    width = min(SIDE, matrix.shape[1])
    return matrix[rows[: SIDE * SIDE // max(width, 1)]][:, columns[:width]].double()


def _rows(tensor: Tensor) -> Tensor:
    """Means over all axes but the first."""
    return tensor.detach().double().reshape(tensor.shape[0] if tensor.ndim else 1, -1).mean(1)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: of the ranks. NaN for fewer than 4 rows, or where all are alike."""
    if first.numel() < 4 or first.unique().numel() == 1:
        return math.nan
    one, other = (pd.Series(values.cpu().numpy()).rank() for values in (first, second))
    return float(one.corr(other))
