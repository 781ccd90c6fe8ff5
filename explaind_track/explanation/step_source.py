"""These steps, this model, this window: where every explanation and analysis takes its steps from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property
from os import PathLike

import torch
from torch import nn

from explaind_track.core.checks import require_instance, require_window, shown
from explaind_track.core.step import Batch, Step
from explaind_track.explanation.plan import timed
from explaind_track.record.trajectory import Trajectory

Window = tuple[int, int]
"""`(first, last)`: the steps first ≤ s < last."""


class StepSource(ABC):
    """The steps first ≤ s < last of a run, in their order.

    `StepSource.of` makes one of whatever a caller has. Every step that it gives is valid at that moment, or ValueError
    is raised: nothing is computed from tensors that hold a later step by now.
    """

    def __init__(self, start: int, first: int, last: int) -> None:
        """start: the run's first step."""
        self.start, self.first, self.last = start, first, last

    @staticmethod
    def of(steps: Trajectory | Iterable[Step], model: nn.Module, window: Window | None) -> "StepSource":
        """The source of a trajectory; of a list of steps that last; or of a stream of steps, each valid until the next.

        Raises TypeError for what is none of these; ValueError for a model that is not the one recorded, a window
        outside of the run, a window of a stream, and a list of steps that do not last, or are not in their order.
        """
        require_instance("the model", model, nn.Module, "pass the module that was trained")
        if isinstance(steps, str | PathLike):
            raise TypeError(
                f"the steps are those of a Trajectory, not {steps!r}: write Trajectory.open({str(steps)!r})"
            )
        if not isinstance(steps, Trajectory | Iterable):
            raise TypeError(f"the steps are a Trajectory, or an iterable of Step, not {shown(steps)}")
        window = None if window is None else require_window(window)

        if isinstance(steps, Trajectory):
            steps.check_model(model)
            return RecordedSteps(steps, window)
        return HeldSteps(steps, window) if isinstance(steps, Sequence) else PassingSteps(steps, window)

    def __len__(self) -> int:
        """The number of steps within the window, with what has changed the model behind the run's last step, where the
        window reaches to that; 0 where nobody knows."""
        return self.last - self.first

    @abstractmethod
    def repeatable(self) -> "RepeatableSteps":
        """The same steps, to be gone through again and backwards. Those of a stream are held: ValueError is raised
        unless they last."""

    @abstractmethod
    def forwards(self, first: int, last: int) -> Iterator[Step]:
        """Steps first ≤ s < last; behind the run's last one what has changed the model since (`Step.closing`)."""

    @abstractmethod
    def trial(self) -> tuple[Step, float]:
        """The step in the middle of the window, and the seconds that it takes to come to it from the step before."""

    @property
    def fingerprint(self) -> str:
        """Tells one recorded run from another. Raises ValueError for steps that are not recorded."""
        raise ValueError("out= goes on where it stopped, for which the steps have to be those of a trajectory")

    @property
    def has_outside(self) -> bool:
        """Whether any step of the window may have the part `outside`; for recorded steps."""
        raise NotImplementedError


class RepeatableSteps(StepSource):
    """Steps that can be gone through again, and backwards together with those before the window."""

    def repeatable(self) -> "RepeatableSteps":
        return self

    @abstractmethod
    def backwards(self, last: int, memory: int) -> Iterator[Step]:
        """All the run's steps before `last`, the last one first. memory: bytes that may be held for it."""

    @abstractmethod
    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Every batch of the run before the window's end, with the number of its step."""

    def reach(self, first: int, last: int, memory: int) -> int:
        """The first step whose gradient, carried on by momentum, can be told from 0 in the steps first ≤ s < last."""
        decay: dict[str, float] = {}
        for step in self.backwards(last, memory):
            for name, update in step.updates.items():
                if update.rule.buffer is None:
                    continue
                if step.number >= first:
                    decay[name] = abs(update.rule.beta)
                elif name in decay:
                    decay[name] *= abs(update.rule.beta)

            smallest = torch.finfo(next(iter(step.before.parameters.values())).dtype).eps
            if step.number <= first and all(value < smallest for value in decay.values()):
                return step.number
        return self.start


