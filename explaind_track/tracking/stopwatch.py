"""The wall time that a run spends, by what it is spent on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of training, of explaining, and of recording."""

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "influence": 0.0, "trajectory": 0.0}
        self._lap = {"training": 0.0, "tracking": 0.0}

    @property
    def of_tracking(self) -> float:
        """The seconds that training would not have taken by itself."""
        return self.seconds["influence"] + self.seconds["trajectory"]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times a step, or a part of one; what `timed` has not told of is training."""
        tracking_before, started = self.of_tracking, time.perf_counter()
        yield
        tracking = self.of_tracking - tracking_before
        training = time.perf_counter() - started - tracking

        self.seconds["training"] += training
        self._lap["training"] += training
        self._lap["tracking"] += tracking

    def take_lap(self) -> tuple[float, float]:
        """The seconds of training and of tracking in the steps since the last call."""
        training, tracking = self._lap.values()
        self._lap = dict.fromkeys(self._lap, 0.0)
        return training, tracking
