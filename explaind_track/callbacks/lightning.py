"""A Tracker in `lightning.Trainer` (the `callbacks` extra)."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from explaind_track.callbacks.base import TrackerCallbackBase, active_run, gradient_norm


class TrackerCallback(TrackerCallbackBase, Callback):
    """Tracks every optimizer step of a module with one optimizer.

    Of several processes under DistributedDataParallel, rank zero explains for all; under other strategies, the main
    process its own. Samples' losses are taken under the autocast that the Trainer trains with, and its clipping is
    followed. For the arguments see `TrackerCallbackBase.__init__`.

    Example::

        from explaind_track import Query
        from explaind_track.callbacks.lightning import TrackerCallback

        callback = TrackerCallback(queries={"test": Query.outputs(x_test, y_test)}, trajectory="runs/a")
        Trainer(callbacks=[callback]).fit(module, loader)
        callback.tracker.influence("test")
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrapped = trainer.strategy.model
        all_ranks_track = isinstance(wrapped, DistributedDataParallel)
        if not all_ranks_track:
            self.refuse_samples_in(trainer.world_size)
        self._tracks = all_ranks_track or trainer.is_global_zero
        if not self._tracks:
            return

        if len(trainer.optimizers) != 1:
            raise ValueError(f"the module has {len(trainer.optimizers)} optimizers; a Tracker watches one")
        (optimizer,) = trainer.optimizers
        runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        self._use_precision_of(trainer)
        self.make_tracker(wrapped if all_ranks_track else pl_module, optimizer, runs[0] if runs else active_run())
        self._steps_closed = trainer.global_step
        self._restore_optimizer = run_closure_first(optimizer, lambda: self._follow_clipping(trainer))

    def _use_precision_of(self, trainer: Trainer) -> None:
        """Takes the samples' losses under the autocast that the Trainer trains with."""
        if not self.tells_batches:
            return
        loss, precision = self._options["sample_loss"], trainer.precision_plugin

        def sample_loss(model: nn.Module, batch: Any) -> Tensor:
            with precision.forward_context():
                losses: Tensor = loss(model, batch)
            return losses

        self._options["sample_loss"] = sample_loss

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._tracks:
            self.open_step()
            self.tell_batch(batch, batch, trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the gradient's norm: Lightning calls this before it clips."""
        if self._tracks and self.tells_batches and trainer.gradient_clip_val:
            self._norm_before_clipping = gradient_norm(pl_module)

    def _follow_clipping(self, trainer: Trainer) -> None:
        """Tells the Tracker how the Trainer has clipped, once it has."""
        if not (self.tells_batches and trainer.gradient_clip_val):
            return
        if trainer.gradient_clip_algorithm == "value":
            self.tracker.gradient_altered()
        else:
            self.tell_clipping(self._norm_before_clipping)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the step with the batch that ended in an optimizer step; with accumulation, others do not."""
        if self._tracks and trainer.global_step != self._steps_closed:
            self._steps_closed = trainer.global_step
            self.close_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tracks:
            self._restore_optimizer()
            self.finish_tracker()


def run_closure_first(optimizer: torch.optim.Optimizer, after_closure: Callable[[], None]) -> Callable[[], None]:
    """Lets `optimizer.step(closure)` call the closure, and then `after_closure`, before the step begins.

    Lightning passes its forward and backward pass as the closure, which an optimizer calls as its first act: the
    Tracker, which looks at the gradient before the step, would find none. Returns a function that undoes this.
    """
    attribute_before = optimizer.__dict__.get("step")  # a learning-rate schedule wraps `step` so
    original_step = optimizer.step
    undone = False

    def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if undone:
            return original_step(closure)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        after_closure()
        original_step()
        return result

    # a bound method, since a schedule that is made later (the one of averaged weights) takes it for one
    ours = optimizer.__dict__["step"] = MethodType(step, optimizer)

    def undo() -> None:
        nonlocal undone
        undone = True
        if optimizer.__dict__["step"] is not ours:  # inside of what was wrapped around it since, it stays
            return
        del optimizer.__dict__["step"]
        if attribute_before is not None:
            optimizer.__dict__["step"] = attribute_before

    return undo
