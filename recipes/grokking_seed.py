"""A seed's summary with the steps at which its phases change, and what a claim about it is."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recipes.block_statistics import Estimate, Series
from recipes.modulo_addition import GROUPS

GROUP_NAMES = tuple(GROUPS)

TENSORS = (1, 4, 4, 2, 2, 1)
"""Of each layer: heads of the attention, weight and bias of linear layers."""

FINAL = 1 - 1700 / 1939
"""The share of the steps that is the final phase: after the paper's peak."""

Number = float | None


@dataclass(frozen=True)
class Seed:
    """The series of one seed, as `grokking_summary` leaves them."""

    number: int
    series: dict[str, np.ndarray]
    window: int
    modulus: int

    @property
    def steps(self) -> int:
        return len(self.series["importance/outputs"])

    def reaches(self, which: str, level: float) -> int:
        """The first evaluated step at which the accuracy on "train" or "test" is at least `level`; the last if none."""
        reached = np.flatnonzero(self.series[f"accuracy/{which}"] >= level)
        return int(self.series["evaluated"][reached[0] if len(reached) else -1])

    @property
    def memorisation(self) -> tuple[int, int]:
        """From 5% to 99% of the training set."""
        return self.reaches("train", 0.05), self.reaches("train", 0.99)

    @property
    def generalised(self) -> int:
        """99% of the test set."""
        return self.reaches("test", 0.99)

    @property
    def formation(self) -> tuple[int, int]:
        """The circuit formation: from the memorisation's end to 99% of the test set; empty if that comes first."""
        return self.memorisation[1], self.generalised

    @property
    def rise(self) -> tuple[int, int]:
        """From 5% to 99% of the test set."""
        return self.reaches("test", 0.05), self.generalised

    @property
    def final(self) -> tuple[int, int]:
        """The last 12% of the steps."""
        return round((1 - FINAL) * self.steps), self.steps

    @property
    def test_when_memorised(self) -> float:
        at = np.searchsorted(self.series["evaluated"], self.memorisation[1])
        return float(self.series["accuracy/test"][at])

    def of_tensors(self, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Σ_x Σ_θ |Ψ(θ, x)| − |Ψ^reg(θ, x)| by window and layer; `choose` makes one number of a layer's tensors,
        (window, tensor) → (window,)."""
        balance = self.series["parameters/tensors"][..., 0] - self.series["parameters/tensors"][..., 1]
        layers = np.split(balance, np.cumsum(TENSORS)[:-1], axis=1)
        return np.stack([choose(layer) for layer in layers], axis=1)

    @property
    def window_ends(self) -> np.ndarray:
        """The step at which each window ends."""
        return np.minimum((np.arange(len(self.series["parameters/groups"])) + 1) * self.window, self.steps)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and the statistic that it says is above 0."""

    text: str
    quantity: str
    """Of what, and by whose definition."""
    definition: str
    estimate: Estimate | None
    """What is made of a seed's series; None where a seed gives one number."""
    measure: Callable[[Seed], Series | Number]
    """None where the seed says nothing."""
