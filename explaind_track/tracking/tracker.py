"""The Tracker: a plugin for an ordinary training loop that explains every step as it is taken."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.influence import Influence
from explaind_track.core.observer import StepObserver
from explaind_track.core.queries import Query
from explaind_track.core.step import State, Step
from explaind_track.engine.functional import SampleLoss
from explaind_track.engine.integrator import MEMORY, buffers_moved
from explaind_track.engine.path_integral import Quadrature
from explaind_track.errors import NonFiniteError
from explaind_track.record.history import (
    NONFINITE,
    SAMPLES_OWN_STEP,
    SECONDS_INFLUENCE,
    SECONDS_TRAINING,
    SECTIONS,
    TRAIN_LOSS,
    cut_history,
    steps_logged,
)
from explaind_track.record.trajectory import Trajectory
from explaind_track.record.writer import KEYFRAME_EVERY
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.live import LIVE_AXES, Live
from explaind_track.tracking.live_samples import LiveSamples
from explaind_track.tracking.metrics import nonfinite
from explaind_track.tracking.outputs import Outputs, begin_record
from explaind_track.tracking.step_batches import StepBatches, make_batch

if TYPE_CHECKING:
    import wandb


class Tracker:
    """Watches an optimizer's steps: explains each on the given queries, shows it and records it.

    tracker = Tracker(model, optimizer, queries={"test": Query.outputs(x, y)}, trajectory="runs/one")
    for batch, index in loader:
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch(batch, index=index)
            loss = tracker.backward()            # or an ordinary loss.backward()
            optimizer.step()
    tracker.finish()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        queries: Mapping[str, Query],
        groups: GroupSpec = None,
        sample_loss: SampleLoss | None = None,
        run: "wandb.Run | None" = None,
        trajectory: str | PathLike[str] | None = None,
        every: int = 1,
        samples_every: int | None = None,
        map_queries: int = 0,
        render: Callable[[int], Any] | None = None,
        quadrature: Quadrature | None = None,
        keyframe_every: int = KEYFRAME_EVERY,
        memory: int = MEMORY,
        on_nonfinite: Literal["raise", "mark"] = "raise",
        auxiliary: Mapping[str, Callable[[nn.Module], Tensor]] | None = None,
        resume: bool | int = False,
        scores: str | None = None,
    ) -> None:
        """model: the module that is trained, or the DistributedDataParallel around it; then every process makes a
        Tracker, with the same arguments, and the one of rank zero explains, shows and records for all: `run`,
        `trajectory` and what the Tracker is asked for count there alone.

        queries: by name. The first owns the plain panels (`kernel/decoder`), the others prefix theirs with their
        name; losses are shown by their signed change (`loss/kernel/decoder` for the first of them). None at all: the
        run is only recorded.

        groups:        see `resolve_groups`.
        sample_loss:   `(model, batch)` → unreduced losses (N,), needed for anything about single samples.
        run:           where panels go; None: nowhere. See `open_run`.
        trajectory:    a new or empty directory for the record; None: none is written.
        every:         explain every n-th step; the trajectory always holds all.
        samples_every: make a table of the most influential samples every n-th step, on the first loss query.
        map_queries:   beside each table, a heat map of the samples' influences on so many single queries, and one of
                       these queries' cosines.
        render:        from a training sample's index to its image (an array or a PIL image), for the tables.
        quadrature:    None: one node a step, which costs least; the residual tells what it leaves out.
        memory:        see `explain`.
        on_nonfinite:  what to do before a step whose gradient is not finite: raise NonFiniteError, or mark the step
                       in the panels, explain nothing of it, and go on.
        auxiliary:     terms of the loss that belong to no sample, as `model` → scalar, each a part by its own name
                       (`{"l1": lambda model: 1e-4 * norm(model)}`). The loop adds them to its loss as it does anyway.
        resume:        go on with the run in `trajectory`, if there is one. True: put model, optimizer state and random
                       state where its record ends; a number: the loop has put them where that step begins. The loop
                       goes on from `tracker.number`, with its own data order and learning-rate schedule there.
        scores:        a query's name: sum up the influence of every single parameter on it (`parameter_scores`).

        Raises, before any work: TypeError for an optimizer without a rule; ValueError for parameters of the optimizer
        that the model does not have, for groups that are no partition, and for a query that cannot be differentiated;
        FileExistsError for a trajectory directory that holds something; TrajectoryError where one cannot be written.
        """
        if not queries and trajectory is None:
            raise ValueError(
                "a Tracker needs at least one query, such as {'test': Query.outputs(x_test, y_test)}, or a trajectory= "
                "to record, to be explained afterwards"
            )
        self._ranks = Ranks(model)
        model, first = self._ranks.model, self._ranks.own == 0
        self.model, self.optimizer, self.every, self.samples_every = model, optimizer, every, samples_every
        parameters = dict(model.named_parameters())
        self.groups = resolve_groups(groups, parameters)
        self._observer = StepObserver(optimizer, parameters)
        self._auxiliary = dict(auxiliary or {})
        self.quadrature = quadrature or Quadrature.fixed(1)
        self._live = Live(model, queries, self.groups, list(self._auxiliary), self.quadrature, memory, scores)
        if samples_every and (sample_loss is None or not self._live.losses):
            raise ValueError("samples_every needs sample_loss=, and a Query.loss among the queries to rank samples by")
        run = run if first else None
        mapped = map_queries if self._ranks.gather(run is not None or trajectory is not None)[0] else 0
        self._samples = (
            None if sample_loss is None else LiveSamples(model, sample_loss, self._live, self._ranks, mapped, render)
        )
        if resume is True and self._ranks.count > 1:
            raise ValueError(
                "resume=True puts back the random state of rank zero alone; load your own checkpoint in every process, "
                "and pass the number of its step: resume=1500"
            )
        begun = self._ranks.at_zero(
            lambda: begin_record(trajectory, resume, keyframe_every, self.model, self._observer)
        )
        record, self._writer = begun or (None, None)
        self.number: int = self._ranks.gather(0 if record is None else len(record))[0]
        """The number of the next step."""
        self._outputs = Outputs(run, self._writer, [*SECTIONS, *queries], self._configuration())
        self.run = run
        self._mark = on_nonfinite == "mark"
        self._hooks = [
            optimizer.register_step_pre_hook(lambda _, args, options: self._before((*args, *options.values()))),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self.seconds = {"training": 0.0, "influence": 0.0, "trajectory": 0.0}
        """Wall time so far: inside step contexts but outside of the Tracker, explaining, and recording."""
        self.staging_mb = 0.0
        """After `finish`: what W&B's copies of the trajectory take on this disk, in MB."""
        self._open = self._taken = False
        self._told = StepBatches()
        self._row: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}
        self._nonfinite: list[str] = []
        self._auxiliary_now: dict[str, dict[str, Tensor]] = {}
        if record is not None:
            self._catch_up(record)

    def _catch_up(self, record: Trajectory) -> None:
        """Explains the steps that were taken before, as they were explained then, and completes the rows of metrics."""
        cut_history(record.directory, self.number)
        written = steps_logged(record.directory)
        for step in tqdm(record.steps(), "catch up", len(record), unit="step"):
            if step.number % self.every == 0 and step.updates:
                row, _ = self._live.add(step)
                if step.number not in written:
                    self._outputs.log(step.number, row)

    # ------------------------------------------------------------- in the loop

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step: everything from its forward pass to its single `optimizer.step()`. A context in which the
        optimizer takes no step (a skipped one) leaves no trace."""
        if self._open:
            raise RuntimeError("tracker.step() is open already; close it before the next step")
        self._ranks.refuse_uneven_steps()
        self._buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        if self._writer is not None:
            self._writer.begin()
        self._told, self._open, self._taken = StepBatches(), True, False
        own = self.seconds["influence"] + self.seconds["trajectory"]
        started = time.perf_counter()
        try:
            yield
        finally:
            self._open = False
        spent = time.perf_counter() - started
        own = self.seconds["influence"] + self.seconds["trajectory"] - own
        self.seconds["training"] += spent - own
        if self._taken:
            self._log_row({SECONDS_TRAINING: spent - own, SECONDS_INFLUENCE: own})

    def batch(self, batch: Any, index: Tensor | None = None, weight: Tensor | float | str = "mean") -> None:
        """Tells of the next (micro-)batch, right before its forward pass. Its tensors' first axis is the samples.

        index:  (N,), which training samples these are.
        weight: `w_{i,k}`, how each sample's loss enters the step's gradient (with several ranks: that of its own rank's
                loss): "mean", "sum", a number or (N,).
        """
        if not self._open:
            raise RuntimeError("tracker.batch() belongs inside `with tracker.step():`")
        if index is None and self.samples_every:
            raise ValueError("tables of samples were asked for (samples_every), so every batch needs its index=")
        device = next(self.model.parameters()).device
        self._told.own.append(make_batch(batch, index, weight, device))

    def backward(self) -> Tensor:
        """The gradient of the last batch from per-sample gradients, added to the parameters' `.grad`; averaged over the
        ranks where DistributedDataParallel would.

        Returns the batch's loss `Σ_k w_k L_k`. Raises ValueError without a sample_loss or a batch, or if a sample's
        loss depends on the others (batch norm in training mode).
        """
        if self._samples is None or not self._told.own:
            raise ValueError("tracker.backward() needs the Tracker's sample_loss=, and tracker.batch(…) before it")
        trained = {name: p for name, p in self._observer.parameters.items() if p.requires_grad}
        state = State({name: p.detach() for name, p in trained.items()}, dict(self.model.named_buffers()))
        gradient, loss = self._samples.gradient(state, self._told)
        for name, parameter in trained.items():
            parameter.grad = gradient[name] if parameter.grad is None else parameter.grad + gradient[name]
        self._ranks.average([parameter.grad for parameter in trained.values() if parameter.grad is not None])
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` on the model, with its factor as part of the samples' weights. Call it where
        that one would be called. Returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.gradient_scaled(min(1.0, max_norm / (float(norm) + 1e-6)))
        return norm

    def gradient_scaled(self, factor: float) -> None:
        """Tells that the loop has multiplied the step's gradient by itself, which scales the samples' weights; right
        before the optimizer's step."""
        self._told.clip_by_norm(factor)

    def clip_grad_value_(self, clip_value: float) -> None:
        """`torch.nn.utils.clip_grad_value_` on the model. What it leaves is no sum over samples any more: influences of
        groups stay exact, those of this step's samples are refused."""
        nn.utils.clip_grad_value_(self.model.parameters(), clip_value)
        self.gradient_altered()

    def gradient_altered(self) -> None:
        """Tells that the loop has changed the step's gradient in another way, as `clip_grad_value_` does."""
        self._told.clip_by_value()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row of the current step; between steps, to that of the next, which starts from there."""
        self._row |= metrics

    @property
    def samples_due(self) -> bool:
        """Whether the current step gets a table of samples."""
        return bool(self.samples_every) and self.number % self.samples_every == 0  # type: ignore[operator]

    def influence(self, query: str, keep: tuple[str, ...] = LIVE_AXES[0]) -> Influence:
        """The influences of the steps so far: over ("step", "group") or over ("query", "output")."""
        self._ranks.refuse_others()
        return self._live.influence(query, keep)

    def parts(self, query: str) -> tuple[str, ...]:
        """The names of the parts that a step is split into on the query, as `explain` takes them."""
        return self._live.parts[query]

    def parameter_scores(self) -> dict[str, Tensor]:
        """Ψ_S(θ) of every parameter, of its shape, over the steps explained so far; see `scores.parameter_scores`."""
        self._ranks.refuse_others()
        return self._live.parameter_scores(self._observer.parameters)

    def residual(self, query: str) -> float:
        """The residual of the last step that was explained."""
        self._ranks.refuse_others()
        return self._live.explainers[query].residual

    def finish(self) -> None:
        """Ends the record, removes the hooks and logs the trajectory as an artifact of the run."""
        for hook in self._hooks:
            hook.remove()
        self._outputs.stay()
        if self._row:
            self._outputs.log(self.number, self._row)
        self._outputs.end_rows()
        with self._timed("trajectory"):
            self._outputs.end_record(self.number)
        self._ranks.gather(None)  # from here on, every rank finds the trajectory complete
        self.staging_mb = self._outputs.send()

    # --------------------------------------------------------- around the step

    def _before(self, arguments: tuple[Any, ...]) -> None:
        """arguments: those of the optimizer's `step`."""
        if not self._open:
            raise RuntimeError("the optimizer took a step outside of `with tracker.step():`; put it inside")
        if self._taken:
            raise RuntimeError("the optimizer took two steps in one tracker.step(); give each its own")
        if any(callable(one) and one is not self.optimizer for one in arguments):
            raise ValueError("optimizer.step(closure) has its gradient too late to be seen; call the closure before it")
        gradients = self._observer.gradients()
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:  # of a GradScaler whose optimizer unscales by itself
            gradients = {name: gradient / scale for name, gradient in gradients.items()}
        self._nonfinite = nonfinite(gradients)
        if self._nonfinite and not self._mark:
            raise NonFiniteError(
                f"the gradient of step {self.number} is not finite in {', '.join(self._nonfinite)}; the parameters "
                'are still those before the step. Tracker(on_nonfinite="mark") goes on and marks such steps'
            )
        self._told.forget_unused_randomness(next(self.model.parameters()).device)
        self._told.exchange(self._ranks)
        if self._told.loss is not None:
            self._row[TRAIN_LOSS] = self._told.loss
        self._auxiliary_now = self._auxiliary_gradients(gradients)
        if self._samples is not None and not self._nonfinite:
            state = State({name: p.detach() for name, p in self._observer.parameters.items()}, self._buffers)
            self._samples.check(self._told, self.number, state, gradients, self._auxiliary_now)
        self._observer.before(self._buffers, self._auxiliary_now)
        with self._timed("trajectory"):
            if self._writer is not None:
                self._writer.before(self.number, self._buffers)

    def _auxiliary_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The gradient of every auxiliary loss, clipped as the whole was."""
        moving = {name: self._observer.parameters[name] for name in gradients}
        found = {}
        for part, loss in self._auxiliary.items():
            with torch.enable_grad():
                rows = torch.autograd.grad(loss(self.model), list(moving.values()), allow_unused=True)
            found[part] = {n: g.detach() * self._told.clip for n, g in zip(moving, rows, strict=True) if g is not None}
        return found

    def _after(self) -> None:
        now = {name: buffer.detach() for name, buffer in self.model.named_buffers()}
        step = self._observer.after(self.number, now, self._told.every)
        with self._timed("trajectory"):
            if self._writer is not None:
                self._writer.record(step, buffers_moved(step), self._auxiliary_now)
        self._taken = True
        if self._nonfinite:
            self._row[NONFINITE] = len(self._nonfinite)
        elif self.number % self.every == 0 and step.updates:
            with self._timed("influence"):
                self._explain(step)
        self._observer.settle()

    def _explain(self, step: Step) -> None:
        if self._ranks.own == 0:
            row, doubts = self._live.add(step)
            self._row |= row
            for doubt in doubts:
                self._outputs.panels.alert("Large residual", doubt)
        if self.samples_due and self._samples is not None and step.batches:
            self._explain_samples(self._samples, step)

    def _explain_samples(self, known: LiveSamples, step: Step) -> None:
        samples, changes = known.influences(self._told, step)
        self._row[SAMPLES_OWN_STEP] = -float(samples.influence.sum())
        if self._outputs.seen:
            self._outputs.panels.attempt(
                "draw the samples", lambda: self._row.update(known.draw(self._told, samples, changes))
            )

    def _configuration(self) -> dict[str, Any]:
        """What was asked for, as W&B's configuration of the run has it."""
        settings = self.optimizer.param_groups[0].items()
        return {
            **self._live.configuration(),
            "optimizer": {
                "class": type(self.optimizer).__name__,
                **{key: value for key, value in settings if isinstance(value, int | float | bool | tuple)},
            },
            "every": self.every,
            "samples_every": self.samples_every,
            "parameters": sum(parameter.numel() for parameter in self._observer.parameters.values()),
        }

    def _log_row(self, more: Mapping[str, float]) -> None:
        self._outputs.log(self.number, {**self._row, **more})
        self._row = {}
        self.number += 1

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started
