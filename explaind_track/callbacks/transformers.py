"""A Tracker in `transformers.Trainer` (the `guests` extra).

callback = TrackerCallback(queries={"test": Query.function(inputs, lambda output: output.logits)}, trajectory="runs/a")
Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from explaind_track.callbacks.base import TrackerCallbackBase, active_run


class TrackerCallback(TrackerCallbackBase, TrainerCallback):
    """Tracks every optimizer step of the Trainer, in its main process; skipped ones leave no trace. See
    `TrackerCallbackBase`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        self.check_alone(args.world_size)
        if not state.is_world_process_zero:
            return
        optimizer = around["optimizer"]
        model = around["model"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self.begin(model, optimizer, active_run())
        self._parameter = next(model.parameters())
        self._hooks = [
            model.register_forward_pre_hook(
                lambda model, _, inputs: self._seen(model, inputs, args.gradient_accumulation_steps), with_kwargs=True
            )
        ]
        self._norms: dict[Tensor, Tensor] = {}
        self._clips = self.tells_samples and bool(args.max_grad_norm)
        if self._clips:
            self._hooks += [p.register_post_accumulate_grad_hook(self._accumulated) for p in model.parameters()]

    def _accumulated(self, parameter: Tensor) -> None:
        """The Trainer tells of nothing between its backward pass and its clipping."""
        assert parameter.grad is not None  # it was just added to
        self._norms[parameter] = parameter.grad.norm()

    def _seen(self, model: nn.Module, inputs: dict[str, Any], accumulated: int) -> None:
        """Before every forward pass; the Tracker's own run with other tensors in the parameters' place.

        A model that is told the number of items in all accumulated batches is expected to divide by it: the Trainer
        then leaves its loss as it is, also where the model ignores the number and takes the mean of each batch.
        """
        if self._open and next(model.parameters()) is self._parameter:
            rows = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
            self.take(rows, inputs, 1 if inputs.get("num_items_in_batch") is not None else accumulated)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        if state.is_world_process_zero:
            self.open_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        """After the Trainer has clipped."""
        if state.is_world_process_zero and self._clips:
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
            self.end()
