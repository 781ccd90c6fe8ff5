"""Whether an optimizer's states belong to their parameters, told by the gradient of one batch.

A second moment `v` is a mean of squared gradients, so that a batch's `g²` is large where `v` is. A sum that adds up
does not tell: a step taken with another parameter's state adds up as well.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from explaind_track.core.tensors import Tensors

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""What torch's optimizers call a mean or sum of squared gradients."""
SIDE = 64
"""Columns of a tensor that are compared, and rows; more rows where there are fewer columns."""
FALSE_ALARM = 0.01
"""The chance, among the tensors of one shape, that a right state is called another's: over all their pairs, by
Student's distribution. `tests/benchmarks/test_states_told_apart.py` says what that comes to."""
AGREEING = 1.0
"""Standard errors by which the pattern within the tensors has to fit better as well, whatever their sizes are: these
move together while a run begins, so that another's state may fit better by its size alone."""
SUSPECT = 2.0
"""Standard errors by which others have to fit better to be told of, which right states sometimes do."""
SHUFFLES = 999
"""Random orders of the states among parameters of equal shape, beside which the order at hand is seen."""
TINY = 1e-38


Misfit = Callable[[Tensor, Tensor], Tensor]


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
    chance: float
    """The share of random orders, among parameters of equal shape, in which states fit as well as in theirs: 0.001
    where they are their parameters', whose order is one of 1,000; NaN where no two parameters have one shape."""
    suspected: tuple[str, ...]
    """Pairs of parameters whose states fit better exchanged, though not for certain, as words."""


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
    suspected: list[str] = []
    costs: list[Tensor] = []
    for names in _of_one_shape(second):
        squared, held = (torch.stack([logs[name][side] for name in names]) for side in (0, 1))
        order, unsure, pair = _best_order(squared - scale, held)
        misplaced |= {name: names[place] for name, place in zip(names, order, strict=True) if names[place] != name}
        undecided += unsure
        suspected += [" and ".join(names[order[place]] for place in pair)] if pair else []
        costs.append(torch.stack([_misfit(one - scale, held).mean((1, 2)) for one in squared]))
    return StateMatch(median, misplaced, undecided, _chance(costs), tuple(suspected))


def _chance(costs: list[Tensor]) -> float:
    """The share of random orders that fit as well as the one at hand. costs: the misfit of each parameter with each
    state of its shape, (N, N) for each shape."""
    if not costs:
        return math.nan
    generator = torch.Generator().manual_seed(0)
    own = sum(float(cost.trace()) for cost in costs)
    as_good = 0
    for _ in range(SHUFFLES):
        shuffled = 0.0
        for cost in costs:
            places = torch.arange(len(cost))
            shuffled += float(cost[places, torch.randperm(len(cost), generator=generator)].sum())
        as_good += shuffled <= own
    return (1 + as_good) / (1 + SHUFFLES)


def _best_order(squared: Tensor, held: Tensor) -> tuple[list[int], int, list[int]]:
    """Which state fits which parameter, found by exchanging the two that gain most, until none gains for certain.

    Args:
        squared: The logs of `g²`, (N, rows, columns).
        held: The logs of `v`, (N, rows, columns).

    Returns:
        For every parameter the place of the state that fits it; how many have a state which others might fit; and the
        two, if any, that fit better exchanged, though not for certain.
    """
    from scipy.special import stdtrit  # which takes a while to import

    freedom = min(size - 1 for size in held.shape[1:] if size > 1) if max(held.shape[1:]) > 1 else 1
    pairs = len(held) * (len(held) - 1) // 2
    certain, telling = (float(stdtrit(freedom, 1 - FALSE_ALARM / count)) for count in (pairs, 1))

    order = list(range(len(held)))
    for _ in order:
        gains, agreeing = (
            torch.stack([_gains_of_exchange(squared, held[order], place, misfit) for place in range(len(order))])
            for misfit in (_misfit, _misfit_of_pattern)
        )
        sure = gains.where(agreeing >= AGREEING, gains.new_tensor(-math.inf))
        first, second = divmod(int(sure.argmax()), len(order))
        if sure[first, second] < certain:
            break
        order[first], order[second] = order[second], order[first]
    unsure = (gains > -telling).sum(1) > 1  # with itself, nothing is gained
    is_suspect = SUSPECT <= sure[first, second] < certain
    return order, int(unsure.sum()), [first, second] if is_suspect else []


def _gains_of_exchange(squared: Tensor, held: Tensor, place: int, misfit: Misfit) -> Tensor:
    """By how many standard errors all would fit better, had a parameter and each other exchanged their states (N,).

    Numbers of a row go up and down together, and so do those of a column: only their means are independent,
    var = var(row means) / rows + var(column means) / columns.
    """
    own = misfit(squared, held)
    exchanged = misfit(squared[place], held) + misfit(squared, held[place])
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


def _misfit_of_pattern(squared: Tensor, held: Tensor) -> Tensor:
    """The same, had each tensor a scale of its own."""
    differences = squared - held
    differences = differences - differences.flatten(1).median(1).values[:, None, None]
    return torch.log1p(differences.exp()) - differences / 2


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
