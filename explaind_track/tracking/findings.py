"""What a Tracker has found so far: influences, scores, residuals, and its record."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor
from tqdm.auto import tqdm

from explaind_track.core.checks import require_known
from explaind_track.core.influence import Influence
from explaind_track.core.observer import StepObserver
from explaind_track.core.step import Step
from explaind_track.core.summary import Summarized, Summary, curve
from explaind_track.errors import MissingStepWarning
from explaind_track.record import history
from explaind_track.record.trajectory import Trajectory
from explaind_track.tracking.ddp import Ranks
from explaind_track.tracking.live import LIVE_AXES, Live
from explaind_track.tracking.outputs import Outputs
from explaind_track.tracking.step_watch import StepWatch, has_finite_gradients


class Findings(Summarized):
    """The questions that a Tracker answers, at any time in training and after it."""

    _ranks: Ranks
    _live: Live
    _observer: StepObserver
    _outputs: Outputs
    _watch: StepWatch
    _finishing: bool
    """Whether the run is over, and what has changed the model behind its last step is told too."""
    every: int

    def _summary(self) -> Summary:
        writer, explainers = self._outputs.writer, self._live.explainers
        where = "recorded nowhere" if writer is None else f"recorded in {writer.directory}"
        rows = []
        for name, explainer in explainers.items():
            residuals = [
                one for block in explainer.accumulators[0].sums.rows for one in block.values["residual"].tolist()
            ]
            last, course = (residuals[-1], curve(residuals)) if residuals else (None, "")
            rows.append([name, len(residuals), last, course])
        groups = ", ".join(self._live.groups)
        columns = ["query", "explained steps", "last residual", "over the steps"]
        return Summary(f"Tracker of the groups {groups}; {where}", columns, rows)

    def recorded(self) -> Trajectory:
        """The record of the steps so far, written through to the disk.

        Raises:
            ValueError: If there is none: the Tracker was made without `trajectory=`.
            RuntimeError: In a process that was forked from that of the Tracker.
        """
        self._outputs.refuse_fork()
        if self._outputs.writer is None:
            raise ValueError("this Tracker records nothing; make it with trajectory=, a directory for the record")
        self._outputs.writer.flush(self._watch.number)
        return Trajectory.open(self._outputs.writer.directory)

    def _catch_up(self, summed: bool) -> None:
        """Has all steps so far in the influences: explains those of the record again, where some were taken before this
        Tracker was made, or something interrupted it while it explained one.

        summed: whether the influences are sums over the steps. Where there is no record, these raise RuntimeError, and
        a step that is missing among others is told of by a MissingStepWarning.
        """
        if self._live.upto >= self._watch.number:
            return
        if self._outputs.writer is None or not self._outputs.writer.keeps_gradients:
            _tell_of_missing_step(summed)
            return

        record = self.recorded()
        self._live.forget()
        for step in tqdm(record.steps(), "catch up", len(record), unit="step"):
            if self._finishing if step.closing else self._is_due(step) and has_finite_gradients(step):
                self._live.add(step)
            self._live.pass_by(step.number)

    def _complete_rows(self, record: Trajectory) -> None:
        """Drops the rows of steps that are not in the record, and makes those that were lost."""
        written = history.cut_history(record.directory, self._watch.number)
        lost = [number for number in range(self._watch.number) if number not in written]
        computed = record.manifest.head.get("record") != "batches"  # what keeps no gradients gives no rows
        missing = [number for number in lost if computed and number % self.every == 0]
        with tqdm(desc="complete the rows", total=len(missing), disable=not missing, unit="step") as bar:
            for first, last in _stretches(missing, self.every):
                for step in record.steps(first, last + 1):
                    if self._is_due(step) and has_finite_gradients(step):
                        row, _ = self._live.add(step)
                        self._outputs.log(step.number, row)
                        bar.update()
        self._outputs.tell_of_lost_rows(lost)

    def _is_due(self, step: Step) -> bool:
        """Whether the step is one of those that are explained, if its gradient is finite."""
        return step.number % self.every == 0 and bool(step.updates or step.outside)

    def influence(self, query: str, keep: tuple[str, ...] = LIVE_AXES[0]) -> Influence:
        """The influences of the steps so far on a query.

        Args:
            query: The query's name.
            keep: The axes that are not summed over: ("step", "group") or ("query", "output"), of a `Query.tokens`
                ("group", "token").

        Raises:
            ValueError: For a query that there is not, and for other axes, which `explain` takes from the record.
            RuntimeError: On other ranks than zero; for sums over the steps, where something interrupted the explaining
                of one and there is no record to sum them up from again.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> x = torch.ones(2, 4)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(x)})
            >>> with tracker.step():
            ...     model(torch.ones(5, 4)).square().mean().backward()
            ...     optimizer.step()
            >>> found = torch.from_numpy(tracker.influence("test", ("query", "output")).prediction().values)
            >>> torch.allclose(found.float(), model(x))  # the parts add up to what the model says now
            True
        """
        self._ranks.refuse_others()
        self._catch_up(summed="step" not in keep)
        return self._live.influence(query, keep)

    def parts(self, query: str) -> tuple[str, ...]:
        """The names of the parts that a step is split into on the query.

        Args:
            query: The query's name.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model, x, y = torch.nn.Linear(4, 3), torch.ones(2, 4), torch.zeros(2, dtype=int)
            >>> queries = {"test": Query.outputs(x), "loss": Query.loss(x, y).mean()}
            >>> tracker = Tracker(model, torch.optim.SGD(model.parameters(), lr=0.1), queries=queries)
            >>> tracker.parts("test")
            ('kernel', 'regularization', 'past', 'outside')
            >>> tracker.parts("loss")
            ('kernel', 'momentum', 'regularization', 'past', 'outside')
        """
        require_known("query", query, self._live.parts)
        return self._live.parts[query]

    def parameter_scores(self) -> dict[str, Tensor]:
        """Ψ_S(θ) of every single parameter, over the steps explained so far, on the query that `scores=` names.

        See `analysis.parameter_scores`, which takes them from a record.

        Returns:
            By name, tensors of the parameters' shapes.

        Raises:
            ValueError: If `scores=` was not given.
            RuntimeError: On other ranks than zero.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> queries = {"test": Query.outputs(torch.ones(2, 4)).sum()}
            >>> tracker = Tracker(model, optimizer, queries=queries, scores="test")
            >>> with tracker.step():
            ...     model(torch.ones(5, 4)).square().mean().backward()
            ...     optimizer.step()
            >>> {name: tuple(scores.shape) for name, scores in tracker.parameter_scores().items()}
            {'weight': (3, 4), 'bias': (3,)}
        """
        self._ranks.refuse_others()
        self._catch_up(summed=True)
        return self._live.parameter_scores(self._observer.parameters)

    def residual(self, query: str) -> float:
        """The residual of the last step that was explained, ‖residual‖₂ / ‖change‖₂ over the query's targets.

        Args:
            query: The query's name.

        Raises:
            RuntimeError: On other ranks than zero.

        Example:
            >>> import torch
            >>> from explaind_track import Query, Tracker
            >>> model = torch.nn.Linear(4, 3).double()
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(torch.ones(2, 4).double())})
            >>> with tracker.step():
            ...     model(torch.ones(5, 4).double()).square().mean().backward()
            ...     optimizer.step()
            >>> tracker.residual("test") < 1e-12  # of a linear model, one node leaves nothing over
            True
        """
        self._ranks.refuse_others()
        return self._live.explainer(query).residual


def _tell_of_missing_step(summed: bool) -> None:
    told = (
        "something interrupted the explaining of a step, and there is no record with gradients (trajectory=) to "
        "explain it from"
    )
    if summed:
        raise RuntimeError(f"{told}: the sums over the steps hold an unknown part of it; ask for ('step', 'group')")
    warnings.warn(f"{told}: it is missing among the steps", MissingStepWarning, stacklevel=4)


def _stretches(numbers: Sequence[int], every: int) -> Iterator[tuple[int, int]]:
    """The first and the last of those that follow on each other, in steps of `every`."""
    for _, stretch in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0] * every):
        found = [number for _, number in stretch]
        yield found[0], found[-1]
