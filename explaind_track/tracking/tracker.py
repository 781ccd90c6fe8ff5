"""The Tracker: a plugin for an ordinary training loop that explains every step as it is taken."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from explaind_track.core.checks import require_int
from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.modules import parameters_of
from explaind_track.core.observer import StepObserver
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.core.switches import keeping_switches
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import Quadrature
from explaind_track.record import history
from explaind_track.record.row_writers import RowWriter
from explaind_track.record.writer import KEYFRAME_EVERY
from explaind_track.tracking import arguments
from explaind_track.tracking.clipping import seeing_clipping
from explaind_track.tracking.configuration import configuration
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.findings import Findings
from explaind_track.tracking.lifetime import Lifetime, begin, end_stale
from explaind_track.tracking.live import Live
from explaind_track.tracking.live_audit import LiveAudit
from explaind_track.tracking.live_samples import LiveSamples
from explaind_track.tracking.maps import Maps
from explaind_track.tracking.outputs import Outputs, begin_record
from explaind_track.tracking.piece_arguments import check_pieces
from explaind_track.tracking.step_calls import StepCalls
from explaind_track.tracking.step_watch import StepWatch, hook_optimizer
from explaind_track.tracking.stopwatch import Stopwatch
from explaind_track.tracking.wrappers import plain_model, plain_optimizer

if TYPE_CHECKING:
    import wandb


class Tracker(StepCalls, Findings, Lifetime):
    """Watches an optimizer's steps: explains each on the given queries, shows it and records it.

    Parameters in bfloat16 or float16 are explained in float32, and recorded as they are; what their arithmetic did to a
    step is its part `rounding`, which panels show beside the others.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from explaind_track import Query, Tracker
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(x)})  # run=, trajectory=
        >>> for step in range(3):
        ...     with tracker.step():
        ...         optimizer.zero_grad()
        ...         F.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        >>> tracker.finish()
        >>> dict(tracker.influence("test").importance().sizes)
        {'part': 2, 'step': 3, 'group': 2}
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
        record: Literal["gradients", "batches"] = "gradients",
        compress: bool = False,
        every: int = 1,
        samples_every: int | None = None,
        map_queries: int = 0,
        maps_every: int | None = None,
        render: Callable[[Any], Any] | None = None,
        quadrature: Quadrature | None = None,
        keep_before: Literal["device", "host"] = "device",
        keyframe_every: int = KEYFRAME_EVERY,
        memory: int = MEMORY,
        on_nonfinite: Literal["raise", "mark"] = "raise",
        auxiliary: Mapping[str, Callable[[nn.Module], Tensor]] | None = None,
        resume: bool | int = False,
        scores: str | None = None,
        audit_every: int | None = None,
        writers: Sequence[RowWriter] = (),
    ) -> None:
        """Makes ready to watch; nothing is written where an argument is wrong.

        Args:
            model: The module that is trained, whole or in pieces (`fully_shard`), or the DistributedDataParallel around
                it. Of several processes, each makes a Tracker, with the same arguments, and that of rank zero shows and
                records for all: `run` and what it is asked for count there alone.
            optimizer: The optimizer of its parameters, on their device; as Accelerate or Lightning wraps it, too.
            queries: By name. The first owns the plain panels (`kernel/decoder`), the others prefix theirs with their
                name; losses are shown by their signed change (`loss/kernel/decoder` for the first of them). None at
                all: the run is only recorded.
            groups: See `resolve_groups`.
            sample_loss: `(model, batch)` → unreduced losses (N,), needed for anything about single samples.
            run: Where panels go; None: nowhere. See `open_run`.
            trajectory: A new or empty directory for the record; None: none is written.
            record: What it keeps of every step: its "gradients"; or its "batches" and a hash of these, in a small
                fraction of the room, to compute them again (see `with_gradients`); `resume` goes on from its keyframes.
            compress: Whether the record's gradients are packed, without loss (extra `compress`; see What it costs).
            every: Explain every n-th step; the trajectory always holds all.
            samples_every: Make a table of the most influential samples every n-th step, on the first loss query.
            map_queries: Beside each table, a heat map of the samples' influences on so many single queries, and one of
                these queries' cosines.
            maps_every: Every n-th step, and at the end, what the steps since the last maps did: to each loss by layer
                and type (with `groups="layer.type"`), to several losses by group, and to each token of a
                `Query.tokens`.
            render: From a training sample's index, or its name, to what the tables show of it: a string, a number, an
                image (PIL's, or an array; floats from 0 to 1 are scaled) or a sound: (samples a second, array), or
                W&B's Audio. Where it fails, the row goes without. A `TokenText` shows the text that the samples were
                in training, and what the model takes for the tokens.
            quadrature: None: the midpoint of each step; of scalar queries on a large model, `Quadrature.trapezoid()`.
            keep_before: Where, by the trapezoid, a query's gradient (a copy of the parameters) lies between two steps.
            keyframe_every: A whole checkpoint in the trajectory every n-th step; replays start from these.
            memory: See `explain`.
            on_nonfinite: What to do before a step whose gradient is not finite: raise NonFiniteError, or mark the step
                in the panels, explain nothing of it, and go on.
            auxiliary: Terms of the loss that belong to no sample, as `model` → scalar, each a part by its own name
                (`{"l1": lambda model: 1e-4 * norm(model)}`). The loop adds them to its loss as it does anyway.
            resume: Go on with the run in `trajectory`, if there is one. True: put model, optimizer state and random
                state where its record ends; a number: the loop has put them where that step begins. The loop goes on
                from `tracker.number`, with its own data order and learning-rate schedule there.
            scores: A query's name: sum up the influence of every single parameter on it (`parameter_scores`).
            audit_every: Audit every n-th step on the first query (see `audit`), and warn of what differs.
            writers: What else gets every row: a `CSVWriter`, a `TensorBoardWriter`, or any object with their method
                `write(step, row)`.

        Raises:
            TypeError: For an optimizer without a rule, and for arguments that are no numbers, queries, runs or whatever
                they should be.
            ValueError: For parameters of the optimizer that the model does not have, for groups that are no partition,
                for a query that cannot be differentiated, for settings out of bounds, and for names of queries, groups
                and auxiliary losses that something else in the rows has.
            FileExistsError: For a trajectory directory that holds something.
            TrajectoryError: For a trajectory that cannot be written or, with `resume`, gone on with.
        """
        arguments.check_model(model, optimizer)
        arguments.check_questions(queries, auxiliary, sample_loss, scores)
        arguments.check_outputs(run, trajectory, render, on_nonfinite, bool(queries), writers)
        arguments.check_choices(quadrature, record, keep_before)
        every, samples_every, map_queries, maps_every, keyframe_every, memory, resume = arguments.check_numbers(
            every, samples_every, map_queries, maps_every, keyframe_every, memory, resume
        )
        ranks = Ranks(plain_model(model, sample_loss is not None))
        model = ranks.model
        if ranks.shards is not None:
            whole = {"sample_loss": sample_loss, "auxiliary": auxiliary, "scores": scores, "audit_every": audit_every}
            check_pieces(plain_optimizer(optimizer), queries, record, quadrature, whole)
            quadrature = Quadrature.trapezoid()
        parameters = parameters_of(model)
        self.optimizer, self.every, self.samples_every = plain_optimizer(optimizer), every, samples_every
        self.groups = resolve_groups(groups, model)
        arguments.check_groups_shown(self.groups)
        self.run = run if ranks.rank == 0 else None
        self.audit_every = None if audit_every is None else require_int("audit_every=", audit_every, 1)
        self._observer = StepObserver(self.optimizer, parameters)

        # what is computed of each step
        auxiliary = dict(auxiliary or {})
        self._live = Live(model, queries, self.groups, auxiliary, quadrature, memory, scores, ranks.shards, keep_before)
        self.quadrature = self._live.quadrature
        """With `parts`, what `explain` has to be told to give the same numbers from the record."""
        if trajectory is None and self._live.carries:
            self._observer.spare()
        if samples_every and (sample_loss is None or not self._live.losses):
            raise ValueError("samples_every needs sample_loss=, and a Query.loss among the queries to rank samples by")
        self._maps = None if maps_every is None else Maps(self._live, maps_every)
        samples = None
        if sample_loss is not None:
            seen = ranks.gather(self.run is not None or trajectory is not None)[0]
            samples = LiveSamples(model, sample_loss, self._live, ranks, map_queries if seen else 0, render)

        is_audited = audit_every is not None and ranks.rank == 0
        # other ranks' samples are not here
        own_loss = sample_loss if ranks.count == 1 else None
        self._audit = LiveAudit(model, queries, self.groups, own_loss) if is_audited else None

        # where it is recorded
        end_stale(self.optimizer)
        recorded, writer, number = begin_record(
            trajectory, resume, keyframe_every, model, self._observer, record == "gradients", compress, ranks
        )
        with ExitStack() as undo:  # where something fails, the directory and the optimizer are free for another Tracker
            if writer is not None:
                undo.callback(writer.release)

            # how it is watched
            self._stopwatch = Stopwatch()
            mark = on_nonfinite == "mark"
            watch = StepWatch(
                model, self._observer, ranks, samples, writer, number, auxiliary, mark, self._stopwatch, optimizer
            )
            super().__init__(model, ranks, samples, watch, index_needed=bool(samples_every))

            # where it is shown
            self._row: dict[str, Any] = {}
            """Of the step at hand, or the next."""
            self._finishing = False
            self._told = -1
            """The number of the step whose row is whole and not logged; −1: there is none."""
            about = configuration(model, self.optimizer, self.groups, queries, self.quadrature, every, samples_every)
            self._outputs = Outputs(
                self.run, writer, ranks.rank == 0, about, writers if ranks.rank == 0 else (), number
            )
            undo.callback(self._outputs.call_off_exit)
            self.staging_mb = 0.0
            """After `finish`: what W&B's copies of the trajectory take on this disk, in MB."""
            if recorded is not None:
                self._complete_rows(recorded)
            self._hooks = hook_optimizer(self.optimizer, self._before, self._after)
            begin(self.optimizer, self)
            undo.pop_all()

    @property
    def number(self) -> int:
        """The number of the next step; inside of `step`, of the one at hand. All before it are recorded."""
        return self._watch.at_hand

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time so far: `training` (inside of step contexts but outside of the Tracker), `influence`
        (explaining) and `trajectory` (recording)."""
        return self._stopwatch.seconds

    @contextmanager
    def step(self) -> Iterator[None]:
        """Spans one training step: everything from its forward pass to its single `optimizer.step()`.

        A skipped one leaves no trace; with one that `accelerator.accumulate()` has put off, the next goes on.

        Raises:
            RuntimeError: If a step is open already, and in a process that was forked from that of the Tracker.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> with tracker.step():
            ...     model(torch.ones(5, 4)).square().mean().backward()
            ...     optimizer.step()
            >>> tracker.number
            1
        """
        self._outputs.refuse_fork()
        self._watch.refuse_open()
        if self._finishing:
            raise RuntimeError("this Tracker is finished; make one with resume=True to go on with the run")
        try:
            try:
                self._watch.begin()
                with keeping_switches(), self._stopwatch.step(), seeing_clipping(self._see_clipping):
                    yield
                self._watch.pass_body()
            finally:
                self._end_step()
        finally:
            self._watch.open = False  # also where that was interrupted

    def _end_step(self) -> None:
        """Ends the step, and logs its row if it was taken; not where something interrupted the explaining, for what is
        missing in the rows of a record is made when that is gone on with."""
        self._watch.end()
        if self._watch.put_off:
            return
        training, tracking = self._stopwatch.take_lap()
        if not self._watch.taken:
            return

        row, self._row = self._row, {}
        told, self._told = self._told, -1
        if told == self._watch.number - 1:
            seconds = {history.SECONDS_TRAINING: training, history.SECONDS_INFLUENCE: tracking}
            self._outputs.log(told, {**row, **seconds})

    def log(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row of the current step; between steps, to that of the next, which starts from there.

        Args:
            metrics: Numbers by key, such as `test/accuracy`; a row goes to W&B and into the record together.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> tracker.log({"test/accuracy": 0.5})
        """
        self._row |= arguments.plain_metrics(metrics)

    @property
    def samples_due(self) -> bool:
        """Whether the current step gets a table of samples."""
        return bool(self.samples_every) and self.number % self.samples_every == 0  # type: ignore[operator]

    def finish(self) -> None:
        """Ends the record, removes the hooks and logs the trajectory as an artifact of the run. Influences can still be
        asked for. In a process that was forked from that of the Tracker, it does nothing.

        Where W&B has not confirmed it within ten minutes, a warning names what is missing and the command to send it.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4))})
            >>> tracker.finish()
        """
        if self._outputs.is_forked:
            return
        self._finishing = True
        for hook in self._hooks:
            hook.remove()

        # what has changed the model behind the last step
        if self._told != self._watch.number and (closing := self._watch.closing()) is not None:
            self._explain(closing)
            self._told = closing.number
        self._draw_maps()
        row, self._row = self._row, {}
        if row:
            self._outputs.log(self._watch.number, row)

        self._outputs.end_rows()
        with self._stopwatch.timed("trajectory"):
            self._outputs.end_record(self._watch.number, self._watch.is_model_astray)
        self._outputs.call_off_exit()
        self._ranks.gather(None)  # from here on, every rank finds the trajectory complete
        self.staging_mb = self._outputs.send()

    # --------------------------------------------------------- around the step

    def _before(self, arguments: tuple[Any, ...], compiled: bool) -> None:
        """arguments: those of the optimizer's `step`; compiled: whether that is."""
        self._outputs.refuse_fork()
        self._observer.compiled = compiled
        self._watch.before(arguments)
        if self._watch.skipped:
            return
        if self._watch.batches.loss is not None:
            self._row[history.TRAIN_LOSS] = self._watch.batches.loss
        self._watch.let_move()

    def _after(self) -> None:
        if self._watch.skipped:
            return

        step = self._watch.after()
        try:
            if self._watch.nonfinite:
                self._row[history.NONFINITE] = len(self._watch.nonfinite)
            elif self._is_due(step):
                self._explain(step)
            self._live.pass_by(step.number)
            self._told = step.number
        finally:
            self._watch.settle()

    def _draw_maps(self) -> None:
        """Adds the maps of the steps since the last ones to the row at hand."""
        if (maps := self._maps) is not None and maps.steps and self._outputs.seen:
            self._outputs.panels.attempt("draw the maps", lambda: self._row.update(maps.draw()))

    def _explain(self, step: Step) -> None:
        with self._stopwatch.timed("influence"):
            if self._ranks.rank == 0 or self._ranks.shards is not None:
                row, doubts = self._live.add(step)
                self._row |= row
                if self._live.residual_jumped:
                    self._observer.proof.prove(step.number, step.updates, wholly=True)
                for doubt in doubts:
                    self._outputs.panels.alert("Large residual", doubt)
                if self._maps is not None and self._maps.add(step.number, row):
                    self._draw_maps()
                if self._audit is not None and self.audit_every and step.number % self.audit_every == 0:
                    self._audit.look(self._observer.lasting(step))

            # every rank has samples of its own
            if self.samples_due and self._samples is not None and step.batches:
                shown = self._samples.explain(self._watch.batches, step)
                self._row[history.SAMPLES_OWN_STEP] = shown.own_step
                if self._outputs.seen:
                    self._outputs.panels.attempt("draw the samples", lambda: self._row.update(shown.draw()))
