"""A Tracker in `transformers.Trainer` (the `callbacks` extra)."""

import sys
from collections.abc import Mapping, MutableMapping
from copy import copy
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.callbacks.base import TrackerCallbackBase, active_run, clipped_by, gradient_norm
from explaind_track.callbacks.sample_losses import sample_losses
from explaind_track.core.checks import missing_package
from explaind_track.core.shards import in_pieces
from explaind_track.core.tokens import TokenText
from explaind_track.tracking.ddp import refuse_flat_parameters

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise missing_package("transformers", "callbacks", "the callback for its Trainer") from error

__all__ = ["TrackerCallback", "sample_losses"]


class TrackerCallback(TrackerCallbackBase, TrainerCallback):
    """Tracks every optimizer step of the Trainer; skipped steps leave no trace.

    Of several processes, the main one explains groups; with `fsdp=True`, where each holds a piece of the parameters,
    all of them together, for queries that are scalars.

    `sample_loss`, `index` and `weight` get a batch as the data loader gave it, whatever the Trainer or its
    `compute_loss` then take out of it: `sample_loss` its tensors, the others all of it, and `num_items_in_batch` where
    the Trainer counts items. The Trainer's scaling of losses and its clipping are followed. For models of transformers
    there is a `sample_loss` that is ready, `sample_losses`, which follows the Trainer's label smoothing too. Tables of
    samples show their text where the Trainer has a `processing_class`. For the
    arguments see `TrackerCallbackBase.__init__`.

    Example::

        from explaind_track import Query
        from explaind_track.callbacks.transformers import TrackerCallback, sample_losses

        query = Query.function(inputs, lambda output: output.logits)
        callback = TrackerCallback(queries={"test": query}, sample_loss=sample_losses, trajectory="runs/a")
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        callback.tracker.influence("test")
    """

    _training_step: "WatchedTrainingStep | None" = None
    _tracks = False
    """Whether this process has a Tracker."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        self.refuse_samples_in(args.world_size)
        refuse_flat_parameters(around["model"])
        self._tracks = state.is_world_process_zero or in_pieces(around["model"])
        if not self._tracks:
            return

        if self._sample_loss is sample_losses:
            self._options["sample_loss"] = partial(sample_losses, label_smoothing=args.label_smoothing_factor)
        tokenizer = around.get("processing_class")
        reads_text = getattr(around["model"], "main_input_name", None) == "input_ids" and hasattr(tokenizer, "decode")
        if self.tells_batches and reads_text and "render" not in self._options:
            self._options["render"] = TokenText(tokenizer)
        self._stop_watching()  # an attempt that was given up: `auto_find_batch_size` begins anew
        self.make_tracker(around["model"], around["optimizer"], active_run(), state.global_step)
        if self.tells_batches:
            self._training_step = WatchedTrainingStep(self, trainer_of(self))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        if self._tracks:
            self.open_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        """Tells the Tracker of the step's batches: the Trainer calls this once it has clipped their gradient."""
        if self._training_step is not None:
            self._training_step.tell_batches()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any) -> None:
        if self._tracks:
            self.close_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        if self._tracks:
            self._stop_watching()
            self.finish_tracker()

    def _stop_watching(self) -> None:
        if self._training_step is not None:
            self._training_step.undo()
            self._training_step = None


class WatchedTrainingStep:
    """Takes the place of `training_step` in one Trainer, and calls it.

    It is given the batches as the loader gave them, before any `compute_loss` takes columns out, and returns between
    the backward pass and the clipping.
    """

    def __init__(self, callback: TrackerCallback, trainer: Trainer) -> None:
        self._callback, self._trainer = callback, trainer
        self._norm_before_clipping: float | None = None
        self._own_before = trainer.__dict__.get("training_step")
        self._call = trainer.training_step
        trainer.training_step = self

    def __call__(self, model: nn.Module, inputs: Any, *others: Any, **named: Any) -> Tensor:
        items = others[0] if others else named.get("num_items_in_batch")
        count = None if items is None else float(torch.as_tensor(items).flatten()[0])
        divisor = self._trainer.current_gradient_accumulation_steps
        noted = self._callback.note(_tensors_of(inputs), _with_items(inputs, items), divisor, count)

        def forward_pass_begins(*_: Any) -> None:
            nonlocal noted
            noted = self._callback.at_forward_pass(noted)
            first.remove()

        first = model.register_forward_pre_hook(forward_pass_begins)
        try:
            loss: Tensor = self._call(model, inputs, *others, **named)
        finally:
            first.remove()

        self._callback.add_batch(noted)
        if self._trainer.args.max_grad_norm and self._trainer.accelerator.sync_gradients:
            scaler = self._trainer.accelerator.scaler
            norm = gradient_norm(self._callback.tracker.model)
            self._norm_before_clipping = norm if scaler is None else norm / scaler.get_scale()
        return loss

    def tell_batches(self) -> None:
        """Tells the Tracker of the step's batches, with how the Trainer has weighed and clipped them."""
        before, self._norm_before_clipping = self._norm_before_clipping, None
        scaled_by = 1.0 if before is None else clipped_by(before, gradient_norm(self._callback.tracker.model))
        self._callback.tell_batches(scaled_by)

    def undo(self) -> None:
        if self._trainer.__dict__.get("training_step") is self:
            del self._trainer.training_step
            if self._own_before is not None:
                self._trainer.training_step = self._own_before


def trainer_of(callback: TrackerCallback) -> Trainer:
    """The Trainer that is calling the callback: it tells its callbacks neither of itself nor of its batches.

    Raises ValueError where something else is calling.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise ValueError(
        "sample_loss= needs the batches, which this callback takes from a transformers.Trainer, and another loop has "
        "called it: use a Tracker in that loop, or leave sample_loss= out (influences of groups are exact)"
    )


def _tensors_of(inputs: Any) -> Any:
    """The tensors of a batch that have samples; of another kind than a mapping, all of it."""
    if not isinstance(inputs, Mapping):
        return inputs
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}


def _with_items(inputs: Any, items: Any) -> Any:
    """The batch with the number of the step's items, where the Trainer counts them."""
    if items is None or not isinstance(inputs, MutableMapping):
        return inputs
    whole = copy(inputs)
    whole["num_items_in_batch"] = items
    return whole
