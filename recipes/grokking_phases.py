"""The learning phases of §5.1: their beginnings and ends, and each of the paper's claims about them as a number.

Claims about D(Θ) are tested twice. D as §4 defines it, Ψ − Ψ^reg summed with its signs, cannot tell which of two
opposed influences is larger: kernel and regularization pull in opposite directions, so their sizes add. A difference of
absolute influences can, here the *balance* Ψ̄ − Ψ̄^reg, and is what the authors' scripts draw under that name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from explaind_track import Influence
from explaind_track.analysis.plots import EARLY_STEPS
from explaind_track.record.history import AXIS, read_rows

SMOOTHING = 25
"""Steps over which curves are averaged before anything is read off them."""

END = 0.05
"""The share of the run that counts as its end."""

MIDDLE = ("att_encoder", "att_decoder", "linear1", "linear2")


@dataclass(frozen=True)
class Phases:
    """The live influences and the accuracy of a run, and the steps at which its phases change."""

    influence: Influence
    curve: Mapping[str, Sequence[float]]
    """"step", "train" and "test"."""

    @classmethod
    def of_run(cls, run: Path) -> "Phases":
        """Reads what a finished run of recipes.modulo_addition left in its directory."""
        rows = [row for row in read_rows(run / "trajectory") if "test/accuracy" in row]
        keys = {"step": AXIS, "train": "train/accuracy", "test": "test/accuracy"}
        curve = {name: [row[key] for row in rows] for name, key in keys.items()}
        return cls(Influence.load(run / "influence.safetensors"), curve)

    def reaches(self, which: str, level: float) -> int:
        """The first evaluated step at which the accuracy is at least `level`; the last one if there is none."""
        found = [step for step, value in zip(self.curve["step"], self.curve[which], strict=True) if value >= level]
        return int(found[0] if found else self.curve["step"][-1])

    @property
    def memorisation(self) -> tuple[int, int]:
        """From 5% to 99% of the training set."""
        return self.reaches("train", 0.05), self.reaches("train", 0.99)

    @property
    def generalised(self) -> int:
        """99% of the test set."""
        return self.reaches("test", 0.99)

    @property
    def rise(self) -> tuple[int, int]:
        """From 5% to 99% of the test set."""
        return self.reaches("test", 0.05), self.generalised

    def spans(self) -> dict[str, tuple[int, int]]:
        """The phases by name; the last one ends with the run. Empty ones are left out."""
        start, memorised = self.memorisation
        end = int(self.curve["step"][-1])
        spans = {
            "memorisation": (start, memorised),
            "circuit formation": (memorised, self.generalised),
            "cleanup": (self.generalised, end),
        }
        return {name: span for name, span in spans.items() if span[0] < span[1]}

    def smooth(self, values: xr.DataArray) -> xr.DataArray:
        """A running mean over the steps, without the optimizer's first ones."""
        later = values.isel(step=slice(EARLY_STEPS if values.sizes["step"] > 2 * EARLY_STEPS else 0, None))
        return later.rolling(step=SMOOTHING, center=True, min_periods=1).mean()

    def importance(self) -> xr.DataArray:
        """Ψ̄_s(Θ) of the kernel, by group; smoothed."""
        return self.smooth(self.influence.importance().sel(part="kernel"))

    def total(self, part: str) -> xr.DataArray:
        """Ψ̄_s of a part, through all groups together; smoothed."""
        return self.smooth(self.influence.total_importance().sel(part=part))

    def difference(self) -> xr.DataArray:
        """D_s(Θ) by group, as §4 defines it; smoothed."""
        return self.smooth(self.influence.relative_regularization())

    def balance(self) -> xr.DataArray:
        """Ψ̄_s(Θ) − Ψ̄^reg_s(Θ) by group: negative where the regularization dominates; smoothed."""
        importance = self.influence.importance()
        return self.smooth(importance.sel(part="kernel") - importance.sel(part="regularization"))

    def end(self, values: xr.DataArray) -> xr.DataArray:
        """The mean over the last steps of the run."""
        return values.isel(step=slice(-max(1, round(END * values.sizes["step"])), None)).mean("step")

    def during(self, values: xr.DataArray, span: tuple[int, int | None]) -> xr.DataArray:
        """The part of a curve that lies in the span, (first step, None) up to its end; the whole curve if nothing
        does."""
        part = values.sel(step=slice(*span))
        return part if part.sizes["step"] else values


@dataclass(frozen=True)
class Claim:
    """A statement of §5.1, the number that tests it, and when it holds."""

    text: str
    number: str
    measure: Callable[[Phases], float]
    holds: Callable[[float], bool]

    def test(self, phases: Phases) -> dict[str, Any]:
        """The claim's number for a run, and whether the claim holds for it."""
        value = self.measure(phases)
        return {"value": value, "holds": bool(self.holds(value))}


