"""What prompts, notebooks, pandas and figures show of an influence and its companions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from jobs import Job, make_job, sample_loss

from explaind_track import Influence, Query, Trajectory, explain, plan_explanation
from explaind_track.core.summary import Summary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Any, Trajectory]:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path_factory.mktemp("run") / "t")
    job.run(tracker, 6)
    tracker.finish()
    return job, tracker, Trajectory.open(tracker.recorded().directory)


def of_samples(run: tuple[Job, Any, Trajectory], query: Query, *keep: str) -> Influence:
    job, _, trajectory = run
    data = {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    return explain(trajectory, job.model, query, keep=keep, progress=False, **data)


def test_what_prints_is_short_and_has_no_tensors(run: tuple[Job, Any, Trajectory]) -> None:
    job, tracker, trajectory = run
    plan = plan_explanation(trajectory, job.model, job.queries["query"])
    samples = of_samples(run, job.queries["loss"], "sample")
    for shown in (tracker, trajectory, job.queries["query"], plan, tracker.influence("query"), samples):
        assert len(repr(shown).splitlines()) < 12
        assert "tensor(" not in repr(shown)
        assert "<table>" in shown._repr_html_()
    assert "5 × 4" in repr(job.queries["query"])
    assert "AdamW" in repr(trajectory)
    assert "▁" in repr(tracker)
    assert "2 part × 6 step × 2 group × 5 query" in repr(
        plan_explanation(trajectory, job.model, job.queries["query"], keep=("step", "group", "query"))
    )


def test_a_tracker_prints_before_its_first_step() -> None:
    assert "recorded nowhere" in repr(make_job().tracker())


def test_what_is_shown_is_escaped() -> None:
    html = Summary("<b>", ["<i>"], [["<script>", 0.12345]]).html()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "0.123" in html


def test_the_samples_that_did_most(run: tuple[Job, Any, Trajectory]) -> None:
    job = run[0]
    influence = of_samples(run, job.queries["loss"], "sample")
    values = influence.data["influence"].to_series()
    top = influence.top(3)
    assert top["sample"].tolist() == [*values.nlargest(3).index, *values.nsmallest(3).index]
    assert top["effect"].tolist() == ["helpful"] * 3 + ["harmful"] * 3
    np.testing.assert_allclose(top["change"], -values[top["sample"]])

    several = of_samples(run, job.queries["query"], "group", "query", "sample")
    one = several.top(2, query=1, group="2")
    wanted = several.data["influence"].sel(group="2").isel(query=1).to_series()
    assert one["sample"].tolist() == [*wanted.nlargest(2).index, *wanted.nsmallest(2).index]
    assert set(one["effect"]) == {"lowered", "raised"}
    assert len(several.top(1000)) == len(values)
    for where, message in (
        ({"query": 99}, "none of '0 to 4'"),
        ({"group": "head"}, "none of ['0', '2']"),
        ({"sample": 3}, "there are: group, query"),
        ({"output": 0}, "there are: group, query"),
    ):
        with pytest.raises(ValueError, match=r"none of|there are") as told:
            several.top(2, **where)
        assert message in str(told.value)
    with pytest.raises(ValueError, match="keep=\\('sample',\\)"):
        run[1].influence("query").top()


def test_pandas_has_a_row_for_each_number(run: tuple[Job, Any, Trajectory]) -> None:
    influence = run[1].influence("query")
    frame = influence.to_pandas()
    assert list(frame.columns) == ["part", "step", "group", "influence", "importance"]
    again = frame.set_index(["part", "step", "group"])["importance"].to_xarray()
    xr.testing.assert_equal(again.reindex_like(influence.importance()), influence.importance().drop_vars([]))
    cells = run[1].influence("query", ("query", "output")).to_pandas()
    assert list(cells.columns) == ["part", "query", "output", "influence"]
    assert isinstance(of_samples(run, run[0].queries["loss"], "sample").to_pandas(), pd.DataFrame)


def test_figures_follow_the_axes(run: tuple[Job, Any, Trajectory], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    job, tracker, trajectory = run

    def drawn(influence: Influence) -> tuple[int, int, int]:
        """Lines, bars and pictures of the first panel."""
        axis = influence.plot().axes[0]
        return len(axis.lines), len(axis.patches), len(axis.images)

    def of_groups(*keep: str) -> Influence:
        return explain(trajectory, job.model, job.queries["query"], keep=keep, progress=False)

    assert drawn(tracker.influence("query")) == (2, 0, 0)
    assert drawn(of_groups("group")) == (0, 4, 0)
    assert drawn(of_groups()) == (0, 2, 0)
    assert drawn(of_groups("query", "output")) == (0, 0, 1)
    assert drawn(of_groups("step", "query")) == (5, 0, 0)
    assert drawn(of_samples(run, job.queries["loss"], "sample")) == (0, 21, 0)
    assert drawn(of_samples(run, job.queries["loss"], "step", "sample")) == (0, 0, 1)
    with pytest.raises(ValueError, match="step, group, query"):
        of_groups("step", "group", "query").plot()
