"""A Tracker in `lightning.Trainer` (the `callbacks` extra)."""

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from explaind_track.callbacks.base import LoopBatch, TrackerCallbackBase, active_run, clipped_by, gradient_norm
from explaind_track.core.checks import missing_package
from explaind_track.core.shards import in_pieces
from explaind_track.tracking.ddp import refuse_flat_parameters

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.plugins import HalfPrecision
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ModuleNotFoundError as error:
    raise missing_package("lightning", "callbacks", "the callback for its Trainer") from error


class TrackerCallback(TrackerCallbackBase, Callback):
    """Tracks every optimizer step of a module with one optimizer.

    Of several processes under DistributedDataParallel, rank zero explains for all; under ModelParallelStrategy, where
    each holds a piece of the parameters, all of them together, queries that are scalars; under other strategies, the
    main process its own. Samples' losses are taken under the autocast that the Trainer trains with, and its clipping is
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
        refuse_flat_parameters(wrapped)
        all_ranks_track = isinstance(wrapped, DistributedDataParallel) or in_pieces(wrapped)
        if not all_ranks_track:
            self.refuse_samples_in(trainer.world_size)
        self._tracks = all_ranks_track or trainer.is_global_zero
        if not self._tracks:
            return

        if len(trainer.optimizers) != 1:
            raise ValueError(f"the module has {len(trainer.optimizers)} optimizers; a Tracker watches one")
        (optimizer,) = trainer.optimizers
        runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        run = runs[0] if runs else active_run()
        self._use_precision_of(trainer)
        self.make_tracker(wrapped if all_ranks_track else pl_module, optimizer, run, trainer.global_step)

        self._steps_closed = trainer.global_step
        self._batch_at_hand: LoopBatch | None = None
        self._norm_before_clipping: float | None = None
        hooks = ("configure_gradient_clipping", "on_after_backward", "on_before_optimizer_step")
        self._may_scale_gradient = not pl_module.automatic_optimization or any(
            is_overridden(hook, pl_module) for hook in hooks
        )
        self._restore_optimizer = run_closure_first(optimizer, lambda: self._tell_batches(trainer, pl_module))

    def _use_precision_of(self, trainer: Trainer) -> None:
        """Takes the samples' losses in the precision that the Trainer trains with, autocast or type."""
        if not self.tells_batches:
            return
        loss, precision = self._sample_loss, trainer.precision_plugin

        def sample_loss(model: nn.Module, batch: Any) -> Tensor:
            # parameters of a half precision are explained in float32, where its default type has no place
            is_upcast = isinstance(precision, HalfPrecision) and next(model.parameters()).dtype is torch.float32
            with nullcontext() if is_upcast else precision.forward_context():
                losses: Tensor = loss(model, batch)
            return losses

        self._options["sample_loss"] = sample_loss

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._tracks:
            self.open_step()
            divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else None
            self._batch_at_hand = self.note(batch, batch, divisor) if self.tells_batches else None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Counts the batch at hand, once: where `training_step` gives no loss, it is passed over."""
        if self._tracks and self._batch_at_hand is not None:
            self.add_batch(self._batch_at_hand)
            self._batch_at_hand = None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the gradient's norm, before the Trainer or the module can have scaled it."""
        if self._tracks and self.tells_batches and (trainer.gradient_clip_val or self._may_scale_gradient):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            norm = gradient_norm(pl_module)
            self._norm_before_clipping = norm if scaler is None else norm / scaler.get_scale()

    def _tell_batches(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the Tracker of the step's batches, once the Trainer has clipped their gradient."""
        before, self._norm_before_clipping = self._norm_before_clipping, None
        by_value = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
        self.tell_batches(None if by_value else 1.0 if before is None else clipped_by(before, gradient_norm(pl_module)))

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
