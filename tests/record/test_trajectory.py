"""A recorded run gives the same steps back, bit for bit, and nothing that was altered passes for it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from jobs import OPTIMIZERS, child_environment, make_job, sample_loss
from torch import nn

from explaind_track import Influence, Query, Step, StepObserver, Tracker, Trajectory, explain
from explaind_track.errors import ReplayWarning, TrajectoryError
from explaind_track.record.manifest import Manifest
from explaind_track.record.writer import SEGMENT_BYTES


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Influence, dict[str, torch.Tensor]]:
    """A finished run of 11 steps with a keyframe every 4: its directory, live influence and final state."""
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)
    job.run(tracker, 11)
    tracker.finish()
    return tmp_path / "t", tracker.influence("query"), job.model.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replayed_steps_are_the_live_ones_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    job = make_job(optimizer, torch.float32)
    live: list[dict[str, torch.Tensor]] = []
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)

    def keep(step_tensors: dict[str, torch.Tensor]) -> None:
        live.append(step_tensors)

    after = StepObserver.after

    def watched(observer: StepObserver, *arguments: Any) -> Step:
        step = after(observer, *arguments)
        keep({f"{part}.{name}": value for part in step.parts for name, value in step.parts[part].items()})
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepObserver, "after", watched)
        job.run(tracker, 10)
    tracker.finish()
    for step, expected in zip(Trajectory.open(tmp_path / "t").steps(), live, strict=True):
        found = {f"{part}.{name}": value for part in step.parts for name, value in step.parts[part].items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_offline_influence_equals_the_live_one(optimizer: str, tmp_path: Path) -> None:
    job = make_job(optimizer)
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)
    job.run(tracker, 10)
    tracker.finish()
    for name, query in job.queries.items():
        rule = tracker.quadrature
        parts = tracker.parts(name)
        offline = explain(
            Trajectory.open(tmp_path / "t"), job.model, query, parts=parts, quadrature=rule, progress=False
        )
        xr.testing.assert_allclose(offline.data, tracker.influence(name).data, rtol=1e-12, atol=1e-14)


def test_windows_are_pieces_of_the_whole(recorded: tuple[Path, Influence, dict[str, torch.Tensor]]) -> None:
    directory, whole, _ = recorded
    job = make_job()
    trajectory = Trajectory.open(directory)
    rule = job.tracker().quadrature
    piece = explain(trajectory, job.model, job.queries["query"], window=(5, 9), quadrature=rule, progress=False)
    assert piece.data["step"].values.tolist() == [5, 6, 7, 8]
    xr.testing.assert_allclose(piece.data["influence"], whole.data["influence"].sel(step=slice(5, 8)))
    with pytest.raises(ValueError, match="steps 0 to 11, not 5 to 12"):
        list(trajectory.steps(5, 12))


def test_a_checkpoint_of_any_step_loads_into_the_model(
    recorded: tuple[Path, Influence, dict[str, torch.Tensor]],
) -> None:
    directory, _, final = recorded
    trajectory = Trajectory.open(directory)
    job, reference = make_job(), make_job()
    tracker = reference.tracker()
    for step in range(12):
        state = trajectory.state_dict(step)
        job.model.load_state_dict(state)
        assert all(torch.equal(state[name], value) for name, value in reference.model.state_dict().items())
        if step < 11:
            reference.seed = 0
            break
    tracker.finish()
    assert all(torch.equal(trajectory.state_dict(11)[name], final[name]) for name in final)
    assert len(trajectory) == 11


def test_batches_come_back_with_their_indices_and_each_index_set_once(tmp_path: Path) -> None:
    job = make_job()
    index, weight = torch.arange(24), torch.rand(24, dtype=torch.float64)
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=2)
    for _ in range(5):
        with tracker.step():
            job.optimizer.zero_grad()
            tracker.batch((job.x, job.y), index=index, weight=weight)
            (sample_loss(job.model, (job.x, job.y)) * weight).sum().backward()
            job.optimizer.step()
    tracker.finish()

    trajectory = Trajectory.open(tmp_path / "t")
    for step in range(5):
        (batch,) = trajectory.batches(step)
        assert torch.equal(batch.index, index)
        assert torch.equal(batch.weight, weight)
        assert batch.data is None
    copies = [name for segment in trajectory.segments for name in trajectory.read(segment).names if "index" in name]
    assert len(copies) == 1


def test_weights_of_equal_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    job = make_job()
    given = [torch.zeros(8), torch.zeros(4, dtype=torch.float64), torch.zeros(16, dtype=torch.bfloat16)]
    tracker = job.tracker(trajectory=tmp_path / "t", sample_loss=None)
    for weight in given:
        with tracker.step():
            tracker.batch(job.x[: len(weight)], index=torch.zeros(len(weight), dtype=torch.int32), weight=weight)
            job.model(job.x).sum().backward()
            job.optimizer.step()
    tracker.finish()
    for step, weight in enumerate(given):
        (batch,) = Trajectory.open(tmp_path / "t").batches(step)
        assert (batch.weight.dtype, batch.weight.shape) == (weight.dtype, weight.shape)
        assert batch.index.tolist() == [0] * len(weight)


def test_batches_without_an_index_are_stored_themselves(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", sample_loss=None)
    with tracker.step():
        tracker.batch({"x": job.x[:3], "more": [job.y[:3], 7]}, weight="sum")
        sample_loss(job.model, (job.x[:3], job.y[:3])).sum().backward()
        job.optimizer.step()
    tracker.finish()
    (batch,) = Trajectory.open(tmp_path / "t").batches(0)
    assert torch.equal(batch.data["x"], job.x[:3])
    assert torch.equal(batch.data["more"][0], job.y[:3])
    assert batch.data["more"][1] == 7
    assert (batch.size, batch.weight, batch.index) == (3, 1.0, None)


def test_tied_weights_and_buffers_are_in_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.norm = nn.BatchNorm1d(3)
            self.decoder = nn.Linear(3, 5, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.norm(self.embedding(x)))

    model, x = Tied(), torch.randint(0, 5, (6,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(x)}, groups=1, trajectory=tmp_path / "t")
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    for _ in range(3):
        with tracker.step():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x).backward()
            optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    tracker.finish()
    trajectory = Trajectory.open(tmp_path / "t")
    for step, state in enumerate(states):
        found = trajectory.state_dict(step)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
        Tied().load_state_dict(found)


def test_a_segment_ends_where_its_bytes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SEGMENT_BYTES == 2**26
    monkeypatch.setattr("explaind_track.record.writer.SEGMENT_BYTES", 1000)
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 9)
    tracker.finish()
    trajectory = Trajectory.open(tmp_path / "t")
    assert len(trajectory.segments) == 3
    assert len(list(trajectory.steps())) == 9


def test_a_run_is_never_written_over(recorded: tuple[Path, Influence, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        make_job().tracker(trajectory=recorded[0])


@pytest.mark.parametrize("kind", ["keyframes", "steps"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_found_on_opening(
    kind: str, damage: str, recorded: tuple[Path, Influence, dict[str, torch.Tensor]]
) -> None:
    directory, _, _ = recorded
    target = sorted((directory / kind).iterdir())[-1]
    content = bytearray(target.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    elif damage == "cut":
        target.write_bytes(content[:-1])
    else:
        target.unlink()
    message = {"flip": "was altered", "cut": "is torn", "remove": "is missing"}[damage]
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(directory)


def test_damage_to_the_manifest_is_found(recorded: tuple[Path, Influence, dict[str, torch.Tensor]]) -> None:
    manifest = recorded[0] / "manifest.json"
    content = json.loads(manifest.read_text())
    for altered, message in (
        ({**content, "optimizer": "os.system"}, "was altered"),
        ({**content, "format": "other 7"}, "has the format 'other 7'"),
        ([1, 2], "is torn"),
    ):
        manifest.write_text(json.dumps(altered))
        with pytest.raises(TrajectoryError, match=message):
            Trajectory.open(recorded[0])

    manifest.write_text(json.dumps(content)[:-20])
    with pytest.raises(TrajectoryError, match="is torn"):
        Trajectory.open(recorded[0])

    manifest.unlink()
    with pytest.raises(TrajectoryError, match="no trajectory"):
        Trajectory.open(recorded[0])


def test_another_model_is_refused(recorded: tuple[Path, Influence, dict[str, torch.Tensor]]) -> None:
    query = Query.outputs(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"0\.weight: recorded \[\[6, 4\], 'float64'\], model \[\[6, 4\], 'float32'\]"):
        explain(Trajectory.open(recorded[0]), make_job(dtype=torch.float32).model, query)


def test_changes_between_the_steps_do_not_break_the_replay(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 3)
    with torch.no_grad():
        job.model[0].weight.mul_(0.5)
    job.run(tracker, 3)
    tracker.finish()
    trajectory = Trajectory.open(tmp_path / "t")
    assert len(list(trajectory.steps())) == 6
    assert torch.equal(trajectory.state_dict(6)["0.weight"], job.model[0].weight)


def test_a_replay_that_misses_its_keyframe_says_so(
    recorded: tuple[Path, Influence, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = Trajectory.open(recorded[0])
    step = torch.optim.AdamW.step

    def inexact(error: float):  # type: ignore[no-untyped-def]
        def replayed(self, closure=None):  # type: ignore[no-untyped-def]
            step(self, closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(1 + error)

        return replayed

    # the proof of the single step would see it first
    monkeypatch.setattr("explaind_track.core.proof.require_explained", lambda *_: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", inexact(1e-9))
    with pytest.warns(ReplayWarning, match="other bits"):
        list(trajectory.steps())
    monkeypatch.setattr(torch.optim.AdamW, "step", inexact(1e-2))
    with pytest.raises(TrajectoryError, match="is off by"):
        list(trajectory.steps())


def test_a_killed_run_leaves_a_whole_trajectory(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from jobs import make_job\n"
        "job = make_job(); tracker = job.tracker(trajectory=sys.argv[1], keyframe_every=5)\n"
        "job.run(tracker, 100000)\n"
    )

    directory = tmp_path / "t"
    command = [sys.executable, "-c", script, str(directory)]
    process = subprocess.Popen(command, env=child_environment())

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and Manifest.read(directory, missing_ok=True).steps < 15:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()

    trajectory = Trajectory.open(directory)
    assert len(trajectory) >= 15
    assert len(list(trajectory.steps())) == len(trajectory)
    rows = [json.loads(line)["train/step"] for line in (directory / "history.jsonl").read_text().splitlines()[:-1]]
    assert rows == list(range(len(rows)))
    assert len(rows) >= len(trajectory) - 1
