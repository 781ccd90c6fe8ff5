"""What the callbacks share: a Tracker, made when training begins, and steps that open and close with the loop's."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from explaind_track.core.tensors import tree_rows
from explaind_track.tracking.tracker import Tracker

if TYPE_CHECKING:
    import wandb


class TrackerCallbackBase:
    """Holds the Tracker of a loop that somebody else runs."""

    def __init__(
        self,
        *,
        index: Callable[[Any], Tensor] | None = None,
        weight: Callable[[Any], Tensor | float] | None = None,
        **options: Any,
    ) -> None:
        """options: as `Tracker` takes them, without model and optimizer, which the loop brings. Without `run=`, the
        W&B run that the loop has opened is used, if it has.

        index:  which training samples a batch holds, (N,). Batches are only told to the Tracker where it has a
                sample_loss.
        weight: `w_{i,k}` of a batch's samples, a number or (N,); None: as the loop weighs losses that are means.
        """
        self._index, self._weight, self._options = index, weight, options
        self._step = ExitStack()
        self._open = False
        self.tracker: Tracker
        """From the beginning of the training on."""

    @property
    def tells_samples(self) -> bool:
        return self._options.get("sample_loss") is not None

    def check_alone(self, processes: int) -> None:
        """Raises ValueError, in every process, where samples are asked for that other processes have."""
        if processes > 1 and self.tells_samples:
            raise ValueError(
                f"{processes} processes train together, and the callback sees the samples of the main one alone; leave "
                "sample_loss= out (influences of groups are exact), or use a Tracker of the DistributedDataParallel in "
                "your own loop"
            )

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, run: "wandb.Run | None") -> None:
        self.tracker = Tracker(model, optimizer, **{"run": run, **self._options})

    def open_step(self) -> None:
        """Opens the step unless it is open: with accumulation, one spans several batches."""
        if not self._open:
            self._step.enter_context(self.tracker.step())
            self._open = True

    def take(self, batch: Any, whole: Any, divisor: int) -> None:
        """Tells of a batch right before its forward pass. whole: as the loop has it; divisor: of its mean loss."""
        if self.tells_samples:
            index = None if self._index is None else self._index(whole)
            weight = 1.0 / (tree_rows(batch) * divisor) if self._weight is None else self._weight(whole)
            self.tracker.batch(batch, index=index, weight=weight)

    def tell_clipping(self, before: float) -> None:
        """Tells by which factor the loop has clipped the gradient, whose norm was `before`."""
        if before > 0:
            self.tracker.gradient_scaled(gradient_norm(self.tracker.model) / before)

    def close_step(self) -> None:
        self._open = False
        self._step.close()

    def end(self) -> None:
        self.close_step()
        self.tracker.finish()


def gradient_norm(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def active_run() -> "wandb.Run | None":
    """The W&B run that is open in this process."""
    import wandb

    return wandb.run
