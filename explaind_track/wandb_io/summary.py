"""What a run's summary says at W&B beside last values: plain numbers, which tables, sweeps and filters can use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from explaind_track.record.history import TRACKERS_SECTIONS, is_residual, numbers_in
from explaind_track.record.layer_types import without_cells

MEAN, MAX = "_mean", "_max"
"""Behind a key: the mean of its values over the run, and the largest."""


@dataclass
class _Sums:
    count: int = 0
    total: float = 0.0
    largest: float = float("-inf")


class RunSummary:
    """Takes a run's rows, and sums up those of the Tracker's own numbers of which the last value alone says little."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}
        self._keys: set[str] = set()

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in a row."""
        for key, value in without_cells(numbers_in(row)).items():
            self._keys.add(key)
            if not TRACKERS_SECTIONS.isdisjoint(key.split("/")[:-1]):
                sums = self._sums.setdefault(key, _Sums())
                sums.count += 1
                sums.total += value
                sums.largest = max(sums.largest, value)

    def numbers(self) -> dict[str, float]:
        """Means of importances, D, residuals and seconds, and the largest residuals; none that has a row's own key."""
        found: dict[str, float] = {}
        for key, sums in self._sums.items():
            found[key + MEAN] = sums.total / sums.count
            if is_residual(key):
                found[key + MAX] = sums.largest
        return {key: value for key, value in found.items() if key not in self._keys}
