"""The claims of §5 about a grokking run, each as a statistic that could fall either way, seed by seed.

A statistic is made so that the claim says it is above 0. What the paper defines and what the authors' scripts compute
under its name are claims of their own: D as §4 has it sums Ψ − Ψ^reg with their signs, which are opposed, so that it
cannot tell which is larger; the scripts take sizes first, of single parameters, and draw each layer's last tensor only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from recipes.block_statistics import Estimate, Series, Values, correlation, detrended, mean, slope
from recipes.grokking_geometry import geometry_claims
from recipes.grokking_seed import GROUP_NAMES, Claim, Number, Seed

FEWEST = {"step": 40, "window": 4}
"""A seed whose span is shorter says nothing: one that generalises while it memorises has no time between."""

DETREND = 101
"""Steps of the running mean that curves are freed of before they are correlated."""

EMBEDDING, ENCODER, ATTENTION_DECODER, LINEAR1, LINEAR2, DECODER = range(len(GROUP_NAMES))
MIDDLE = [ENCODER, ATTENTION_DECODER, LINEAR1, LINEAR2]
KERNEL, DECAY = 0, 1

TARGETS = {"outputs": "all log-probabilities", "loss": "the loss", "margin": "the margin"}


@dataclass(frozen=True)
class Curve:
    """Something of each layer over a run, (time, group), and how many steps each time is."""

    name: str
    values: Callable[[Seed], np.ndarray]
    unit: str = "step"

    def during(self, seed: Seed, span: tuple[int, int]) -> np.ndarray | None:
        """Its values within a span of steps; None where that is too short."""
        each = 1 if self.unit == "step" else seed.window
        part = self.values(seed)[-(-span[0] // each) : span[1] // each]
        return part if len(part) >= FEWEST[self.unit] else None


def importance(target: str) -> Curve:
    return Curve(f"Ψ̄ of {TARGETS[target]}", lambda seed: seed.series[f"importance/{target}"][..., KERNEL])


ACCUMULATED = Curve(
    "authors: differences of accumulated |Ψ|",
    lambda seed: np.diff(seed.series["accumulated/outputs"][..., KERNEL], axis=0, prepend=0),
)

D_PAPER = Curve(
    "paper: D = Ψ − Ψ^reg, signed",
    lambda seed: seed.series["influence/outputs"][..., KERNEL] - seed.series["influence/outputs"][..., DECAY],
)
D_LAYERS = Curve(
    "Ψ̄ − Ψ̄^reg by layer",
    lambda seed: seed.series["importance/outputs"][..., KERNEL] - seed.series["importance/outputs"][..., DECAY],
)
D_PARAMETERS = Curve(
    "Σ_θ |Ψ| − |Ψ^reg| over single parameters",
    lambda seed: seed.of_tensors(lambda part: part.sum(1)),
    "window",
)
D_SCRIPTS = Curve(
    "authors: the same of a layer's last tensor",
    lambda seed: seed.of_tensors(lambda part: part[:, -1]),
    "window",
)
DIFFERENCES = (D_PAPER, D_LAYERS, D_PARAMETERS, D_SCRIPTS)


def _shares(values: np.ndarray) -> np.ndarray:
    """Values (time, group) over the sum of their sizes, so that steps weigh alike."""
    shares: np.ndarray = values / np.maximum(np.abs(values).sum(1, keepdims=True), 1e-300)
    return shares


def _of(values: Values | None, x: Values | None = None) -> Series | None:
    """A series over its own time, from 0 to 1, unless another x is given."""
    if values is None:
        return None
    return Series(np.linspace(0, 1, len(values)) if x is None else x, values.astype(np.float64))


def _log_importance(seed: Seed, part: int, target: str, span: tuple[int, int]) -> Values | None:
    total = seed.series[f"total/{target}"][slice(*span), part]
    return np.log(np.maximum(total, 1e-300)) if len(total) >= FEWEST["step"] else None


# ------------------------------------------------------------------ the balance of kernel and regularization


def _together(seed: Seed, target: str) -> Series | None:
    span = (seed.memorisation[0], seed.steps)
    kernel, decay = (_log_importance(seed, part, target, span) for part in (KERNEL, DECAY))
    if kernel is None or decay is None:
        return None
    return Series(detrended(kernel, DETREND), detrended(decay, DETREND))


def _falls(seed: Seed, part: int, target: str) -> Series | None:
    values = _log_importance(seed, part, target, seed.final)
    return _of(None if values is None else -values)


def _dominance(seed: Seed, target: str) -> Series | None:
    """(R − K) / (R + K) in the final phase."""
    total = seed.series[f"total/{target}"][slice(*seed.final)]
    if len(total) < FEWEST["step"]:
        return None
    return _of((total[:, DECAY] - total[:, KERNEL]) / total.sum(1))


def balance_claims() -> Iterator[Claim]:
    for target, name in TARGETS.items():
        of = f"Ψ̄_s(Θ), Ψ̄^reg_s(Θ) of {name}"
        yield Claim(
            "kernel and regularization grow together from the start of memorisation",
            of,
            f"correlation of their logarithms, each less its running mean over {DETREND} steps",
            correlation,
            partial(_together, target=target),
        )
        for part, word in ((KERNEL, "kernel"), (DECAY, "regularization")):
            yield Claim(
                f"the importance of the {word} has its peak before the end, and declines",
                of,
                "minus the slope of its logarithm over the last 12% of the steps",
                slope,
                partial(_falls, part=part, target=target),
            )
        yield Claim(
            "in the final phase, the regularization dominates",
            of,
            "mean (R − K)/(R + K) over the last 12% of the steps",
            mean,
            partial(_dominance, target=target),
        )


# ------------------------------------------------------------------ layers


def _leads(seed: Seed, curve: Curve) -> Series | None:
    values = curve.during(seed, seed.memorisation)
    if values is None:
        return None
    shares = _shares(values)
    return _of(shares[:, DECODER] - np.delete(shares, DECODER, axis=1).max(1))


def _peaks_at_memorisation(seed: Seed, curve: Curve) -> Series | None:
    start, memorised = seed.memorisation
    span = (start, min(seed.steps, 2 * memorised - start))
    values = curve.during(seed, span)
    if values is None:
        return None
    # how near to the memorisation's end: rises to 0, then falls
    times = np.linspace(span[0], span[1], len(values))
    near = -np.abs(times - memorised) / max(1, memorised - start)
    size = np.abs(values[:, DECODER])
    return _of(size / size.mean(), near)


def _middle_first(seed: Seed, curve: Curve) -> Series | None:
    values = curve.during(seed, seed.formation)
    if values is None:
        return None
    shares = _shares(values)
    return _of(shares[:, DECODER] - shares[:, MIDDLE].mean(1))


def _outer_regularized(seed: Seed, curve: Curve) -> Series | None:
    values = curve.during(seed, (seed.memorisation[1], seed.steps))
    if values is None:
        return None
    shares = np.abs(_shares(values))
    return _of(shares[:, [EMBEDDING, DECODER]].mean(1) - shares[:, MIDDLE].mean(1))


def _embedding_begins(seed: Seed, curve: Curve) -> Series | None:
    start = seed.memorisation[0]
    values = curve.during(seed, (start, seed.generalised))
    if values is None or seed.formation[1] - seed.formation[0] < FEWEST["step"]:
        return None
    times = np.linspace(start, seed.generalised, len(values))
    return _of(_shares(values)[:, EMBEDDING], (times > seed.memorisation[1]).astype(np.float64))


def _embedding_regularized(seed: Seed, curve: Curve) -> Series | None:
    values = curve.during(seed, seed.rise)
    return _of(None if values is None else -_shares(values)[:, EMBEDDING])


def _embedding_grows(seed: Seed, curve: Curve) -> Series | None:
    values = curve.during(seed, seed.final)
    return _of(None if values is None else values[:, EMBEDDING] / values[:, EMBEDDING].mean())


def _others_fall(seed: Seed, curve: Curve, group: int) -> Series | None:
    values = curve.during(seed, seed.final)
    return _of(None if values is None else -values[:, group] / values[:, group].mean())


def layer_claims() -> Iterator[Claim]:
    of_layers = [importance(target) for target in TARGETS] + [ACCUMULATED]
    cases: list[tuple[str, str, Estimate, Callable[..., Series | None], list[Curve]]] = [
        (
            "the decoder is the most influential layer in the memorisation",
            "mean, from 5% to 99% of the training set, of its share less the largest other layer's",
            mean,
            _leads,
            of_layers,
        ),
        (
            "the decoder's influence has a peak with the memorisation",
            "slope of its size over the nearness to the step of 99%, as long before as after",
            slope,
            _peaks_at_memorisation,
            of_layers,
        ),
        (
            "the decoder's D has a peak with the memorisation",
            "the same of |D|",
            slope,
            _peaks_at_memorisation,
            list(DIFFERENCES),
        ),
        (
            "attention and linear layers come before the decoder's second peak",
            "slope, from 99% of training to 99% of test, of the decoder's share less the mean of these four",
            slope,
            _middle_first,
            of_layers,
        ),
        (
            "regularization acts primarily on embedding and decoder",
            "mean, after the memorisation, of their share of |D| less that of the four layers between",
            mean,
            _outer_regularized,
            list(DIFFERENCES),
        ),
        (
            "the embedding begins to influence in the circuit formation",
            "its mean share between 99% of training and of test less that in the memorisation",
            slope,
            _embedding_begins,
            of_layers,
        ),
        (
            "regularization dominates in the embedding while the circuit forms",
            "minus its mean share of D while the test accuracy goes from 5% to 99%",
            mean,
            _embedding_regularized,
            list(DIFFERENCES),
        ),
        (
            "the embedding's influence grows until the end",
            "slope over the last 12% of the steps, relative to its mean",
            slope,
            _embedding_grows,
            of_layers,
        ),
    ]
    for text, definition, estimate, series, curves in cases:
        for curve in curves:
            yield Claim(text, curve.name, definition, estimate, partial(series, curve=curve))
    for group in (*MIDDLE, DECODER):
        yield Claim(
            f"the influence of {GROUP_NAMES[group]} falls at the end",
            importance("outputs").name,
            "minus the slope over the last 12% of the steps, relative to its mean",
            slope,
            partial(_others_fall, curve=importance("outputs"), group=group),
        )


def _memorises_first(seed: Seed) -> Number:
    return 0.05 - seed.test_when_memorised


def all_claims() -> list[Claim]:
    """The claims of §5.1 and §5.2, in their order."""
    first = Claim(
        "the training set is memorised before anything generalises",
        "accuracies",
        "0.05 less the test accuracy at the step of 99% on the training set",
        None,
        _memorises_first,
    )
    return [first, *balance_claims(), *layer_claims(), *geometry_claims()]
