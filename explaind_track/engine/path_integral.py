"""The path from θ_s to θ_{s+1}: its nodes, the terms that are integrated along it, and what they leave over.

Ψ_s(part, Θ_g, x)_j = ∫₀¹ ⟨∇_θ f_{θ_s(t)}(x)_j, part restricted to Θ_g⟩ dt,   θ_s(t) = θ_s + t (θ_{s+1} − θ_s)

What something other than the optimizer did between two steps has a straight path of its own, with the part `outside`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from explaind_track.core.checks import require_int, require_number, require_one_of
from explaind_track.core.step import SHARES

Nodes = tuple[tuple[float, float], ...]
"""Pairs of a time t in [0, 1] and its weight; the weights add up to 1."""

ACCURACIES = ("live", "1e-2", "1e-3")
"""From the cheapest to the most exact."""


@dataclass(frozen=True)
class Quadrature:
    """How finely φ_s^test = ∫₀¹ ∇_θ f_{θ_s(t)} dt is integrated along a step (Thm. 3.1).

    By Gauss–Legendre nodes, whose number is doubled until the step's residual ‖remainder‖₂ / ‖change‖₂ (over queries ×
    outputs) is at most `tolerance`, or at the floor that float rounding sets. A step's cost grows with its nodes; on
    networks with kinks (ReLU) the residual falls slowly with them, yet sums over many steps are good with one or two.
    Or by `trapezoid`, whose nodes are the step's two ends.

    Raises:
        ValueError: Unless 1 ≤ nodes ≤ max_nodes.

    Example:
        >>> import torch
        >>> from explaind_track import Quadrature, Query, StepObserver, explain
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> observer = StepObserver(optimizer, dict(model.named_parameters()))
        >>> x = torch.randn(8, 3).double()
        >>> model(x).square().mean().backward()
        >>> observer.before({})
        >>> optimizer.step()
        >>> step = observer.after(0, {})
        >>> def residual(quadrature):
        ...     influence = explain([step], model, Query.outputs(x), quadrature=quadrature, progress=False)
        ...     return float(influence.residual[0])
        >>> f"{residual(Quadrature.fixed(1)):.0e}", f"{residual(Quadrature.fixed(2)):.0e}"
        ('6e-04', '6e-07')
        >>> residual(Quadrature(tolerance=1e-9)) <= 1e-9
        True
    """

    tolerance: float = 1e-3
    """The residual at which refinement stops; 0: never before `max_nodes` or the rounding floor."""
    nodes: int = 1
    """Nodes to begin with."""
    max_nodes: int = 64
    """Nodes to end with at the latest."""
    rule: Literal["gauss-legendre", "trapezoid"] = "gauss-legendre"
    """Where the nodes lie."""

    def __post_init__(self) -> None:
        """Raises TypeError and ValueError for settings that are no numbers, or out of bounds."""
        object.__setattr__(self, "tolerance", require_number("tolerance=", self.tolerance, least=0))
        for name in ("nodes", "max_nodes"):
            object.__setattr__(self, name, require_int(f"{name}=", getattr(self, name), 1))
        if self.nodes > self.max_nodes:
            raise ValueError(f"expected 1 <= nodes <= max_nodes, got nodes={self.nodes}, max_nodes={self.max_nodes}")
        require_one_of("rule=", self.rule, ("gauss-legendre", "trapezoid"))
        if self.is_trapezoid and (self.nodes, self.max_nodes) != (2, 2):
            raise ValueError("a trapezoid has two nodes, the ends of the step: write Quadrature.trapezoid()")

    @classmethod
    def fixed(cls, nodes: int) -> "Quadrature":
        """Always the same number of nodes, whatever residual they leave.

        Args:
            nodes: At least 1; 1 is the midpoint of each step.

        Example:
            >>> from explaind_track import Quadrature
            >>> Quadrature.fixed(4)
            Quadrature(tolerance=0.0, nodes=4, max_nodes=4, rule='gauss-legendre')
        """
        return cls(tolerance=0.0, nodes=nodes, max_nodes=nodes)

    @classmethod
    def of(cls, accuracy: str) -> "Quadrature":
        """The rule of an `accuracy` as `explain` takes it.

        Args:
            accuracy: "live", one node a step, which is what a Tracker takes and costs least; "1e-2" or "1e-3", as many
                nodes as leave so much of each step's change over, from one on, and at most 64.

        Raises:
            ValueError: For another accuracy.

        Example:
            >>> from explaind_track import Quadrature
            >>> Quadrature.of("1e-2").tolerance, Quadrature.of("live").max_nodes
            (0.01, 1)
        """
        require_one_of("accuracy=", accuracy, ACCURACIES)
        return cls.fixed(1) if accuracy == "live" else cls(tolerance=float(accuracy))

    @classmethod
    def trapezoid(cls) -> "Quadrature":
        """Both ends of the step: φ_s^test ≈ ½ (∇_θ f_{θ_s} + ∇_θ f_{θ_{s+1}}).

        Where the target is one scalar and steps follow on each other, as in training, the gradient at θ_{s+1} serves
        this step and the next, so that a step costs one forward and backward pass of the query. Its error is about
        twice the midpoint's; the residual tells it.

        Example:
            >>> from explaind_track import Quadrature
            >>> Quadrature.trapezoid().nodes
            2
        """
        return cls(tolerance=0.0, nodes=2, max_nodes=2, rule="trapezoid")

    @property
    def is_trapezoid(self) -> bool:
        """Whether its nodes are the step's ends."""
        return self.rule == "trapezoid"

    @property
    def settings(self) -> list[Any]:
        """What tells it from others."""
        return [self.tolerance, self.nodes, self.max_nodes, *([self.rule] if self.is_trapezoid else [])]

    def at(self, nodes: int) -> Nodes:
        """The times and weights of so many nodes."""
        return TRAPEZOID if self.is_trapezoid else gauss_legendre(nodes)


