"""What a loop's samples weigh in a step: of the ways that loops have, the one in which they make up the gradient.

A loop that another package runs does not say how it weighs its samples (by their tokens or not, by the micro-batch or
the whole step), and does not know what `sample_loss` gives for a sample of many tokens, the sum of their losses or the
mean. The gradient tells. While the ways disagree, each is tried on it, and those that miss it are left out; once the
rest agree, nothing more is computed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.tensors import Tensors

TRIALS = 5
"""The number of steps in which ways are tried, at most; after them, the best one counts."""

PADDING = -100
"""The label that transformers counts no loss for."""

Weights = list[Tensor]
"""What the samples of each micro-batch of a step weigh, (N,) each."""


@dataclass(frozen=True)
class Counts:
    """What the weights of a micro-batch are made of."""

    rows: int
    """N, its samples."""
    divisor: int
    """By which the loop divides its loss, where it does not divide by the items of the step."""
    items_in_step: float | None
    """The items of the whole step that the loop says it divides by, if it says so."""
    labels: Mapping[str, Tensor]
    """By the way in which labels are counted: those of each sample, (N,)."""

    @classmethod
    def of(cls, batch: Any, rows: int, divisor: int, items_in_step: float | None) -> "Counts":
        """Counts a batch. Labels count where it has some by this name; of next tokens, the first is none."""
        given = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(given, Tensor) or given.shape[:1] != (rows,):
            return cls(rows, divisor, items_in_step, {})

        counted = {"labels": given, "next labels": given[:, 1:] if given.ndim > 1 else given}
        per_sample = {name: (some != PADDING).reshape(rows, -1).sum(1) for name, some in counted.items()}
        labels = {name: count.double().cpu() for name, count in per_sample.items()}
        return cls(rows, divisor, items_in_step, labels)


def ways(batches: Sequence[Counts]) -> dict[str, Weights]:
    """The weights of the samples of a step's micro-batches by the ways that loops have, the likeliest first."""
    units = {"samples": [torch.ones(batch.rows, dtype=torch.float64) for batch in batches]}
    for name in batches[0].labels:
        if all(name in batch.labels for batch in batches):
            units[name] = [batch.labels[name] for batch in batches]

    scales = {" / batches": [batch.divisor for batch in batches], "": [1] * len(batches)}

    # a sample's loss is the sum (it weighs as one) or the mean (it weighs as many) of what it has of a unit
    found: dict[str, Weights] = {}
    items = [batch.items_in_step for batch in batches]
    if None not in items:
        for of, shares in units.items():
            found[f"{of} / items of the step"] = [
                share / max(count or 0.0, 1.0) for share, count in zip(shares, items, strict=True)
            ]
    for of, shares in units.items():
        for unit, counts in units.items():
            totals = [count.sum().clamp(min=1) for count in counts]
            for how, scale in scales.items():
                found[f"{of} / {unit} of the batch{how}"] = [
                    share / (total * by) for share, total, by in zip(shares, totals, scale, strict=True)
                ]
            whole = torch.stack(totals).sum()
            found[f"{of} / {unit} of the step"] = [share / whole for share in shares]
        for how, scale in scales.items():
            found[f"{of}{how}"] = [share / by for share, by in zip(shares, scale, strict=True)]
    return found


class Weighing:
    """The way in which a loop weighs its samples, as far as it is known."""

    def __init__(self) -> None:
        self._left: frozenset[str] | None = None
        """The ways that have missed no gradient; None: all."""
        self._missed: dict[str, float] = {}
        """By how much each way has missed the gradients that it was tried on, relative to their norms."""
        self._trials = 0

    def choose(
        self, candidates: Mapping[str, Weights], gradient: Callable[[Weights], Tensors], seen: Tensors
    ) -> Weights:
        """The weights of a step.

        Args:
            candidates: By the way, the likeliest first.
            gradient: From weights to the gradient of the samples that weigh so.
            seen: The step's gradient.
        """
        names = [name for name in candidates if self._left is None or name in self._left] or list(candidates)
        if self._trials >= TRIALS:
            return candidates[min(names, key=lambda name: self._missed.get(name, float("inf")))]

        alike = _alike(candidates, names)
        norm = _norm(seen.values())
        if len(alike) > 1 and 0 < norm < float("inf"):
            names = self._try(alike, candidates, gradient, seen, norm)
        return candidates[names[0]]

    def _try(
        self,
        alike: Sequence[list[str]],
        candidates: Mapping[str, Weights],
        gradient: Callable[[Weights], Tensors],
        seen: Tensors,
        norm: float,
    ) -> list[str]:
        """Leaves out the ways that miss the gradient; the names of the others."""
        off: dict[str, float] = {}
        for names in alike:
            total = gradient(candidates[names[0]])
            off |= dict.fromkeys(names, _norm(total[name] - value for name, value in seen.items()) / norm)

        self._trials += 1
        for name, missed in off.items():
            self._missed[name] = self._missed.get(name, 0.0) + missed

        # where arithmetic is coarse, more than one may come close
        left = [name for name in candidates if name in off and off[name] <= 2 * min(off.values())]
        self._left = frozenset(left)
        return left or list(off)


def _norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all of them together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _alike(candidates: Mapping[str, Weights], names: Sequence[str]) -> list[list[str]]:
    """The names of ways, those together that give the same weights in this step."""
    found: list[list[str]] = []
    for name in names:
        weights = torch.cat(candidates[name])
        for others in found:
            if torch.allclose(weights, torch.cat(candidates[others[0]]), rtol=1e-9, atol=0.0):
                others.append(name)
                break
        else:
            found.append([name])
    return found
