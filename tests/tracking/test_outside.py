"""What changes the model outside of the optimizer's step is told where it is, and nowhere else."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from loops import Loop, Run, batches, plain
from outside_loops import OUTSIDE_LOOPS, OnlineAndTarget, averaged, between, clamp, swapped_and_restored

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain
from explaind_track.analysis import parameter_scores, sparse_prediction, step_scores
from explaind_track.errors import SampleMismatchWarning
from explaind_track.record.history import read_rows
from explaind_track.tracking.live import LIVE_AXES

CLAMPED = Loop("clamped", between(clamp))
AVERAGED = Loop("averaged", averaged)


def files_of(directory: Path) -> dict[str, str]:
    """The content of a record, as hashes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.rglob("*.safetensors")}


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [{key: v for key, v in row.items() if not key.startswith("cost/")} for row in read_rows(directory)]


def test_what_is_swapped_in_and_out_again_leaves_no_trace(tmp_path: Path) -> None:
    found = []
    for number, body in enumerate((plain, swapped_and_restored)):
        directory = tmp_path / str(number)
        run = Loop("", body).run(trajectory=directory, keyframe_every=4)
        assert "outside" not in run.tracker.influence("query").data["part"]
        found.append((files_of(directory), rows_of(directory)))
    assert found[0] == found[1]


@pytest.mark.parametrize("loop", OUTSIDE_LOOPS, ids=lambda loop: loop.id)
def test_the_parts_add_up_to_the_way_of_the_weights(loop: Loop, tmp_path: Path) -> None:
    """From where the run began to where it ended, step by step without a gap."""
    run = loop.run(trajectory=tmp_path / "t", keyframe_every=2)
    trajectory = Trajectory.open(tmp_path / "t")
    start = dict(next(trajectory.steps(lasting=True)).start.parameters)
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    for step in trajectory.steps():
        for change in (step.outside, step):
            own = () if change is None else [part for name, part in change.parts.items() if name != "momentum"]
            for part in own:
                for name, value in part.items():
                    total[name] += value
    for name, value in run.model.named_parameters():
        exact = {"rtol": 1e-12, "atol": 1e-14} if start[name].dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(start[name] - total[name], value.detach().to(start[name]), **exact)


def test_rows_show_it_where_it_is(tmp_path: Path) -> None:
    queries = {"query": Query.outputs(torch.randn(4, 4).double()), "loss": Query.loss(*labelled()).mean()}
    options: dict[str, Any] = {"queries": queries, "quadrature": Quadrature(1e-9, 4, 64)}
    run = Loop("", clamped_every_other, options=options).run(trajectory=tmp_path / "t")
    rows = read_rows(tmp_path / "t")
    shown = [sorted(key for key in row if "outside" in key) for row in rows]
    keys = [f"{front}outside/{group}" for front in ("", "loss/") for group in (*run.tracker.groups, "total")]
    keys.append("loss/share/outside")
    assert shown == [[], sorted(keys), [], sorted(keys), [], sorted(keys)]

    parts = ("kernel", "reg", "outside")
    changes = [sum(row.get(f"loss/{part}/total", 0.0) for part in parts) for row in rows]
    assert changes == pytest.approx([row["loss/change"] for row in rows], rel=1e-7)


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 4).double(), torch.randint(0, 3, (6,))


def clamped_every_other(run: Run) -> None:
    """Clamped before every other step."""
    for number, index in enumerate(batches()):
        if number % 2:
            clamp(run.model)
        run.step(index)