def require_quadrature(quadrature: Any) -> None:
    """Raises TypeError for anything but a Quadrature or None."""
    if quadrature is None or isinstance(quadrature, Quadrature):
        return
    count = quadrature if isinstance(quadrature, int) else 3
    raise TypeError(
        f"quadrature= is a Quadrature, not {quadrature!r}: write Quadrature.fixed({count}) for so many nodes in each "
        "step, or Quadrature(tolerance=1e-3) for as many as that takes"
    )


TRAPEZOID: Nodes = ((0.0, 0.5), (1.0, 0.5))


@lru_cache
def gauss_legendre(nodes: int) -> Nodes:
    """Nodes and weights on [0, 1], as pairs: Gauss–Legendre in even panels of at most four nodes.

    One node is the midpoint, up to four are plain Gauss–Legendre. Beyond, panels spread the nodes evenly: a ReLU
    network's derivative jumps along the path, and of the rules with n nodes the midpoints see jumps best. On the
    modulo-113 Transformer (8 nodes) the residual of one panel is 30% above theirs, of panels of four 9%; and on smooth
    networks the error still falls with the eighth power of the count, where midpoints' falls with the second.
    """
    panels = -(-nodes // 4)
    pairs: list[tuple[float, float]] = []
    start = 0.0
    for panel in range(panels):
        count = nodes // panels + (panel < nodes % panels)
        width = count / nodes
        points, weights = np.polynomial.legendre.leggauss(count)
        # from [−1, 1] to [start, start + width]
        pairs += zip((start + width * (points + 1) / 2).tolist(), (width * weights / 2).tolist(), strict=True)
        start += width
    return tuple(pairs)


@dataclass
class Terms:
    """One step's influences on some of the queries (x of them, O outputs each), for P parts and G groups."""

    parts: tuple[str, ...]
    """The names of the P parts."""
    influence: Tensor
    """Ψ, (P, G, x, O)."""
    rounding: Tensor
    """The influence of what float arithmetic did to the parameters, summed over the groups, (x, O)."""
    change: Tensor
    """f(θ_{s+1}, b_s) − f(θ_s, b_s), (x, O)."""
    buffers: Tensor
    """f(θ_{s+1}, b_{s+1}) − f(θ_{s+1}, b_s): what the model's buffers did to the prediction, (x, O)."""
    after: Tensor
    """f(θ_{s+1}, b_{s+1}), (x, O)."""
    spread: Tensor | None
    """While integrating, Σ_t w_t J_t², (P, G, x, O); None where nobody wants the sums closed."""
    remainder: Tensor
    """What the split leaves over, [f(θ_{s+1}, b_s) − f(θ_s, b_s)] + ΣΨ, before any closing; (x, O)."""

    eps: float
    """The relative rounding of the arithmetic that predictions are computed in."""

    @classmethod
    def start(
        cls, before: Tensor, moved: Tensor, after: Tensor, parts: Sequence[str], groups: int, close: bool, eps: float
    ) -> "Terms":
        """Zero influences, and the changes from the three predictions, (x, O) each. close: whether to close them."""
        cells = before.new_zeros(len(parts), groups, *before.shape)
        zeros = torch.zeros_like(before)
        spread = cells.clone() if close else None
        return cls(tuple(parts), cells, zeros, moved - before, after - moved, after, spread, zeros.clone(), eps)

    def add(self, influence: Tensor, rounding: Tensor, weight: float) -> None:
        """Adds one node's directional derivatives, (P, G, x, O) and (x, O), with the node's weight."""
        self.influence.add_(influence, alpha=weight)
        if self.spread is not None:
            self.spread.addcmul_(influence, influence, value=weight)
        self.rounding.add_(rounding, alpha=weight)

    def finish(self) -> None:
        """Finds the remainder once all nodes are in.

        Closing makes the sums exact by sharing the remainder out, per output, in proportion to each term's variance
        over the nodes; where there is none (one node, a linear path), to its size; and where all terms are 0, evenly.
        Shares of parts stay as they are.
        """
        owned = [name not in SHARES for name in self.parts]  # so that no sum counts twice
        parts = self.influence if all(owned) else self.influence[[place for place, part in enumerate(owned) if part]]
        self.remainder = self.change + parts.sum((0, 1)) + self.rounding
        if self.spread is None:
            return

        # Var_t J = Σ_t w_t J_t² − Ψ², of parts alone, and what rounding makes of a variance that is 0
        mask = parts.new_tensor(owned)[:, None, None, None].expand_as(self.influence)
        size = self.influence.abs() * mask
        variance = (self.spread - self.influence.square()).clamp(min=0) * mask
        noise = size.square() * (16 * torch.finfo(size.dtype).eps)

        # Ψ ← Ψ − share / Σ share · remainder
        share = torch.where(_total(variance - noise) > 0, variance, size)
        share = torch.where(_total(share) > 0, share, mask)
        self.influence = self.influence - share / _total(share) * self.remainder

    def grouped(self) -> "Terms":
        """The same terms with all groups as one."""
        return replace(self, influence=self.influence.sum(1, keepdim=True), spread=None)

    def arranged(self, parts: tuple[str, ...]) -> "Terms":
        """The same terms with the parts in this order, and zeros for those that there are not."""
        if parts == self.parts:
            return self
        return replace(self, parts=parts, influence=arranged(self.influence, self.parts, parts), spread=None)

    def copy(self) -> "Terms":
        """The same terms in tensors of their own, to be added to."""
        copies = {name: value.clone() for name, value in vars(self).items() if name not in ("parts", "spread", "eps")}
        return Terms(self.parts, **copies, spread=None, eps=self.eps)

    def __iadd__(self, other: "Terms") -> "Terms":
        """Adds the terms of a step that follows, with the same parts; `after` becomes that step's."""
        for name in ("influence", "rounding", "change", "buffers", "remainder"):
            getattr(self, name).add_(getattr(other, name))
        self.after = other.after
        return self


def arranged(values: Tensor, parts: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Values (P, …) of these parts in the order that is wanted, with zeros for those that there are not."""
    if tuple(parts) == tuple(wanted):
        return values
    result = values.new_zeros(len(wanted), *values.shape[1:])
    result[[wanted.index(name) for name in parts]] = values
    return result


def _total(terms: Tensor) -> Tensor:
    """The sum over parts and groups, in a shape that broadcasts over them."""
    return reduce(terms, "p g x o -> 1 1 x o", "sum")
