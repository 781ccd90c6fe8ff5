"""A Tracker in `transformers.Trainer` (the `callbacks` extra)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from explaind_track.callbacks.base import TrackerCallbackBase, active_run


class TrackerCallback(TrackerCallbackBase, TrainerCallback):
    """Tracks every optimizer step of the Trainer, in its main process; skipped steps leave no trace.

    `sample_loss` and `index` get a batch as the keyword arguments of the model's forward pass. The Trainer's clipping
    is followed. For the arguments see `TrackerCallbackBase.__init__`.

    Example::

        from explaind_track import Query
        from explaind_track.callbacks.transformers import TrackerCallback

        query = Query.function(inputs, lambda output: output.logits)
        callback = TrackerCallback(queries={"test": query}, trajectory="runs/a")
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        callback.tracker.influence("test")
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        self.refuse_samples_in(args.world_size)
        if not state.is_world_process_zero:
            return

        model, optimizer = around["model"], around["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self.make_tracker(model, optimizer, active_run())

        # The Trainer hands a callback neither its batches nor the gradient before clipping: hooks do.
        self._first_parameter = next(model.parameters())
        self._batches_in_step = args.gradient_accumulation_steps
        self._hooks = [
            # no bound method: a deep copy of the model would copy the callback with it
            model.register_forward_pre_hook(lambda *call: self._before_forward(*call), with_kwargs=True)
        ]
        self._norms: dict[Tensor, Tensor] = {}
        self._follows_clipping = self.tells_batches and bool(args.max_grad_norm)
        if self._follows_clipping:
            self._hooks += [p.register_post_accumulate_grad_hook(self._note_norm) for p in model.parameters()]

    def _before_forward(self, model: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        """Tells of the batch that goes into the model, unless it is the Tracker that calls the model.

        A model that is told the number of items in all accumulated batches is expected to divide by it: the Trainer
        then leaves its loss as it is, also where the model ignores the number and takes the mean of each batch.
        """
        is_trackers_own = next(model.parameters()) is not self._first_parameter  # it puts others in their place
        if not self._step_is_open or is_trackers_own:
            return

        batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
        divided_by_model = inputs.get("num_items_in_batch") is not None
        self.tell_batch(batch, inputs, 1 if divided_by_model else self._batches_in_step)

    def _note_norm(self, parameter: Tensor) -> None:
        """Notes the norm of a gradient that was just added to: the last one of a step is that before clipping."""
        assert parameter.grad is not None  # it was just added to
        self._norms[parameter] = parameter.grad.norm()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        if state.is_world_process_zero:
            self.open_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        """Tells the Tracker how the gradient was clipped: the Trainer calls this after it has."""
        if state.is_world_process_zero and self._follows_clipping:
            self.tell_clipping(float(torch.stack(list(self._norms.values())).norm()))
            self._norms = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any) -> None:
        if state.is_world_process_zero:
            self.close_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        if state.is_world_process_zero:
            for hook in self._hooks:
                hook.remove()
            self.finish_tracker()
