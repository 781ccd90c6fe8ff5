"""A Tracker in `lightning.Trainer` (the `guests` extra).

callback = TrackerCallback(queries={"test": Query.outputs(x_test, y_test)}, trajectory="runs/a")
Trainer(callbacks=[callback]).fit(module, loader)
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from explaind_track.callbacks.base import TrackerCallbackBase, active_run, gradient_norm


class TrackerCallback(TrackerCallbackBase, Callback):
    """Tracks every optimizer step of a module with one optimizer. Of several processes under DistributedDataParallel,
    rank zero explains for all; under other strategies, the main one its own. See `TrackerCallbackBase`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrapped = trainer.strategy.model
        together = isinstance(wrapped, DistributedDataParallel)
        if not together:
            self.check_alone(trainer.world_size)
        self._here = together or trainer.is_global_zero
        if not self._here:
            return
        if len(trainer.optimizers) != 1:
            raise ValueError(f"the module has {len(trainer.optimizers)} optimizers; a Tracker watches one")
        (optimizer,) = trainer.optimizers
        runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        self._in_its_precision(trainer)
        self.begin(wrapped if together else pl_module, optimizer, runs[0] if runs else active_run())
        self._taken = trainer.global_step
        self._give_back = closure_first(optimizer, lambda: self._clipped(trainer))

    def _in_its_precision(self, trainer: Trainer) -> None:
        """Samples' losses are the loop's own, under the autocast that it trains with."""
        if self.tells_samples:
            loss, precision = self._options["sample_loss"], trainer.precision_plugin

            def sample_loss(model: nn.Module, batch: Any) -> Tensor:
                with precision.forward_context():
                    losses: Tensor = loss(model, batch)
                return losses

            self._options["sample_loss"] = sample_loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the trainer clips."""
        if self._here and self.tells_samples and trainer.gradient_clip_val:
            self._norm = gradient_norm(pl_module)

    def _clipped(self, trainer: Trainer) -> None:
        if self.tells_samples and trainer.gradient_clip_val:
            if trainer.gradient_clip_algorithm == "value":
                self.tracker.gradient_altered()
            else:
                self.tell_clipping(self._norm)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._here:
            self.open_step()
            self.take(batch, batch, trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._here and trainer.global_step != self._taken:
            self._taken = trainer.global_step
            self.close_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._here:
            self._give_back()
            self.end()


def closure_first(optimizer: torch.optim.Optimizer, then: Callable[[], None]) -> Callable[[], None]:
    """Lets `optimizer.step(closure)` call the closure, and `then`, before the step begins instead of as its first act,
    so that the gradient is there when the step is looked at. Returns how to undo it."""
    before = optimizer.__dict__.get("step")
    take = optimizer.step

    def step(closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        then()
        take()
        return result

    def undo() -> None:
        del optimizer.step
        if before is not None:
            optimizer.__dict__["step"] = before

    optimizer.step = step  # type: ignore[method-assign]
    return undo
