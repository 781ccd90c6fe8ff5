"""What an explanation will take, before it starts: passes, memory and time; and the refusal of what does not fit."""

import os
import sys
from abc import abstractmethod
from collections.abc import Callable
from os import PathLike
from time import perf_counter

from tqdm.auto import tqdm

from explaind_track.core import distributed
from explaind_track.core.influence import Influence
from explaind_track.core.summary import Summarized, Summary, sizes_in_words

WORTH_TRYING = 50
"""Steps from which on one or two are tried beforehand."""


class ExplanationPlan(Summarized):
    """An explanation that is planned and not yet computed: `describe()` tells what it takes, `run()` does it."""

    def __init__(self, progress: bool, out: str | PathLike[str] | None) -> None:
        """progress: show a bar. out: a directory for the result, where it is gone on with; None: memory."""
        self.progress, self.out = progress, out

    @property
    @abstractmethod
    def shape(self) -> dict[str, int]:
        """The sizes of the influences' axes."""

    @property
    @abstractmethod
    def result_bytes(self) -> int:
        """The size of the result."""

    @property
    @abstractmethod
    def working_bytes(self) -> int:
        """About how much memory is taken beside the result."""

    @property
    @abstractmethod
    def mode(self) -> str:
        """How a step is differentiated, in words."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """How often the trajectory is gone through."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """The steps that are gone through in all passes together."""

    @abstractmethod
    def seconds(self) -> float:
        """An estimate, from the time that a step or two take."""

    @abstractmethod
    def compute(self) -> Influence:
        """Does the work, in memory or in the directory `out`."""

    def run(self) -> Influence:
        """Computes the influences.

        Raises:
            ValueError: Before any work, for what does not fit into memory.
        """
        if self.out is None:
            self._refuse_what_does_not_fit()
        if self.progress and self.steps >= WORTH_TRYING and distributed.rank() == 0:
            self._tell_of_long_work()
        return self.compute()

    def _tell_of_long_work(self) -> None:
        """Says what is about to be done where that takes more than a minute, as long as one knows before."""
        try:
            seconds = self.seconds()
        except ValueError:  # of steps that pass by only once
            return
        if seconds > 60:
            tqdm.write(
                f'explain: {self.steps:,} steps in {self.mode} will take about {_duration(seconds)}; accuracy="live" '
                "takes least, and window=(first, last) fewer steps",
                file=sys.stderr,
            )

    def describe(self) -> str:
        """Tells passes, memory and time in words. Takes as long as a few steps do, since it tries them.

        Raises:
            ValueError: For steps that pass by only once, of which none can be tried.
        """
        lines = [
            f"influences: {self._axes()}, {self.result_bytes / 1e6:,.1f} MB",
            f"work:       {self.steps} steps in {self.passes} pass(es), with about {self.working_bytes / 1e6:,.0f} MB",
            f"mode:       {self.mode}",
            f"time:       about {_duration(self.seconds())}",
        ]
        if self.out is None and self.result_bytes > room():
            lines.append(f"too large for the memory ({room() / 1e9:,.1f} GB): needs out=, a directory")
        return "\n".join(lines)

    def _axes(self) -> str:
        return sizes_in_words(self.shape)

    def _summary(self) -> Summary:
        rows = [
            ["result", f"{self._axes()}, {self.result_bytes / 1e6:,.1f} MB"],
            ["work", f"{self.steps} steps in {self.passes} pass(es), with about {self.working_bytes / 1e6:,.0f} MB"],
            ["to do", "describe() tries a step and tells the time, run() computes"],
        ]
        return Summary("Explanation, planned", ["", ""], rows)

    def _refuse_what_does_not_fit(self) -> None:
        if self.result_bytes > room():
            raise ValueError(
                f"the result ({self._axes()}) takes {self.result_bytes / 1e9:,.2f} GB, of {room() / 1e9:,.2f} GB that "
                "can be had here: pass out=, a directory that it is written to piece by piece, or keep fewer axes, a "
                "shorter window, or fewer samples"
            )


def room() -> int:
    """Bytes that a result may take: half of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def timed(action: Callable[[], object]) -> float:
    """The seconds that an action takes once it is warm, but it is not done twice if it takes long."""
    started = perf_counter()
    action()
    first = perf_counter() - started
    if first > 5:
        return first

    started = perf_counter()
    action()
    return perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