def _test_accuracy_once_memorised(phases: Phases) -> float:
    return float(np.interp(phases.memorisation[1], phases.curve["step"], phases.curve["test"]))


def _correlation(phases: Phases) -> float:
    kernel, decay = (
        np.log(phases.during(phases.total(part), (phases.memorisation[0], None)).values)
        for part in ("kernel", "regularization")
    )
    if min(kernel.std(), decay.std()) < 1e-6:  # a curve without a course
        return float("nan")
    return float(np.corrcoef(kernel, decay)[0, 1])


def _peak_before_generalisation(phases: Phases) -> float:
    return float(phases.total("kernel").idxmax("step")) / phases.generalised


def _end_ratio(phases: Phases) -> float:
    return float(phases.end(phases.total("regularization")) / phases.end(phases.total("kernel")))


def _decoder_leads(phases: Phases) -> float:
    kernel = phases.during(phases.importance(), phases.memorisation)
    return float((kernel.idxmax("group") == "decoder").mean())


def _decoder_peak(phases: Phases, values: xr.DataArray) -> float:
    decoder = phases.during(values.sel(group="decoder"), (phases.memorisation[0], None))
    return float(abs(decoder).idxmax("step")) / phases.memorisation[1]


def _middle_before_decoder(phases: Phases) -> float:
    peaks = phases.during(phases.importance(), (phases.memorisation[1], None)).idxmax("step")
    return float((peaks.sel(group=list(MIDDLE)) < peaks.sel(group="decoder")).sum())


def _late_growth(phases: Phases, groups: Sequence[str]) -> float:
    """The largest ratio, over the groups, of the end's importance to that at the peak of the total."""
    kernel = phases.importance()
    peak = kernel.sel(step=phases.total("kernel").idxmax("step"))
    return float((phases.end(kernel) / peak).sel(group=list(groups)).max())


def _embedding(phases: Phases, values: xr.DataArray) -> float:
    rise = phases.during(values, phases.rise).mean("step")
    return float(rise.sel(group="embedding") / abs(rise).max())


CLAIMS = (
    Claim(
        "The training set is memorised before anything generalises",
        "test accuracy when the training accuracy reaches 99% (below 0.05)",
        _test_accuracy_once_memorised,
        lambda value: value < 0.05,
    ),
    Claim(
        "The importances of kernel and regularization grow together",
        "correlation of their logarithms from the start of memorisation on (above 0.9)",
        _correlation,
        lambda value: value > 0.9,
    ),
    Claim(
        "The importance peaks before generalisation",
        "step of its peak over the step of 99% test accuracy (below 1)",
        _peak_before_generalisation,
        lambda value: value < 1,
    ),
    Claim(
        "The regularization dominates at the end",
        "its importance over the kernel's in the last 5% of the steps (above 1)",
        _end_ratio,
        lambda value: value > 1,
    ),
    Claim(
        "The decoder leads the memorisation",
        "share of the memorisation's steps in which its importance is the largest (above 0.5)",
        _decoder_leads,
        lambda value: value > 0.5,
    ),
    Claim(
        "The decoder's D peaks with the memorisation",
        "step of its largest |D|, once that has begun, over the memorisation's end (at most 1)",
        lambda phases: _decoder_peak(phases, phases.difference()),
        lambda value: value <= 1,
    ),
    Claim(
        "The decoder's D peaks with the memorisation, by the balance",
        "step of its largest |Ψ̄ − Ψ̄^reg|, once that has begun, over the memorisation's end (at most 1)",
        lambda phases: _decoder_peak(phases, phases.balance()),
        lambda value: value <= 1,
    ),
    Claim(
        "Attention and linear layers peak before the decoder's second peak",
        "how many of those four layers do, after the memorisation (4)",
        _middle_before_decoder,
        lambda value: value == 4,
    ),
    Claim(
        "The embedding's importance grows until the end",
        "its mean over the last 5% over its value at the peak of the total (at least 1)",
        lambda phases: _late_growth(phases, ["embedding"]),
        lambda value: value >= 1,
    ),
    Claim(
        "All other layers' importances fall at the end",
        "the largest of the same ratios of the others (below 1)",
        lambda phases: _late_growth(phases, [*MIDDLE, "decoder"]),
        lambda value: value < 1,
    ),
    Claim(
        "The regularization dominates in the embedding during circuit formation",
        "its mean D while the test accuracy rises, relative to the largest |D| of a layer (below 0)",
        lambda phases: _embedding(phases, phases.difference()),
        lambda value: value < 0,
    ),
    Claim(
        "The regularization dominates in the embedding during circuit formation, by the balance",
        "its mean Ψ̄ − Ψ̄^reg while the test accuracy rises, relative to the largest such of a layer (below 0)",
        lambda phases: _embedding(phases, phases.balance()),
        lambda value: value < 0,
    ),
)
"""§5.1, in its order."""