def test_what_changed_behind_the_last_step_is_an_entry_of_its_own(tmp_path: Path) -> None:
    run = AVERAGED.run(trajectory=tmp_path / "t", keyframe_every=4, quadrature=Quadrature(1e-9, 4, 64))
    trajectory, rows = Trajectory.open(tmp_path / "t"), read_rows(tmp_path / "t")
    assert len(trajectory) == 6
    assert [row["train/step"] for row in rows] == list(range(7))
    assert set(rows[6]) == {"train/step", "residual/query", "residual/nodes", "query/loss", "query/accuracy"} | {
        f"outside/{group}" for group in (*run.tracker.groups, "total")
    }

    by_step = run.tracker.influence("query").data
    assert by_step["step"].values.tolist() == list(range(7))
    assert by_step["part"].values.tolist() == ["kernel", "regularization", "outside"]
    assert not by_step["influence"].sel(part="outside", step=slice(0, 5)).any()
    assert not by_step["influence"].sel(part=["kernel", "regularization"], step=6).any()

    *steps, closing = trajectory.steps(lasting=True)
    assert [step.number for step in steps] == list(range(6))
    assert (closing.number, closing.closing, len(closing.updates), closing.batches) == (6, True, 0, ())
    assert [step.number for step in trajectory.steps(4, 6)] == [4, 5, 6]
    assert [step.number for step in trajectory.steps(4, 5)] == [4]
    final = trajectory.state_dict(6)
    assert all(torch.equal(value, final[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("loop", [CLAMPED, AVERAGED], ids=lambda loop: loop.id)
def test_lists_windows_and_sums_tell_the_same(loop: Loop, tmp_path: Path) -> None:
    run = loop.run(trajectory=tmp_path / "t", keyframe_every=4)
    trajectory, model = Trajectory.open(tmp_path / "t"), loop.model().double()
    options: dict[str, Any] = {"quadrature": Quadrature.fixed(2), "progress": False}
    keep = ("step", "group", "query", "output")
    whole = explain(trajectory, model, run.query, keep=keep, **options).data
    assert whole["part"].values.tolist() == ["kernel", "regularization", "outside"]

    held = explain(list(trajectory.steps(lasting=True)), model, run.query, keep=keep, **options).data
    xr.testing.assert_identical(held, whole)

    # window by window, that of the record's end with what comes behind it
    pieces = [
        explain(trajectory, model, run.query, keep=keep, window=w, **options).data for w in ((0, 1), (1, 4), (4, 6))
    ]
    for piece in pieces:
        xr.testing.assert_identical(piece["influence"], whole["influence"].sel(step=piece["step"], part=piece["part"]))
    assert sum(piece.sizes["step"] for piece in pieces) == whole.sizes["step"]

    summed = explain(trajectory, model, run.query, keep=("query", "output"), **options)
    total = whole["influence"].sum(["step", "group"])
    xr.testing.assert_allclose(summed.data["influence"], total, rtol=1e-12, atol=1e-14)
    closed = explain(trajectory, model, run.query, keep=("query", "output"), close=True, **options)
    torch.testing.assert_close(torch.from_numpy(closed.prediction().values), run.query(run.model.eval()).detach())


def test_it_can_be_asked_for_by_name_or_left_to_the_remainder(tmp_path: Path) -> None:
    run = CLAMPED.run(trajectory=tmp_path / "t")
    trajectory, model = Trajectory.open(tmp_path / "t"), CLAMPED.model().double()
    options: dict[str, Any] = {"quadrature": Quadrature.fixed(4), "progress": False}
    every = explain(trajectory, model, run.query, **options).data

    turned = explain(trajectory, model, run.query, parts=("outside", "kernel"), **options).data
    assert turned["part"].values.tolist() == ["outside", "kernel"]
    xr.testing.assert_identical(turned["influence"], every["influence"].sel(part=["outside", "kernel"]))

    without = explain(trajectory, model, run.query, parts=("kernel", "regularization"), keep=("step",), **options)
    assert without.data["part"].values.tolist() == ["kernel", "regularization"]
    assert without.residual.sel(step=5) > 0.1
    assert without.residual.sel(step=0) < 1e-6


def test_analyses_count_it_with_its_step(tmp_path: Path) -> None:
    run = AVERAGED.run(trajectory=tmp_path / "t")
    trajectory, model = Trajectory.open(tmp_path / "t"), AVERAGED.model().double()
    rule: dict[str, Any] = {"quadrature": Quadrature.fixed(8), "progress": False}
    for by in ("loss", "size", "influence"):
        assert step_scores(trajectory, model, run.query, by=by, progress=False)["step"].values.tolist() == list(
            range(7)
        )
    influence = explain(trajectory, model, run.query, keep=("step", "query", "output"), **rule)
    every = sparse_prediction(influence, list(range(7)))
    torch.testing.assert_close(torch.from_numpy(every.values), run.query(run.model.eval()).detach())

    scores = parameter_scores(trajectory, model, run.query, part="outside", **rule)
    of_groups = explain(trajectory, model, run.query, keep=("group",), **rule).data["influence"].sel(part="outside")
    for group, names in run.tracker.groups.items():
        assert float(sum(scores[name].sum() for name in names)) == pytest.approx(float(of_groups.sel(group=group)))


def test_every_second_step_only(tmp_path: Path) -> None:
    run = CLAMPED.run(trajectory=tmp_path / "t", every=2)
    assert run.tracker.influence("query").data["step"].values.tolist() == [0, 2, 4, 6]


def test_weights_that_change_between_forward_pass_and_step_are_warned_of() -> None:
    """The samples' gradients are not those at the weights that the step starts from; those of groups are exact."""

    def body(run: Run) -> None:
        for index in batches():
            run.step(index, before=lambda: clamp(run.model))

    with pytest.warns(SampleMismatchWarning, match=r"before the forward pass or behind optimizer.step\(\), not in be"):
        run = Loop("", body).run(quadrature=Quadrature(1e-9, 4, 64))
    found = run.tracker.influence("query", LIVE_AXES[1]).prediction().values
    torch.testing.assert_close(torch.from_numpy(found), run.query(run.model.eval()).detach(), rtol=1e-8, atol=1e-10)


def test_two_trackers_of_one_model(tmp_path: Path) -> None:
    """As of a GAN: each tells of the other's steps as of changes from outside."""
    torch.manual_seed(0)
    model = OnlineAndTarget().double()
    x = torch.randn(8, 4).double()
    query, rule = Query.outputs(x), Quadrature(1e-9, 4, 64)
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.02) for part in (model.online, model.target)]
    trackers = [Tracker(model, optimizer, queries={"q": query}, quadrature=rule) for optimizer in optimizers]
    for _ in range(3):
        for sign, optimizer, tracker in zip((1, -1), optimizers, trackers, strict=True):
            with tracker.step():
                optimizer.zero_grad()
                (sign * model(x).square().mean()).backward()
                optimizer.step()
    wanted = query(model).detach()
    for tracker in trackers:
        tracker.finish()
        found = [tracker.influence("q", keep) for keep in LIVE_AXES]
        torch.testing.assert_close(torch.from_numpy(found[1].prediction().values), wanted, rtol=1e-8, atol=1e-10)
        assert found[0].residual.max() < 1e-8
