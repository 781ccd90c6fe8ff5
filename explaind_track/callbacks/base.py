"""The part that all callbacks share: a Tracker, made when training begins, and steps that open and close with the
loop's."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from explaind_track.core.checks import require_options
from explaind_track.core.tensors import tree_rows
from explaind_track.tracking.tracker import Tracker

if TYPE_CHECKING:
    import wandb


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
            weight: from a batch to `w_{i,k}` of its samples, a number or (N,); None: as the loop weighs losses that are
                means.
            **options: the arguments of `Tracker` but for model and optimizer, which the loop brings. Without `run=`,
                the W&B run that the loop has opened is used, if it has.

        Raises:
            TypeError: for an option that a Tracker does not have.
            ValueError: when training begins, in every process, for `sample_loss=` in several processes whose
                samples the callback does not see; and as `Tracker` does.
        """
        require_options(options, Tracker)
        self._index, self._weight, self._options = index, weight, options
        self._step_context = ExitStack()
        self._step_is_open = False

    @property
    def tells_batches(self) -> bool:
        """Whether the Tracker is told of batches: it explains samples only with a `sample_loss`."""
        return self._options.get("sample_loss") is not None

    def refuse_samples_in(self, processes: int) -> None:
        """Raises ValueError where samples are asked for, and more than one process has some."""
        if processes > 1 and self.tells_batches:
            raise ValueError(
                f"{processes} processes train together, and the callback sees the samples of the main one alone; leave "
                "sample_loss= out (influences of groups are exact), or use a Tracker of the DistributedDataParallel in "
                "your own loop"
            )

    def make_tracker(self, model: nn.Module, optimizer: torch.optim.Optimizer, run: "wandb.Run | None") -> None:
        """Makes the Tracker. run: the loop's, for where the options name none."""
        self.tracker = Tracker(model, optimizer, **{"run": run, **self._options})

    def open_step(self) -> None:
        """Opens the step unless it is open: with accumulation, a step spans several batches."""
        if not self._step_is_open:
            self._step_context.enter_context(self.tracker.step())
            self._step_is_open = True

    def tell_batch(self, batch: Any, whole: Any, divisor: int) -> None:
        """Tells the Tracker of a batch, right before its forward pass.

        Args:
            batch: as `sample_loss` takes it.
            whole: as the loop has it, for `index` and `weight`.
            divisor: by which the loop divides the batch's mean loss: the number of batches in a step.
        """
        if not self.tells_batches:
            return

        index = None if self._index is None else self._index(whole)
        weight = 1.0 / (tree_rows(batch) * divisor) if self._weight is None else self._weight(whole)
        self.tracker.batch(batch, index=index, weight=weight)

    def tell_clipping(self, norm_before: float) -> None:
        """Tells the Tracker by which factor the loop has clipped the gradient."""
        if norm_before > 0:
            self.tracker.gradient_scaled(gradient_norm(self.tracker.model) / norm_before)

    def close_step(self) -> None:
        """Closes the step, whose row is complete then."""
        self._step_is_open = False
        self._step_context.close()

    def finish_tracker(self) -> None:
        """Closes a step that is still open, and ends the record."""
        self.close_step()
        self.tracker.finish()


def gradient_norm(model: nn.Module) -> float:
    """The 2-norm of the model's whole gradient."""
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def active_run() -> "wandb.Run | None":
    """The W&B run that is open in this process."""
    import wandb

    return wandb.run
