"""Steps from a record, from a list and from a stream: the same numbers, or a refusal, from every analysis alike."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from helpers import check
from jobs import Job, make_job, sample_loss
from torch import Tensor

from explaind_track import Quadrature, Query, Step, StepObserver, Trajectory, explain
from explaind_track.analysis import kernel_machine, parameter_scores, similarity, step_scores
from explaind_track.explanation.explain import ExplainOptions, plan_explanation

STEPS = 8


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Trajectory]:
    job, directory = make_job(), tmp_path_factory.mktemp("run") / "t"
    tracker = job.tracker(trajectory=directory, keyframe_every=3)
    job.run(tracker, STEPS)
    tracker.finish()
    return job, Trajectory.open(directory)


Ask = Callable[[Job, "Trajectory | Iterable[Step]", Any], Any]


def _of_samples(job: Job) -> dict[str, Any]:
    return {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}


def _flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in scores.values()])


def _kernels(job: Job, steps: Any, options: Any) -> Any:
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    return kernel_machine(
        steps, job.model, job.queries["query"], outputs=lambda model, batch: model(batch[0]),
        loss=lambda outputs, batch: loss(outputs, batch[1]), data=lambda index: (job.x[index], job.y[index]), **options,
    )["kernel"]  # fmt: skip


ONCE: dict[str, Ask] = {
    "explain": lambda job, steps, options: explain(steps, job.model, job.queries["query"], **options).data["influence"],
    "scores": lambda job, steps, options: _flat(parameter_scores(steps, job.model, job.queries["query"], **options)),
    "size": lambda job, steps, options: step_scores(steps, job.model, by="size", **options),
    "loss": lambda job, steps, options: step_scores(steps, job.model, job.queries["loss"], by="loss", **options),
    "influence": lambda job, steps, options: step_scores(
        steps, job.model, job.queries["query"], by="influence", **options
    ),
}
"""One pass over the steps: any stream of them will do."""

AGAIN: dict[str, Ask] = {
    "samples": lambda job, steps, options: explain(
        steps, job.model, job.queries["query"], keep=("query", "sample"), **_of_samples(job), **options
    ).data["influence"],
    "importance": lambda job, steps, options: _flat(
        parameter_scores(steps, job.model, job.queries["query"], importance=True, memory=1, **options)
    ),
    "similarity": lambda job, steps, options: similarity(
        steps, job.model, job.queries["query"], **_of_samples(job), **options
    ),
    "kernel machine": _kernels,
}
"""Backwards, or several passes."""

every = pytest.mark.parametrize("ask", {**ONCE, **AGAIN}.values(), ids={**ONCE, **AGAIN})


@every
def test_a_list_of_lasting_steps_gives_what_the_trajectory_gives(recorded: tuple[Job, Trajectory], ask: Ask) -> None:
    job, trajectory = recorded
    steps = list(trajectory.steps(lasting=True))
    for options in ({}, {"window": (2, 6)}):
        check(ask(job, steps, {**options, "progress": False}), ask(job, trajectory, {**options, "progress": False}))


@every
def test_lists_of_steps_that_do_not_last_are_refused(recorded: tuple[Job, Trajectory], ask: Ask) -> None:
    """The replay has written over their tensors: also over those of its only step, once it has gone on."""
    job, trajectory = recorded
    lasting = list(trajectory.steps(lasting=True))
    for steps in (
        list(trajectory.steps()),
        list(trajectory.steps(2, 3)),
        list(islice(trajectory.steps(), 3)),
        [*lasting[:3], *trajectory.steps(3, 5)],
    ):
        for form in (list, tuple, iter):
            with pytest.raises(ValueError, match=r"step \d is not valid any more.*trajectory\.steps\(lasting=True\)"):
                ask(job, form(steps), {"progress": False})


@pytest.mark.parametrize("ask", ONCE.values(), ids=ONCE)
def test_a_stream_serves_one_pass(recorded: tuple[Job, Trajectory], ask: Ask) -> None:
    job, trajectory = recorded
    stream = trajectory.steps()
    check(ask(job, stream, {"progress": False}), ask(job, trajectory, {"progress": False}))
    with pytest.raises(ValueError, match="no step"):
        ask(job, stream, {"progress": False})
    with pytest.raises(ValueError, match="window"):
        ask(job, trajectory.steps(), {"progress": False, "window": (0, 2)})


@pytest.mark.parametrize("ask", AGAIN.values(), ids=AGAIN)
def test_a_stream_is_held_where_it_has_to_be(recorded: tuple[Job, Trajectory], ask: Ask) -> None:
    job, trajectory = recorded
    wanted = ask(job, trajectory, {"progress": False})
    check(ask(job, trajectory.steps(lasting=True), {"progress": False}), wanted)
    with pytest.raises(ValueError, match="lasting=True"):
        ask(job, trajectory.steps(), {"progress": False})


@every
def test_windows_are_checked_alike(recorded: tuple[Job, Trajectory], ask: Ask) -> None:
    job, trajectory = recorded
    words = rf"the run has {STEPS} steps, so that 0 ≤ first < last ≤ {STEPS}"
    for window in ((3, 3), (4, 2), (3, STEPS + 1), (-1, 3)):
        for steps in (trajectory, list(trajectory.steps(lasting=True))):
            with pytest.raises(ValueError, match=rf"window=\({window[0]}, {window[1]}\).*{words}"):
                ask(job, steps, {"progress": False, "window": window})


def test_steps_come_in_their_order(recorded: tuple[Job, Trajectory]) -> None:
    job, trajectory = recorded
    steps = list(trajectory.steps(lasting=True))
    for wrong in (steps[::-1], iter(steps[::-1]), [steps[0], steps[0]]):
        with pytest.raises(ValueError, match="in their order"):
            explain(wrong, job.model, job.queries["query"], progress=False)


def test_a_part_of_a_run_is_a_run(recorded: tuple[Job, Trajectory]) -> None:
    job, trajectory = recorded
    query, options = job.queries["query"], {"quadrature": Quadrature.fixed(1), "progress": False}
    part = list(trajectory.steps(3, 7, lasting=True))
    for keep in (("step", "query"), ("step", "query", "sample")):
        found = explain(part, job.model, query, keep=keep, **_of_samples(job), **options).data
        assert found["step"].values.tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="the run has 4 steps, so that 3 ≤ first < last ≤ 7"):
        explain(part, job.model, query, window=(2, 5))


def test_a_live_step_serves_until_the_run_goes_on() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer, query = StepObserver(optimizer, dict(model.named_parameters())), Query.outputs(torch.ones(1, 2))
    held: list[Step] = []
    for number in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).mean().backward()
        observer.before({})
        for step in held:
            with pytest.raises(ValueError, match=f"step {step.number} is not valid any more"):
                explain([step], model, query, progress=False)
        optimizer.step()
        held.append(observer.after(number, {}))
        assert explain(held[-1:], model, query, progress=False).residual.max() < 1e-3
        if number == 1:  # settling is a favour to the next step, not a duty
            observer.settle()
    with pytest.raises(ValueError, match="step 0 is not valid any more"):
        observer.lasting(held[0])


def test_plans_can_be_run_twice_and_notice_that_steps_are_gone(recorded: tuple[Job, Trajectory]) -> None:
    job, trajectory = recorded
    plan = plan_explanation(trajectory, job.model, job.queries["query"], progress=False)
    np.testing.assert_array_equal(plan.run().data["influence"], plan.run().data["influence"])
    replay = trajectory.steps(2, 4)
    plan = plan_explanation([next(replay)], job.model, job.queries["query"], progress=False)
    assert "1 step" in plan.describe()
    next(replay)
    with pytest.raises(ValueError, match="step 2 is not valid any more"):
        plan.run()


def test_the_options_of_both_are_the_same() -> None:
    named = set(plan_explanation.__annotations__) - {"steps", "model", "query", "return"}
    assert named == set(ExplainOptions.__annotations__)
    words = explain.__doc__ or ""
    assert all(f"{name}: " in words for name in named)
