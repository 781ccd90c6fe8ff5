"""What a training loop does to a step's whole gradient, between its backward passes and the optimizer's step."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Kind = Literal["norm", "value", "factor", "other"]


@dataclass(frozen=True)
class Alteration:
    """One of these things."""

    kind: Kind
    """Clipped to a "norm" or a "value", multiplied by a "factor"; or an "other", of which nothing is known."""
    amount: float = 0.0
    """The norm, the value or the factor."""


@dataclass(frozen=True)
class Alterations:
    """All of these things that a step's gradient has met, in their order."""

    loss_weight: Tensor | float
    """The samples' weights in the loss, (N,) or one number for all: before they took on the factors of all this."""
    changes: tuple[Alteration, ...] = ()

    def then(self, change: Alteration) -> "Alterations":
        """With one more."""
        return replace(self, changes=(*self.changes, change))
