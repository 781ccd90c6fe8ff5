"""The part that all callbacks share: a Tracker, made when training begins, and steps that open and close with the
loop's."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from explaind_track.callbacks.weighing import Counts, Weighing, Weights, ways
from explaind_track.core import distributed
from explaind_track.core.checks import require_options
from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import tree_map, tree_rows
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.tracking.tracker import Tracker

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True)
class LoopBatch:
    """A micro-batch as it was right before its forward pass."""

    data: Any
    """As `sample_loss` takes it."""
    whole: Any
    """As the loop has it, for `index` and `weight`."""
    divisor: int | None
    """By which the loop divides its loss, where it does not divide by the items of the step; None: the number of the
    step's batches."""
    items_in_step: float | None
    """The items of the whole step that the loop says it divides by, if it says so."""
    random_state: Mapping[str, Tensor]


class TrackerCallbackBase:
    """Holds the Tracker of a loop that another package runs."""

    tracker: Tracker
    """The Tracker; from the beginning of the training on."""

    def __init__(
        self,
        *,
        index: Callable[[Any], Tensor] | None = None,
        weight: Callable[[Any], Tensor | float] | None = None,
        **options: Any,
    ) -> None:
        """Keeps the settings until training begins.

        Args:
            index: from a batch, as the loop has it, to the training samples that it holds, (N,). Batches are told to
                the Tracker only where it has a `sample_loss`.
            weight: from a batch to `w_{i,k}` of its samples, a number or (N,); None: as the loop weighs them, found out
                in the first steps: means over samples or over tokens, accumulated or not, with short last batches, and
                whether `sample_loss` gives a sample of several tokens the sum of their losses or the mean.
            **options: the arguments of `Tracker` but for model and optimizer, which the loop brings. Without `run=`,
                the W&B run that the loop has opened is used, if it has. With `resume=True`, the record goes on where
                the checkpoint does that the loop goes on from.

        Raises:
            TypeError: for an option that a Tracker does not have.
            ValueError: when training begins, in every process, for `sample_loss=` in several processes whose
                samples the callback does not see; and as `Tracker` does.
        """
        require_options(options, Tracker)
        self._index, self._weight, self._options = index, weight, options
        self._sample_loss: Any = options.get("sample_loss")
        self._step_context = ExitStack()
        self._step_is_open = False
        self._batches: list[LoopBatch] = []
        self._weighing = Weighing()

    @property
    def tells_batches(self) -> bool:
        """Whether the Tracker is told of batches: it explains samples only with a `sample_loss`."""
        return self._sample_loss is not None

    def refuse_samples_in(self, processes: int) -> None:
        """Raises ValueError where samples are asked for, and more than one process has some."""
        if processes > 1 and self.tells_batches:
            raise ValueError(
                f"{processes} processes train together, and the callback sees the samples of the main one alone; leave "
                "sample_loss= out (influences of groups are exact), or use a Tracker of the DistributedDataParallel in "
                "your own loop"
            )

    def make_tracker(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, run: "wandb.Run | None", steps_taken: int
    ) -> None:
        """Makes the Tracker. run: the loop's, for where the options name none; steps_taken: before training begins."""
        options = {"run": run, **self._options}
        if options.get("resume") is True:
            options["resume"] = steps_taken
        self.tracker = Tracker(model, optimizer, **options)
        self._weighing = Weighing()

    def open_step(self) -> None:
        """Opens the step unless it is open: with accumulation, a step spans several batches."""
        if not self._step_is_open:
            self._step_context.enter_context(self.tracker.step())
            self._step_is_open, self._batches = True, []

    def note(self, data: Any, whole: Any, divisor: int | None, items_in_step: float | None = None) -> LoopBatch:
        """Takes a batch down right before its forward pass, with all that the loop may then take out of it."""
        return LoopBatch(copy(data), copy(whole), divisor, items_in_step, random_state(self._device))

    def at_forward_pass(self, batch: LoopBatch) -> LoopBatch:
        """The batch, with the random numbers that come next: it was noted too early."""
        return replace(batch, random_state=random_state(self._device))

    def add_batch(self, batch: LoopBatch) -> None:
        """Adds a batch to the step that is open, since a backward pass has been run for it."""
        self._batches.append(batch)

    def tell_batches(self, scaled_by: float | None = 1.0) -> None:
        """Tells the Tracker of the step's batches, right before the optimizer's step.

        scaled_by: the factor by which the loop has scaled their gradient; None: it has changed it in another way.
        """
        if not self._batches:
            return

        # given, or found; a number where all samples weigh the same
        if self._weight is not None:
            weights = [self._weight(batch.whole) for batch in self._batches]
        else:
            found = self._find_weights(scaled_by)
            weights = [float(own[0]) if bool((own == own[0]).all()) else own for own in found]

        for batch, weight in zip(self._batches, weights, strict=True):
            index = None if self._index is None else self._index(batch.whole)
            with replayed_random_state(batch.random_state):
                self.tracker.batch(batch.data, index=index, weight=weight)

        if scaled_by is None:
            self.tracker.gradient_altered()
        elif scaled_by != 1.0:
            self.tracker.gradient_scaled(scaled_by)

    def _find_weights(self, scaled_by: float | None) -> Weights:
        """What the samples weigh, before clipping."""
        model, device = self.tracker.model, self._device
        batches = [
            Batch(tree_rows(batch.data), 1.0, None, _moved(batch.data, device), batch.random_state)
            for batch in self._batches
        ]
        counts = [
            Counts.of(own.whole, batch.size, own.divisor or len(batches), own.items_in_step)
            for own, batch in zip(self._batches, batches, strict=True)
        ]

        # a gradient does not tell where it is not that of these samples alone
        candidates = ways(counts)
        if scaled_by is None or self._options.get("auxiliary") or distributed.processes() > 1:
            return next(iter(candidates.values()))

        parameters = parameters_of(model)
        moving = {name: p for name, p in parameters.items() if p.grad is not None and p.requires_grad}
        state = State({name: p.detach() for name, p in parameters.items()}, buffers_of(model))
        samples = PerSampleGradients(model, self._options["sample_loss"], alone=False)

        def gradient(weights: Weights) -> dict[str, Tensor]:
            total = {name: torch.zeros_like(p) for name, p in moving.items()}
            for batch, weight in zip(batches, weights, strict=True):
                for name, value in samples.gradient(state, batch, weight.to(device) * scaled_by, moving).items():
                    total[name] += value
            return total

        return self._weighing.choose(candidates, gradient, {n: p.grad for n, p in moving.items() if p.grad is not None})

    @property
    def _device(self) -> torch.device:
        return next(self.tracker.model.parameters()).device

    def close_step(self) -> None:
        """Closes the step, whose row is complete then."""
        self._step_is_open = False
        self._step_context.close()

    def finish_tracker(self) -> None:
        """Closes a step that is still open, and ends the record."""
        self.close_step()
        self.tracker.finish()


def _moved(tree: Any, device: torch.device) -> Any:
    return tree_map(lambda tensor: tensor.to(device), tree)


def gradient_norm(model: nn.Module) -> float:
    """The 2-norm of the model's whole gradient."""
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def clipped_by(norm_before: float, norm: float) -> float:
    """The factor that clipping has scaled a gradient by, from its norms before and after; 1 where they do not tell."""
    return norm / norm_before if 0 < norm_before < float("inf") else 1.0


def active_run() -> "wandb.Run | None":
    """The W&B run that is open in this process."""
    import wandb

    return wandb.run
