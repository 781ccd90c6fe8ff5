"""The claims of §6 about how a language model learns, each as a number.

Changes of the loss are −Ψ: below zero, the model learns. A group's *share* at a checkpoint is its Ψ over Σ|Ψ| of all
groups. The two *phases* are those whose mean shares, by type and by layer, leave the least of the shares' variance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

LEAST = 3
"""Checkpoints in a phase."""

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Curves:
    """The changes of the loss at the checkpoints of a run, (part, step, group): by type and by layer."""

    types: xr.DataArray
    layers: xr.DataArray

    @cached_property
    def shares(self) -> Values:
        """Of the batch's influence, (step, types and layers)."""
        return np.concatenate([_shares(self.types), _shares(self.layers)], axis=1)

    @cached_property
    def second(self) -> int:
        """The position of the checkpoint that the second phase begins with."""
        count = len(self.shares)
        return min(range(LEAST, count - LEAST + 1), key=lambda start: _spread(self.shares, start), default=count // 2)

    def step_of_change(self) -> int:
        """The training step that the second phase begins with."""
        return int(self.types["step"].values[self.second])

    def phases_over_drift(self) -> float:
        """The variance of the shares that two constant phases explain, less what a straight line explains."""
        positions = np.arange(len(self.shares))
        design = np.stack([np.ones(len(positions)), positions], axis=1)
        line = design @ np.linalg.lstsq(design, self.shares, rcond=None)[0]
        drift = np.square(self.shares - line).sum()
        whole = np.square(self.shares - self.shares.mean(0)).sum()
        return float((drift - _spread(self.shares, self.second)) / whole)

    def share(self, kind: str) -> Values:
        """The share of all groups of a kind (`attention`, `mlp`), (step,)."""
        return np.asarray(_shares(self.types)[:, _of_kind(self.types, kind)].sum(1))

    def depth(self) -> Values:
        """Where the batch's absolute influence lies, (step,): 0 in the first layer, 1 in the last."""
        sizes = abs(self.layers.sel(part="kernel")).transpose("step", "group").values[:, _of_kind(self.layers, "layer")]
        return np.asarray(sizes @ np.linspace(0, 1, sizes.shape[1]) / sizes.sum(1))

    def part(self, name: str, kind: str | None = None) -> Values:
        """The change of the loss through a part of the steps, through all groups or those of a kind, (step,)."""
        values = self.types.sel(part=name).transpose("step", "group").values
        return np.asarray(values.sum(1) if kind is None else values[:, _of_kind(self.types, kind)].sum(1))

    def means(self, values: Values) -> tuple[float, float]:
        """The means of a curve over the first and over the second phase."""
        return float(values[: self.second].mean()), float(values[self.second :].mean())


def _shares(changes: xr.DataArray) -> Values:
    influence = -changes.sel(part="kernel").transpose("step", "group").values
    return np.asarray(influence / np.abs(influence).sum(1, keepdims=True))


def _spread(shares: Values, start: int) -> float:
    """Σ (shares − their phase's mean)², where the second phase begins at `start`."""
    return float(sum(np.square(phase - phase.mean(0)).sum() for phase in (shares[:start], shares[start:])))


def _of_kind(changes: xr.DataArray, kind: str) -> list[int]:
    return [i for i, group in enumerate(changes["group"].values) if str(group).startswith(kind)]


# ------------------------------------------------------------------ claims


@dataclass(frozen=True)
class Claim:
    """A claim of §6, what it is measured by, and the values for which it holds."""

    text: str
    number: str
    values: Callable[[Curves], Sequence[float]]
    holds: Callable[[Sequence[float]], bool]

    def test(self, curves: Curves) -> dict[str, Any]:
        """The claim's numbers in a run, and whether it holds."""
        values = [float(value) for value in self.values(curves)]
        return {"values": values, "holds": bool(self.holds(values))}


def _attention_over_mlp(curves: Curves) -> tuple[float, float]:
    attention, mlp = (abs(curves.part("kernel", kind)) for kind in ("attention", "mlp"))
    return curves.means(attention / (attention + mlp))


def _growth(curves: Curves) -> tuple[float, float]:
    """How fast the size of weight decay's influence grows, per training step, from each phase's begin to its end."""
    sizes, steps = abs(curves.part("regularization")), curves.types["step"].values
    middle = curves.second
    return (
        float((sizes[middle] - sizes[0]) / (steps[middle] - steps[0])),
        float((sizes[-1] - sizes[middle]) / max(1, steps[-1] - steps[middle])),
    )


def turns(values: Values) -> float:
    """The share of neighbouring checkpoints whose values have opposite signs."""
    signs = np.sign(values)
    return float((signs[1:] != signs[:-1]).mean())


CLAIMS = (
    Claim(
        "learning has two phases",
        "variance of the shares that two phases explain, less what a steady drift does (> 0)",
        lambda curves: [curves.phases_over_drift()],
        lambda value: value[0] > 0,
    ),
    Claim(
        "in the first, mostly the MLPs learn",
        "mean share of MLPs and of attention, first phase (MLPs' is larger)",
        lambda curves: [curves.means(curves.share(kind))[0] for kind in ("mlp", "attention")],
        lambda value: value[0] > value[1],
    ),
    Claim(
        "in the second, attention's share has grown",
        "mean share of attention, first and second phase (the second is larger)",
        lambda curves: curves.means(curves.share("attention")),
        lambda value: value[1] > value[0],
    ),
    Claim(
        "… relative to the MLPs'",
        "|attention| / (|attention| + |MLPs|), first and second phase (the second is larger)",
        _attention_over_mlp,
        lambda value: value[1] > value[0],
    ),
    Claim(
        "upper layers first, intermediate and lower ones later",
        "mean depth of the influence from 0 to 1, first and second phase (the second is smaller)",
        lambda curves: curves.means(curves.depth()),
        lambda value: value[1] < value[0],
    ),
    Claim(
        "embeddings play a small role",
        "mean |share| of the embeddings, first and second phase (both < 0.1)",
        lambda curves: curves.means(abs(curves.share("embedding"))),
        lambda value: max(value) < 0.1,
    ),
    Claim(
        "the regularization of the output head changes its sign: helpful first, then harmful",
        "mean change of the loss, first and second phase (< 0, > 0)",
        lambda curves: curves.means(curves.part("regularization", "head")),
        lambda value: value[0] < 0 < value[1],
    ),
    Claim(
        "weight decay's influence grows sharply, then less",
        "growth of |change of the loss| for each step, first and second phase (the first is larger, and > 0)",
        _growth,
        lambda value: value[0] > max(0.0, value[1]),
    ),
    Claim(
        "the first moment's influence changes its sign from one checkpoint to the next",
        "share of neighbouring checkpoints with opposite signs (> 0.5)",
        lambda curves: [turns(curves.part("past"))],
        lambda value: value[0] > 0.5,
    ),
)


def tested(runs: Mapping[int, Curves]) -> list[dict[str, Any]]:
    """Every claim with its numbers in the run of each seed."""
    return [
        {
            "claim": claim.text,
            "number": claim.number,
            "seeds": {seed: claim.test(curves) for seed, curves in runs.items()},
        }
        for claim in CLAIMS
    ]
