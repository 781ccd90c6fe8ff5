"""The W&B run stays its user's: their scalars, rows and definitions, beside ours; and other places for rows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from jobs import make_job
from servers import Server

from explaind_track import CSVWriter, TensorBoardWriter, open_run
from explaind_track.errors import LoggingWarning
from explaind_track.record.history import read_rows
from explaind_track.wandb_io.sync import sync

pytestmark = pytest.mark.usefixtures("closing_wandb")


def test_scalars_stay_scalars_and_nothing_of_the_user_is_lost(server: Server, tmp_path: Path) -> None:
    """The user logs between our rows: with a commit, without, and by the tracker; and has defined a metric."""
    job, run = make_job(), open_run("project", tmp_path)
    run.define_metric("test/best", summary="max")
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", groups={"first.part": "0.*", "rest": "2.*"})
    for number in range(4):
        run.log({"train/acc": number / 10})
        run.log({"test/f1": number / 100, "test/best": -number}, commit=False)
        tracker.log({"test/accuracy": number / 4})
        job.run(tracker, 1)
        run.log({"own/ahead": number}, step=100 * (number + 1))  # above all that was logged
    run.log({"query/own": 7.0})
    tracker.finish()
    run.finish()

    rows = server.history(f"dev/project/{run.id}")
    for key, values in {
        "train/acc": [0.0, 0.1, 0.2, 0.3],
        "test/f1": [0.0, 0.01, 0.02, 0.03],
        "test/best": [0, -1, -2, -3],
        "test/accuracy": [0.0, 0.25, 0.5, 0.75],
        "query/own": [7.0],
        "own/ahead": [0, 1, 2, 3],
        "train/step": [0, 1, 2, 3],
    }.items():
        assert [row[key] for row in rows if key in row] == values, key

    kept = wandb.Api().run(f"dev/project/{run.id}")
    for key, value in {"train/acc": 0.3, "test/f1": 0.03, "test/accuracy": 0.75, "query/own": 7.0}.items():
        assert kept.summary[key] == value
    assert dict(kept.summary["test/best"]) == {"max": 0}  # as they have asked for
    own = [row["residual/query"] for row in read_rows(tmp_path / "t")]
    assert kept.summary["residual/query"] == pytest.approx(own[-1])
    assert kept.summary["residual/query_max"] == pytest.approx(max(own))
    assert kept.summary["kernel/first.part_mean"] == pytest.approx(
        float(tracker.influence("query").importance().sel(part="kernel", group="first.part").mean())
    )
    plain = {key: value for key, value in kept.summary.items() if not key.startswith(("_", "test/best"))}
    assert all(isinstance(value, int | float) for value in plain.values()), plain

    definitions = {one["1"]: one for one in kept.rawconfig["_wandb"]["m"] if "1" in one}
    assert "kernel/first\\.part" in definitions or "kernel/first.part" in definitions
    assert not {"train/acc", "test/f1", "query/own", "test/*", "train/*", "query/*"} & set(definitions)


@pytest.mark.slow
def test_a_sweep_finds_plain_numbers_to_filter_by(server: Server, tmp_path: Path) -> None:
    found = {}
    for seed in range(2):
        job, run = make_job(), open_run("project", tmp_path, config={"seed": seed})
        job.seed = seed
        tracker = job.tracker(run=run, trajectory=tmp_path / str(seed))
        job.run(tracker, 2)
        tracker.finish()
        run.finish()
        found[run.id] = seed
    api = wandb.Api()
    for name, seed in found.items():
        run = api.run(f"dev/project/{name}")
        assert run.config["seed"] == seed
        for key in ("residual/query_max", "kernel/total_mean", "query/accuracy", "loss/change"):
            assert math.isfinite(run.summary[key])


@pytest.mark.slow
def test_what_is_synced_has_the_same_summary(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    job, run = make_job(), open_run("project", tmp_path, entity="dev")
    tracker = job.tracker(run=run, trajectory=tmp_path / "t")
    job.run(tracker, 3)
    tracker.finish()
    run.finish()
    monkeypatch.delenv("WANDB_MODE")
    path = sync(tmp_path / "t").run
    summary = wandb.Api().run(path).summary
    own = [row["residual/query"] for row in read_rows(tmp_path / "t")]
    assert summary["residual/query_max"] == pytest.approx(max(own))
    assert summary["query/loss"] == pytest.approx(read_rows(tmp_path / "t")[-1]["query/loss"])


# ------------------------------------------------------------------------------------------------------ other writers


class Failing:
    """Writes nothing."""

    def write(self, step: int, row: Any) -> None:
        raise OSError("no room")


def test_rows_go_wherever_they_are_wanted(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job()
    writers = [CSVWriter(tmp_path / "rows.csv"), TensorBoardWriter(tmp_path / "events"), Failing()]
    tracker = job.tracker(trajectory=tmp_path / "t", writers=writers, samples_every=2, map_queries=2)
    with pytest.warns(LoggingWarning, match="could not write to Failing: OSError\\('no room'\\)"):
        job.run(tracker, 3)
    tracker.finish()

    rows = read_rows(tmp_path / "t")
    table = pd.read_csv(tmp_path / "rows.csv").pivot(index="step", columns="key", values="value")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for key in ("kernel/0", "residual/query", "loss/change"):
        expected = [row[key] for row in rows]
        assert table[key].tolist() == expected
        np.testing.assert_allclose([event.value for event in events.Scalars(key)], expected, rtol=1e-6)
    assert [event.step for event in events.Images("samples/map")] == [0, 2]

    CSVWriter(tmp_path / "rows.csv").write(9, {"own/x": 1.5, "words": "none"})
    assert (tmp_path / "rows.csv").read_text().splitlines()[-1] == "9,own/x,1.5"


def test_what_is_no_writer_is_refused() -> None:
    for bad in (CSVWriter("rows.csv"), ["rows.csv"], "rows.csv"):
        with pytest.raises(TypeError, match="writers= is a list of objects"):
            make_job().tracker(writers=bad)