class RecordedSteps(RepeatableSteps):
    """A trajectory's steps, replayed whenever they are asked for."""

    def __init__(self, trajectory: Trajectory, window: Window | None) -> None:
        super().__init__(0, *_within(0, len(trajectory), window))
        self._trajectory = trajectory

    def __len__(self) -> int:
        count, end = self.last - self.first, len(self._trajectory)
        if self.last < end:  # then the end of the record need not be fetched
            return count
        return count + (self._trajectory.is_replaced(end) or not self._trajectory.outside(end).is_empty)

    @property
    def fingerprint(self) -> str:
        return self._trajectory.fingerprint

    @cached_property
    def has_outside(self) -> bool:
        recorded = self._trajectory
        numbers = range(self.first, self.last + (self.last == len(recorded)))
        within = (entry for entry in recorded.segments if entry.first <= numbers[-1] and entry.last >= self.first)
        opened = map(recorded.read_segment, within)
        told = (number in numbers for segment in opened for number in segment.changed_from_outside())
        return any(map(recorded.is_replaced, numbers)) or bool(recorded.outside(numbers[-1]).parameters) or any(told)

    def forwards(self, first: int, last: int) -> Iterator[Step]:
        return self._trajectory.steps(first, last)

    def backwards(self, last: int, memory: int) -> Iterator[Step]:
        return self._trajectory.steps_back(self.start, last, memory)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        return self._trajectory.batches_before(self.last)

    def trial(self) -> tuple[Step, float]:
        middle = (self.first + self.last) // 2
        start = self._trajectory.keyframe(middle)
        stop = min(start + 10, middle + 1)
        replay = timed(lambda: sum(1 for _ in self.forwards(start, stop))) / (stop - start)
        return next(self.forwards(middle, middle + 1)), replay


class HeldSteps(RepeatableSteps):
    """Steps in memory, all of them valid at once."""

    def __init__(self, steps: Iterable[Step], window: Window | None) -> None:
        self._steps: list[Step] = []
        for step in _in_order(steps):
            if self._steps:
                self._steps[-1].require_valid()  # said as soon as it can be, for there may be thousands to come
            self._steps.append(step)

        for step in self._steps:
            step.require_valid()

        taken = [step.number for step in self._steps if not step.closing]
        start, self._stop = (taken[0], taken[-1] + 1) if taken else (0, 0)
        first, last = _within(start, self._stop, window) if taken or window else (0, 0)
        super().__init__(start, first, last)

    def __len__(self) -> int:
        return sum(1 for _ in self.forwards(self.first, self.last))

    def forwards(self, first: int, last: int) -> Iterator[Step]:
        ends = last == self._stop
        return _in_order(s for s in self._steps if first <= s.number < last or (s.closing and ends))

    def backwards(self, last: int, memory: int) -> Iterator[Step]:
        for step in reversed(self._steps):
            if step.number < last:
                step.require_valid()
                yield step

    def batches(self) -> Iterator[tuple[int, Batch]]:
        return ((step.number, batch) for step in self._steps if step.number < self.last for batch in step.batches)

    def trial(self) -> tuple[Step, float]:
        steps = list(self.forwards(self.first, self.last))
        return steps[len(steps) // 2], 0.0


class PassingSteps(StepSource):
    """Steps that pass by once, each perhaps valid until the next only. Nobody knows their numbers beforehand."""

    def __init__(self, steps: Iterable[Step], window: Window | None) -> None:
        if window is not None:
            raise ValueError(
                "a window is for trajectories and for lists of steps that last; of a stream, pass the steps that you "
                "want"
            )
        super().__init__(0, 0, 0)
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps) if isinstance(self._steps, Sized) else 0

    def repeatable(self) -> RepeatableSteps:
        return HeldSteps(self._steps, None)

    def forwards(self, first: int, last: int) -> Iterator[Step]:
        """All of them. Raises ValueError if none comes, as of a stream that has passed already."""
        none = True
        for step in _in_order(self._steps):
            none = False
            yield step
        if none:
            raise ValueError("there is no step to take: a stream of steps passes by only once")

    def trial(self) -> tuple[Step, float]:
        raise ValueError("the time is estimated by trying a step, which steps that pass by only once do not allow")


def _within(start: int, stop: int, window: Window | None) -> Window:
    """The window of a run with the steps start ≤ s < stop. Raises ValueError if it is not within the run."""
    first, last = window or (start, stop)
    if not start <= first < last <= stop:
        raise ValueError(
            f"window=({first}, {last}) is not within the run: a window (first, last) holds the steps first ≤ s < last, "
            f"and the run has {stop - start} steps, so that {start} ≤ first < last ≤ {stop}"
        )
    return first, last


def _in_order(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps, each of them valid. Raises ValueError for one that is not, or comes too late."""
    last: int | None = None
    for step in steps:
        step.require_valid()
        if last is not None and step.number <= last:
            raise ValueError(f"steps are taken in their order, but step {step.number} came after step {last}")
        last = step.number
        yield step
