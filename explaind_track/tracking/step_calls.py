"""The calls that a training loop makes within a step: of its batches, and of what it does to their gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind_track.core.alterations import Alteration
from explaind_track.core.checks import require_positive, require_real
from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.step import State
from explaind_track.record.batch_json import refuse_unrecordable
from explaind_track.tracking.clipping import factor_of, unseen
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.live_samples import LiveSamples
from explaind_track.tracking.step_batches import make_batch
from explaind_track.tracking.step_watch import StepWatch

Index = Tensor | Sequence[int] | Sequence[str] | np.ndarray[Any, Any]
"""Whole numbers or words, (N,)."""

Weight = Tensor | float | str | Sequence[float] | np.ndarray[Any, Any]
"""A number for all samples or (N,) of them; or "mean", "sum"."""


class StepCalls:
    """What a `Tracker` is told between the beginning of a step and the optimizer's `step()`."""

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        samples: LiveSamples | None,
        watch: StepWatch,
        index_needed: bool,
    ) -> None:
        self.model = model
        """The module that is trained, without a DistributedDataParallel around it."""
        self._ranks, self._samples, self._watch, self._index_needed = ranks, samples, watch, index_needed

    def batch(self, batch: Any, index: Index | None = None, weight: Weight = "mean") -> None:
        """Tells of the next (micro-)batch of the step, right before its forward pass.

        Args:
            batch: As `sample_loss` takes it: a tensor, or tuples, lists, mappings and dataclasses of tensors, whose
                first axis is the samples, N of them. What else has an entry for each sample (a list or an array of
                NumPy of length N, a tuple of N words) is cut with them; anything else is the same for all samples.
            index: Which training samples these are: N whole numbers, or N words that name them (a tensor, an array, a
                list, a range, an index of pandas). Words are the labels of the sample axis, and what `data`, `samples`
                and `partition` of `explain` are given. Batches without an index are recorded themselves.
            weight: `w_{i,k}`, how each sample's loss enters the step's gradient (with several ranks: that of its own
                rank's loss): "mean", "sum", a number or N of them.

        Raises:
            RuntimeError: Outside of `step`.
            TypeError: For an index or weights of another kind, and for a batch without an index that no record can
                hold.
            ValueError: If the parts disagree about N, if a weight is not finite, or if there is no index where
                `samples_every` needs it.

        Example:
            >>> import torch, torch.nn.functional as F
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> x, y, index = torch.ones(6, 4), torch.zeros(6, dtype=int), torch.arange(6)
            >>> with tracker.step():
            ...     for part in index.split(3):  # two micro-batches, each half of the step's mean
            ...         tracker.batch((x[part], y[part]), index=part, weight=1 / 6)
            ...         (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
            ...     optimizer.step()
        """
        if not self._watch.open:
            raise RuntimeError("tracker.batch() belongs inside `with tracker.step():`")
        if index is None and self._index_needed:
            raise ValueError("tables of samples were asked for (samples_every), so every batch needs its index=")
        if index is None and self._watch.records:
            refuse_unrecordable(batch)
        device = next(self.model.parameters()).device
        self._watch.meet(make_batch(batch, index, weight, device))

    def backward(self) -> Tensor:
        """Adds the gradient of the last batch, from per-sample gradients, to the parameters' `.grad`.

        In the place of `loss.backward()`, for steps whose samples are shown (`samples_due`): it notes the norms of the
        samples' gradients. Averages over the ranks where DistributedDataParallel would. Of bfloat16 and float16
        parameters, the gradients are computed in float32 and rounded then.

        Returns:
            The batch's loss `Σ_k w_k L_k`, a scalar.

        Raises:
            ValueError: Without a sample_loss or a batch, or if a sample's loss depends on the others (batch norm in
                training mode).
            RuntimeError: For operations whose gradients cannot be taken for each sample by itself, such as activation
                checkpointing: use `loss.backward()` there.

        Example:
            >>> import torch, torch.nn.functional as F
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> def sample_loss(model, batch):
            ...     return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
            >>> queries = {"test": Query.outputs(torch.ones(2, 4))}
            >>> tracker = Tracker(model, optimizer, queries=queries, sample_loss=sample_loss)
            >>> with tracker.step():
            ...     tracker.batch((torch.ones(6, 4), torch.zeros(6, dtype=int)))
            ...     loss = tracker.backward()
            ...     optimizer.step()
            >>> loss.shape, model.weight.grad.shape
            (torch.Size([]), torch.Size([3, 4]))
        """
        if self._samples is None or not self._watch.batches.local:
            raise ValueError("tracker.backward() needs the Tracker's sample_loss=, and tracker.batch(…) before it")
        parameters = parameters_of(self.model)
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        state = State({name: p.detach() for name, p in trained.items()}, {**buffers_of(self.model), **frozen})
        gradient, loss = self._samples.gradient(state, self._watch.batches)

        for name, parameter in trained.items():
            own = gradient[name].to(parameter.dtype)
            parameter.grad = own if parameter.grad is None else parameter.grad + own
        self._ranks.average([parameter.grad for parameter in trained.values() if parameter.grad is not None])
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Calls `torch.nn.utils.clip_grad_norm_` on the model, and lets its factor scale the samples' weights.

        Torch's own is seen in a step just as well, also where Accelerate, Fabric or a Trainer calls it.

        Args:
            max_norm: The 2-norm that the gradient is scaled down to.

        Returns:
            The norm before.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> with tracker.step():
            ...     (100 * model(torch.ones(5, 4))).sum().backward()
            ...     norm = tracker.clip_grad_norm_(1.0)
            ...     optimizer.step()
            >>> round(float(norm)), round(float(model.weight.grad.norm()), 2)
            (1936, 0.89)
        """
        max_norm = require_positive("max_norm", max_norm)
        with unseen():
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self._watch.batches.change(Alteration("norm", max_norm), factor_of(max_norm, norm))
        return norm

    def gradient_scaled(self, factor: float, max_norm: float | None = None) -> None:
        """Tells, right before the optimizer's step, that the loop has scaled the step's gradient itself.

        Clipping by `torch.nn.utils`, and by what calls that, is seen without it.

        Args:
            factor: What the gradient was multiplied by in all, and so the samples' weights.
            max_norm: The 2-norm that it was clipped to, if that is why: then a `rerun` clips by its own gradient.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> with tracker.step():
            ...     model(torch.ones(5, 4)).square().mean().backward()
            ...     for parameter in model.parameters():
            ...         _ = parameter.grad.mul_(0.5)
            ...     tracker.gradient_scaled(0.5)
            ...     optimizer.step()
        """
        how = Alteration("factor", require_real("factor", factor))
        if max_norm is not None:
            how = Alteration("norm", require_positive("max_norm", max_norm))
        factor = require_real("factor", factor)
        self._watch.batches.forget_seen_changes()
        self._watch.batches.change(how, factor)

    def clip_grad_value_(self, clip_value: float) -> None:
        """Calls `torch.nn.utils.clip_grad_value_` on the model, and notes that it did.

        What it leaves is no sum over samples any more: influences of groups stay exact, those of this step's samples
        are refused.

        Args:
            clip_value: The largest size that a number of the gradient keeps.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> with tracker.step():
            ...     (100 * model(torch.ones(5, 4))).sum().backward()
            ...     tracker.clip_grad_value_(1.0)
            ...     optimizer.step()
            >>> float(model.weight.grad.max())
            1.0
        """
        clip_value = require_positive("clip_value", clip_value)
        with unseen():
            nn.utils.clip_grad_value_(self.model.parameters(), clip_value)
        self._watch.batches.change(Alteration("value", clip_value))

    def gradient_altered(self) -> None:
        """Tells that the loop has changed the step's gradient in another way than by a factor.

        As after `clip_grad_value_`, influences of groups stay exact, and those of this step's samples are refused.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> with tracker.step():
            ...     model(torch.ones(5, 4)).square().mean().backward()
            ...     _ = model.weight.grad.sign_()
            ...     tracker.gradient_altered()
            ...     optimizer.step()
        """
        self._watch.batches.forget_seen_changes()
        self._watch.batches.change(Alteration("other"))

    def _see_clipping(self, parameters: list[Tensor], how: Alteration, factor: Callable[[], float]) -> None:
        """Notes a clipping within the step that the Tracker was not told of; see `seeing_clipping`."""
        if not (self._watch.batches.local or self._watch.has_auxiliary):
            return
        clipped = {id(parameter) for parameter in parameters}
        groups = self.optimizer.param_groups
        moving = {id(p) for group in groups for p in group["params"] if p.grad is not None}
        if clipped.isdisjoint(moving):
            return

        scale = factor()
        if moving <= clipped:
            how = Alteration("factor", scale) if how.kind == "factor" else how
            self._watch.batches.change(how, scale, seen=True)
        elif scale < 1 or how.kind == "value":  # some of the gradient alone is no sum over the samples as they weigh
            self._watch.batches.change(Alteration("other"), seen=True)
