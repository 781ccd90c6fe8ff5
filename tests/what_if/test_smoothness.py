"""What the derivative predicts of runs without some samples, beside those runs."""

from typing import Any

import numpy as np
import pytest
import torch
from jobs import make_job, sample_loss

from explaind_track import Influence, Trajectory, rerun, smoothness
from explaind_track.what_if import Reweighted

JOB = make_job("sgd")
OPTIONS: dict[str, Any] = {
    "sample_loss": sample_loss, "data": lambda index: (JOB.x[index], JOB.y[index]), "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    directory = tmp_path_factory.mktemp("run") / "t"
    job = make_job("sgd")
    tracker = job.tracker(queries={}, trajectory=directory)
    job.run(tracker, 6)
    tracker.finish()
    return Trajectory.open(directory)


def test_predictions_meet_runs_without_the_samples(trajectory: Trajectory) -> None:
    query = JOB.queries["query"]
    found = smoothness(trajectory, JOB.model, query, fractions=(0.05, 0.25), sets=8, **OPTIONS)
    assert found["left_out"].sum("sample").values.tolist() == [[1] * 8, [5] * 8]  # of 21
    assert (found["lds"] > 0.95).all()
    assert float(found["correlation"][0]) > 0.999

    # the error is of second order
    small, large = found["error"].values
    assert 0 < small < 0.05
    assert 2 < large / small < 20

    # one of the sets by itself
    samples = found["sample"].values[found["left_out"].values[1, 3]]
    again = rerun(trajectory, JOB.model, change=Reweighted.without(samples), **OPTIONS).compare(query)["value"]
    change = again.sel(run="rerun") - again.sel(run="original")
    np.testing.assert_allclose(found["actual"].values[1, 3], change.values[0], atol=1e-14)


def test_wrong_effects_are_found_out(trajectory: Trajectory) -> None:
    query = JOB.queries["query"]
    right = smoothness(trajectory, JOB.model, query, fractions=(0.1,), sets=8, **OPTIONS)
    generator = np.random.default_rng(0)
    shape = (5, 3, right.sizes["sample"])
    noise = Influence(right.assign(effect=(("query", "output", "sample"), generator.normal(size=shape))))
    wrong = smoothness(trajectory, JOB.model, query, effects=noise, fractions=(0.1,), sets=8, **OPTIONS)
    assert abs(float(wrong["lds"][0])) < 0.6 < float(right["lds"][0])
    assert float(wrong["lds_error"][0]) > 0.02
    torch.testing.assert_close(torch.from_numpy(wrong["actual"].values), torch.from_numpy(right["actual"].values))


def test_what_makes_no_sense_is_refused(trajectory: Trajectory) -> None:
    query = JOB.queries["loss"]
    for options, match in (({"fractions": (2.0,)}, "between 0 and 1"), ({"sets": 2}, "sets= is at least 4")):
        with pytest.raises(ValueError, match=match):
            smoothness(trajectory, JOB.model, query, **options, **OPTIONS)
