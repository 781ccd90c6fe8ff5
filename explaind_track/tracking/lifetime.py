"""How long a Tracker watches an optimizer: one Tracker at a time, and as a context to the end of the training."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch.utils.hooks import RemovableHandle

from explaind_track.errors import StaleTrackerWarning
from explaind_track.tracking.step_watch import StepWatch


class Lifetime(ABC):
    """A Tracker from its first step to its end. Within `with`, that is the end of the block, however that is left."""

    _watch: StepWatch
    _hooks: Sequence[RemovableHandle]
    """Those on the optimizer."""
    _finishing: bool
    """Whether the run is over, and what has changed the model behind its last step is told too."""

    @abstractmethod
    def finish(self) -> None:
        """Ends the run; see `Tracker.finish`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Finishes. Where an exception leaves the block, it is that which the caller sees, with a note of what could
        not be finished."""
        if self._finishing:
            return
        try:
            self.finish()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"and the Tracker could not be finished: {failure!r}")


_watching: "WeakKeyDictionary[torch.optim.Optimizer, ReferenceType[Lifetime]]" = WeakKeyDictionary()
"""The Tracker of each optimizer that has one."""


def end_stale(optimizer: torch.optim.Optimizer) -> None:
    """Finishes the Tracker that watches the optimizer already, as a cell of a notebook that is run again has left it.

    Warns with StaleTrackerWarning, which names it. Raises RuntimeError where it has a step open.
    """
    known = _watching.get(optimizer)
    stale = None if known is None else known()
    if stale is None or stale._finishing:
        return

    named = f"{str(stale).splitlines()[0]}, {stale._watch.number} steps so far"
    if stale._watch.open:
        raise RuntimeError(
            f"another Tracker watches this optimizer, in the midst of a step ({named}): leave its `with "
            "tracker.step():`, and call its finish(), before you make another"
        )
    warnings.warn(
        f"this optimizer had a Tracker already ({named}), which is finished now, as by its finish(); a new one goes on",
        StaleTrackerWarning,
        stacklevel=3,
    )
    for hook in stale._hooks:  # in a process that was forked from its own, this is all that it does
        hook.remove()
    stale.finish()


def begin(optimizer: torch.optim.Optimizer, tracker: Lifetime) -> None:
    """Takes note that the Tracker watches the optimizer from here on."""
    _watching[optimizer] = ref(tracker)
