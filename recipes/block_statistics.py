"""Statistics of autocorrelated series: estimates with intervals, and tests whose null keeps the autocorrelation.

A series is cut into blocks that are long against its memory (Politis and White's rule, of `arch`). Intervals come from
resampling seeds, and blocks within each; p-values from series whose blocks have been permuted, or have changed their
signs, of each seed apart, put together over the seeds by Stouffer's rule; Holm's correction is over all claims.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

Values = np.ndarray[Any, np.dtype[np.float64]]
"""(n,)"""

DRAWS = 1000
"""Of bootstrap and null."""

LEVEL = 0.95
"""Of intervals; the corrected p-value has to be below what is left."""

FEWEST_BLOCKS = 8


def mean(x: Values, y: Values) -> float:
    """The mean of y; x is not looked at."""
    return float(y.mean())


def slope(x: Values, y: Values) -> float:
    """The slope of the least-squares line of y over x; 0 where x does not vary."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    return float(centred @ y) / spread if spread > 0 else 0.0


def correlation(x: Values, y: Values) -> float:
    """Pearson's; 0 where either does not vary."""
    size = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / size if size > 1e-12 else 0.0


Estimate = Callable[[Values, Values], float]


@dataclass(frozen=True)
class Series:
    """What a seed says of a claim: y at consecutive steps or windows, (n,), and an x beside each: its time for a slope,
    the other curve for a correlation."""

    x: Values
    y: Values

    @property
    def block(self) -> int:
        """A block's length: twice Politis and White's for what a straight line leaves of y (with once, tests had twice
        their false positives), but at least `FEWEST_BLOCKS` blocks."""
        from arch.bootstrap import optimal_block_length

        count = len(self.y)
        rest = self.y - self.y.mean() - slope(self.x, self.y) * (self.x - self.x.mean())
        if count < 2 * FEWEST_BLOCKS or rest.std() < 1e-12 * max(1e-300, abs(self.y).max()):
            return 1
        best = float(optimal_block_length(rest)["circular"].iloc[0])
        return int(np.clip(np.ceil(2 * best), 1, count // FEWEST_BLOCKS))


def _resampled(series: Series, block: int, generator: np.random.Generator) -> Series:
    """Blocks of (x, y) drawn with repetition, circular."""
    count = len(series.y)
    starts = generator.integers(count, size=-(-count // block))
    index = ((starts[:, None] + np.arange(block)) % count).flatten()[:count]
    return Series(series.x[index], series.y[index])


def _null(series: Series, estimate: Estimate, block: int, generator: np.random.Generator) -> Series:
    """A series of which the claim is not true, and which is as smooth: each block's sign drawn, for a mean; else y's
    blocks in another order, from a random place on, beside an x that stays."""
    count = len(series.y)
    blocks = np.arange(count) // block
    if estimate is mean:
        signs = generator.choice([-1.0, 1.0], size=blocks[-1] + 1)
        return Series(series.x, series.y * signs[blocks])

    turned = np.roll(np.arange(count), generator.integers(count))
    pieces = [turned[blocks == piece] for piece in generator.permutation(blocks[-1] + 1)]
    return Series(series.x, series.y[np.concatenate(pieces)])


@dataclass(frozen=True)
class Evidence:
    """What the seeds together say of a claim: that a statistic is above 0."""

    estimate: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]

    def verdict(self, corrected: float) -> str:
        """Says "holds" where the interval is above 0 and the corrected p-value small enough, "fails" where the interval
        is below 0, else "undecided"."""
        if self.high < 0:
            return "fails"
        return "holds" if self.low > 0 and corrected < 1 - LEVEL else "undecided"


def of_series(found: Sequence[Series], estimate: Estimate, draws: int = DRAWS) -> Evidence:
    """Tests that the mean over the seeds of a statistic of their series is above 0."""
    from scipy.stats import combine_pvalues

    generator = np.random.default_rng(0)
    blocks = [series.block for series in found]
    by_seed = tuple(estimate(series.x, series.y) for series in found)

    # seeds are drawn, then blocks of each
    replicates = np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(len(found), size=len(found))
        again = [_resampled(found[seed], blocks[seed], generator) for seed in chosen]
        replicates[draw] = np.mean([estimate(series.x, series.y) for series in again])

    p_values = []
    for series, block, value in zip(found, blocks, by_seed, strict=True):
        nulls = [_null(series, estimate, block, generator) for _ in range(draws)]
        reached = sum(estimate(null.x, null.y) >= value for null in nulls)
        p_values.append((1 + reached) / (1 + draws))
    p = float(combine_pvalues(np.clip(p_values, 0, 1 - 1e-9), "stouffer").pvalue)
    return Evidence(float(np.mean(by_seed)), *_interval(replicates), p, by_seed)


def of_numbers(values: Sequence[float]) -> Evidence:
    """Tests that the mean of one number from each seed is above 0: by the signs that the seeds could have had as well,
    so that p is at least 2⁻ⁿ for n seeds. The interval is Student's, as wide as so few seeds make it."""
    from scipy.stats import t

    numbers = np.asarray(values, dtype=np.float64)
    count, estimate = len(numbers), float(numbers.mean())
    margin = np.inf
    if count > 1:
        margin = float(t.ppf((1 + LEVEL) / 2, count - 1) * numbers.std(ddof=1) / np.sqrt(count))

    # all signs for up to twelve seeds, else as many at random
    most = min(count, 12)
    signs = np.array(list(product([1, -1], repeat=most)), dtype=np.float64)
    if most < count:
        signs = np.random.default_rng(0).choice([1.0, -1.0], size=(2**most, count))
        signs[0] = 1
    reached = signs @ numbers >= numbers.sum() - 1e-12 * np.abs(numbers).sum()
    return Evidence(estimate, estimate - margin, estimate + margin, float(reached.mean()), tuple(values))


def _interval(replicates: Values) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction."""
    from statsmodels.stats.multitest import multipletests

    corrected: list[float] = multipletests(p_values, method="holm")[1].tolist()
    return corrected


def judged(tested: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    """A row for each claim, Holm's correction over all of them."""
    corrected = holm([evidence.p for evidence in tested.values()])
    return [
        {
            "claim": claim,
            "estimate": evidence.estimate,
            "low": evidence.low,
            "high": evidence.high,
            "p after Holm": p,
            "verdict": evidence.verdict(p),
        }
        for (claim, evidence), p in zip(tested.items(), corrected, strict=True)
    ]


def detrended(values: Values, width: int) -> Values:
    """Values less their running mean over `width` of them."""
    from scipy.ndimage import uniform_filter1d

    rest: Values = values - uniform_filter1d(values, width, mode="nearest")
    return rest
