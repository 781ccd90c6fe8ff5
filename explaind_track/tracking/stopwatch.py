"""The wall time that a run spends, by what it is spent on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of training, of explaining, and of recording."""

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "influence": 0.0, "trajectory": 0.0}

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
