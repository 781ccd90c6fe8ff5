"""The watch over a training step: what has to be seen before the optimizer takes it, and the `Step` that it was."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from explaind_track.core.checks import plain_number
from explaind_track.core.modules import buffers_of
from explaind_track.core.observer import StepObserver
from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.engine.step_predictions import buffers_moved
from explaind_track.errors import NonFiniteError
from explaind_track.record.writer import TrajectoryWriter
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.live_samples import CHECKED_STEPS, LiveSamples
from explaind_track.tracking.step_batches import StepBatches
from explaind_track.tracking.stopwatch import Stopwatch
from explaind_track.tracking.wrappers import puts_off_steps

if TYPE_CHECKING:
    from explaind_track.tracking.sharded_record import ShardedWriter


class StepWatch:
    """Follows each step from before its first forward pass to the `Step` that it was, and has it recorded.

    An exception or Ctrl-C may come between any two instructions, and the loop may go on behind it. So a step counts
    from one assignment on, that of `number`: before it, nothing of the step is in the record, and behind it, all.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: StepObserver,
        ranks: Ranks,
        samples: LiveSamples | None,
        writer: "TrajectoryWriter | ShardedWriter | None",
        number: int,
        auxiliary: Mapping[str, Callable[[nn.Module], Tensor]],
        mark_nonfinite: bool,
        stopwatch: Stopwatch,
        wrapper: object,
    ) -> None:
        """number: of the step that comes next. mark_nonfinite: note a gradient that is not finite in `nonfinite`
        instead of raising NonFiniteError. wrapper: the optimizer as the loop has it."""
        self._model, self._observer, self._ranks, self._samples = model, observer, ranks, samples
        self._writer, self._auxiliary = writer, auxiliary
        self._mark_nonfinite, self._stopwatch = mark_nonfinite, stopwatch
        self._wrapper = wrapper
        self.number = number
        """The number of the next step; all before it are recorded."""
        self._moving: int | None = None
        """The number of the step that the optimizer has begun to take last."""
        self._begun: int | None = None
        """The number of the step that was begun to be watched last."""
        self.open = False
        """Whether a step is going on, between `begin` and `end`."""
        self._broken_off = False
        """Whether the step that was begun last did not get to its end."""
        self.skipped = False
        """Whether the optimizer leaves the step out, from inside of its `step`."""
        self.put_off = False
        """Whether the step that has ended goes on with the next: its gradient is kept, and added to."""
        self.batches = StepBatches()
        self.nonfinite: list[str] = []
        """The parameters whose gradients hold numbers that are not finite."""
        self._buffers: dict[str, Tensor] = {}
        self._auxiliary_gradients: dict[str, dict[str, Tensor]] = {}

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self._writer is not None

    @property
    def has_auxiliary(self) -> bool:
        """Whether there are losses that belong to no sample."""
        return bool(self._auxiliary)

    @property
    def at_hand(self) -> int:
        """The number of the step at hand, or of the next one where none is open."""
        return self._begun if self.open and self._begun is not None else self.number

    @property
    def taken(self) -> bool:
        """Whether the optimizer has taken the step that was begun, and it is recorded."""
        return self._begun is not None and self._begun < self.number

    @property
    def is_interrupted(self) -> bool:
        """Whether the optimizer has moved since the last recorded step, in one that something interrupted before it was
        recorded."""
        return self._moving == self.number

    @property
    def is_model_astray(self) -> bool:
        """Whether the model may have been changed since the last recorded step by one that something interrupted: by
        the optimizer, or by a forward pass that moves buffers."""
        return self.is_interrupted or (self._broken_off and not self.taken)

    def refuse_open(self) -> None:
        """Raises RuntimeError if a step is open."""
        if self.open:
            raise RuntimeError("tracker.step() is open already; close it before the next step")

    def begin(self) -> None:
        """Begins to watch the next step, before anything random is drawn for it."""
        self._begun = self.number
        if not self.put_off:
            self._ranks.refuse_uneven_steps()
            self._buffers = {name: buffer.detach().clone() for name, buffer in buffers_of(self._model).items()}
            if self.is_interrupted:
                self._pass_over()
            self._observer.begin(self._buffers)
            self._observer.kept.forget_forward()
            with self._stopwatch.timed("trajectory"):
                if self._writer is not None:
                    self._writer.begin(self.number, self._buffers)
            self.batches = StepBatches()
        self.open = self._broken_off = True

    def _pass_over(self) -> None:
        """Goes on from where an interrupted step has led to, which is none of the record's."""
        self._observer.pass_over()
        if self._writer is not None:
            self._writer.pass_over(self.number, self._buffers)
        self._moving = None

    def meet(self, batch: Batch) -> None:
        """Takes in a batch, right before its forward pass."""
        kept = self._observer.kept
        if not self.batches.local and (kept.restless or self.number < CHECKED_STEPS):
            kept.look_before_forward()
        self.batches.local.append(batch)

    def pass_body(self) -> None:
        """Takes note that the loop has got to the step's end."""
        self._broken_off = False

    def end(self) -> None:
        self.open = False
        self.put_off = not self.taken and puts_off_steps(self._wrapper)

    def before(self, arguments: Sequence[Any]) -> None:
        """Takes in what the step starts from and is made of, right before the optimizer takes it.

        arguments: those of the optimizer's `step`. Raises RuntimeError or ValueError for a step that cannot be
        explained, with the parameters still as they were.
        """
        if not self.open:
            raise RuntimeError("the optimizer took a step outside of `with tracker.step():`; put it inside")
        if self.taken or self.is_interrupted:
            raise RuntimeError("the optimizer took two steps in one tracker.step(); give each its own")
        if any(callable(argument) and argument is not self._observer.optimizer for argument in arguments):
            raise ValueError("optimizer.step(closure) has its gradient too late to be seen; call the closure before it")

        number = self.number
        self.skipped = self._scaler_found_overflow()
        if self.skipped:
            return

        gradients = self._gradients()
        self.nonfinite = self._ranks.together(_nonfinite(gradients))
        if self.nonfinite and not self._mark_nonfinite:
            raise NonFiniteError(
                f"the gradient of step {number} is not finite in {', '.join(self.nonfinite)}; the parameters "
                'are still those before the step. Tracker(on_nonfinite="mark") goes on and marks such steps'
            )

        self._refuse_nonfinite_settings()

        # what the gradient is made of: batches, and auxiliary losses
        if not gradients:  # no backward pass was run: these are no samples of the step
            self.batches = StepBatches()
        self.batches.forget_unused_randomness(next(self._model.parameters()).device)
        self.batches.exchange(self._ranks)
        self._auxiliary_gradients = self._differentiate_auxiliary(gradients)

        # what the step starts from
        self._observer.before(self._buffers, self._auxiliary_gradients)
        self._refuse_changed_pieces()
        if self._samples is not None and not self.nonfinite:
            trained = {name for name, p in self._observer.parameters.items() if p.requires_grad}
            start = self._observer.kept.start
            self._samples.check(self.batches, number, start, gradients, self._auxiliary_gradients, trained)
        with self._stopwatch.timed("trajectory"):
            if self._writer is not None:
                self._writer.before(number)

    def let_move(self) -> None:
        """Takes note that the optimizer takes the step from here on."""
        self._moving = self.number

    def after(self) -> Step:
        """Proves and records the step that the optimizer has just taken. It holds until `settle`."""
        buffers = {name: buffer.detach() for name, buffer in buffers_of(self._model).items()}
        step = self._ranks.all_succeed(lambda: self._observer.after(self.number, buffers, self.batches.of_all_ranks))
        with self._stopwatch.timed("trajectory"):
            if self._writer is not None:
                self._writer.add(step, buffers_moved(step), self._auxiliary_gradients)
            self.number += 1  # from here on, the step counts
            if self._writer is not None:
                self._writer.reach(self.number)
        return step

    def settle(self) -> None:
        """Lets go of the step, which has served."""
        self._observer.settle()

    def closing(self) -> Step | None:
        """Finds what has changed the model behind the last step: a step numbered like the one that would follow. None
        where nothing has, or no step was taken, or where that is an interrupted one."""
        if self.is_model_astray or not self.number or self._ranks.shards is not None:
            return None
        buffers = {name: buffer.detach() for name, buffer in buffers_of(self._model).items()}
        return self._observer.closing(self.number, buffers)

    def _scaler_found_overflow(self) -> bool:
        """Whether a GradScaler has told a fused optimizer, which unscales by itself, to leave the step out."""
        found = getattr(self._observer.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _refuse_nonfinite_settings(self) -> None:
        """Raises ValueError for a learning rate or another setting that would make the parameters NaN or infinite."""
        if not (self.nonfinite or math.isfinite(self.batches.clip)):
            raise ValueError(f"the gradient was scaled by {self.batches.clip}: a factor has to be finite")
        for group in self._observer.optimizer.param_groups:
            for key, value in group.items():
                on_host = not isinstance(value, Tensor) or value.device.type == "cpu"  # elsewhere, a look is a wait
                number = plain_number(value) if key != "params" and on_host else None
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(
                        f"the optimizer's {key} is {number}; the parameters are still those before the step. See what "
                        "set it, such as a learning-rate schedule"
                    )
                if isinstance(value, np.floating) and not isinstance(value, float):
                    raise TypeError(
                        f"the optimizer's {key} is {value!r} ({type(value).__name__}), so that the optimizer computes "
                        f"in that precision, which a record cannot replay: set {key} to float({key})"
                    )

    def _refuse_changed_pieces(self) -> None:
        """Raises RuntimeError where something but the optimizer has changed parameters in pieces, or a forward pass the
        buffers: each process knows of its own changes alone."""
        if self._ranks.shards is None:
            return
        changed = self._observer.kept.changed
        now = buffers_of(self._model)
        moved = [name for name, value in self._buffers.items() if not same_bits(value, now[name])]
        names = self._ranks.together([*changed.parameters, *changed.buffers, *moved])
        if names:
            raise RuntimeError(
                f"before step {self.number}, something other than the optimizer has changed {', '.join(names[:5])}; "
                "where parameters are in pieces, each process sees its own changes alone, and the Tracker follows the "
                "optimizer's: leave out what clamps, averages or masks weights, and train with batch norms in eval mode"
            )

    def _gradients(self) -> dict[str, Tensor]:
        """Those that the optimizer is about to use."""
        gradients = self._observer.gradients()
        scale = getattr(self._observer.optimizer, "grad_scale", None)
        if scale is not None:  # a GradScaler's, whose optimizer unscales by itself
            gradients = {name: gradient / scale for name, gradient in gradients.items()}
        return gradients

    def _differentiate_auxiliary(self, gradients: Tensors) -> dict[str, dict[str, Tensor]]:
        """The gradient of every auxiliary loss by parameter, clipped as the whole was."""
        moving = {name: self._observer.parameters[name] for name in gradients}
        found = {}
        for part, loss in self._auxiliary.items():
            with torch.enable_grad():
                rows = torch.autograd.grad(loss(self._model), list(moving.values()), allow_unused=True)
            found[part] = {
                name: gradient.detach() * self.batches.clip
                for name, gradient in zip(moving, rows, strict=True)
                if gradient is not None
            }
        return found


def hook_optimizer(
    optimizer: torch.optim.Optimizer, before: Callable[[tuple[Any, ...], bool], None], after: Callable[[], None]
) -> list[RemovableHandle]:
    """Has each step of the optimizer call `before(arguments, compiled)` and `after()`; returns the hooks.

    arguments: those of its `step`; compiled: whether that is.
    """
    # where the optimizer's step is compiled, these calls are, but not what is called
    plain_before, plain_after = torch.compiler.disable(before), torch.compiler.disable(after)
    return [
        optimizer.register_step_pre_hook(
            lambda _, args, options: plain_before((*args, *options.values()), torch.compiler.is_compiling())
        ),
        optimizer.register_step_post_hook(lambda *_: plain_after()),
    ]


def _nonfinite(gradients: Tensors) -> list[str]:
    # a sum is finite only where all of its terms are, and takes a tenth of the time of a look at each
    sums = [gradient.sum() for gradient in gradients.values()]
    if not sums or bool(torch.stack([value.to(sums[0]) for value in sums]).isfinite().all()):
        return []
    return [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]


def has_finite_gradients(step: Step) -> bool:
    """Whether the gradients of a step are finite, all of them."""
    return not _nonfinite({name: update.gradient for name, update in step.updates.items()})
