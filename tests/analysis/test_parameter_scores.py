"""Scores of single parameters against the oracle, live and offline."""

from pathlib import Path

import pytest
import torch
from cases import Case
from helpers import cases, check
from jobs import make_job

from explaind_track import Quadrature, Trajectory
from explaind_track.analysis import parameter_scores


@pytest.mark.parametrize("part", ["kernel", "regularization"])
@cases("adamw", "adamw-weighted", "sgd-nesterov-maximize", "scaled-adamw", "tied-mean-loss", "late-activation",
       "normalized-adamw", "adamw-thawed", "target-loss")  # fmt: skip
def test_scores_are_sums_of_the_influence_tensor(case: Case, part: str) -> None:
    oracle = case.reference(2)
    terms = oracle.influence(oracle.parts()[part]).sum(0)  # D X O
    steps, model = list(case.steps(lasting=True)), case.make(9)
    for importance, wanted in ((False, terms.sum((1, 2))), (True, terms.abs().sum((1, 2)))):
        for memory in (2**28, 1):
            found = parameter_scores(
                steps, model, case.query(), part=part, importance=importance, memory=memory, progress=False,
                quadrature=Quadrature.fixed(2),
            )  # fmt: skip
            for name, place in oracle.places.items():
                check(found[name].flatten(), wanted[place], float(terms.abs().max()))


def test_live_scores_are_those_of_the_record(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4, scores="query")
    job.run(tracker, 9)
    tracker.finish()

    trajectory = Trajectory.open(tmp_path / "t")
    live, query = tracker.parameter_scores(), job.queries["query"]
    found = parameter_scores(trajectory, job.model, query, quadrature=Quadrature.fixed(1), progress=False)

    kernel = tracker.influence("query").data["influence"].sel(part="kernel").sum("step")
    for name, value in found.items():
        check(live[name], value)
    for group in kernel["group"].values:
        check(sum(live[name].sum() for name in live if name.startswith(f"{group}.")), kernel.sel(group=group))

    halves = [
        parameter_scores(trajectory, job.model, query, window=window, quadrature=Quadrature.fixed(1), progress=False)
        for window in ((0, 4), (4, 9))
    ]
    for name, value in found.items():
        check(halves[0][name] + halves[1][name], value)


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 3)
    tracker.finish()
    trajectory, query = Trajectory.open(tmp_path / "t"), job.queries["query"]

    with pytest.raises(ValueError, match="lasting=True"):
        parameter_scores(trajectory.steps(), job.model, query, importance=True, memory=1, progress=False)
    with pytest.raises(ValueError, match="parts"):
        parameter_scores(trajectory, job.model, query, part="gradient", progress=False)
    with pytest.raises(ValueError, match="scores="):
        tracker.parameter_scores()
    with pytest.raises(ValueError, match="no query 'other'; there are: 'query', 'loss'"):
        make_job().tracker(scores="other")
    with pytest.raises(ValueError, match=r"0\.weight"):
        parameter_scores(trajectory, make_job(dtype=torch.float32).model, query, progress=False)
