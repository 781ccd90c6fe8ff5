"""The trajectory at W&B: sent while it grows, each file once; fetched by need, checked, resumed where it broke off."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import xarray as xr
from jobs import make_job, sample_loss
from servers import Server

from explaind_track import Trajectory, explain, log_rerun, log_result, open_influence, open_run, rerun
from explaind_track.errors import LoggingWarning, TrajectoryError
from explaind_track.record.remote import cache_directory, fetch_result
from explaind_track.record.schema import FORMAT
from explaind_track.what_if import Frozen

pytestmark = pytest.mark.usefixtures("closing_wandb")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the artifact for every new file."""
    monkeypatch.setattr("explaind_track.wandb_io.upload.POLL_SECONDS", 0.02)
    monkeypatch.setattr("explaind_track.wandb_io.upload.BATCH_BYTES", 1)
    monkeypatch.setattr("explaind_track.record.writer.SEGMENT_BYTES", 1000)


def train(directory: Path, steps: int, pause: float = 0.0, **options: Any) -> tuple[Any, Any, Any]:
    job, run = make_job(), open_run("project", directory, **options)
    tracker = job.tracker(run=run, trajectory=directory / "t", keyframe_every=4)
    for _ in range(steps):
        job.run(tracker, 1)
        time.sleep(pause)
    tracker.finish()
    return job, tracker, run


def name_of(run: Any, alias: str = "latest") -> str:
    return f"wandb:{run.entity}/project/trajectory-{run.id}:{alias}"


def same_files(one: Path, other: Path) -> bool:
    names = [path.relative_to(one) for path in one.rglob("*.*") if path.is_file()]
    return len(names) > 5 and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.usefixtures("eager")
def test_it_is_sent_while_it_grows_and_each_file_once(server: Server, tmp_path: Path) -> None:
    _, _, run = train(tmp_path, 12, pause=0.1)
    run.finish()

    collection = server.ask("state")["collections"][f"{run.entity}/project/trajectory-{run.id}"]
    assert len(collection["versions"]) >= 4
    assert {"latest", "final", "step-12"} <= collection["aliases"].keys()
    assert collection["aliases"]["final"] == collection["versions"][-1]

    sent = server.requests("PUT blob")
    for path in (tmp_path / "t").rglob("*.safetensors"):
        content = path.read_bytes()
        assert sent.count(f"PUT blob/{hashlib.md5(content).hexdigest()} {len(content)}") == 1

    artifact = wandb.Api().artifact(name_of(run).removeprefix("wandb:"))
    assert artifact.metadata["steps"] == 12
    assert artifact.metadata["finished"]
    assert artifact.metadata["optimizer"] == "torch.optim.adamw.AdamW"
    assert artifact.metadata["model"] == "torch.nn.modules.container.Sequential"
    assert artifact.metadata["format"] == FORMAT
    assert artifact.metadata["packages"].keys() == {"torch", "explaind_track"}
    assert artifact.metadata["digest"] == json.loads((tmp_path / "t" / "manifest.json").read_text())["digest"]
    assert same_files(Path(artifact.download(str(tmp_path / "fetched"))), tmp_path / "t")


@pytest.mark.usefixtures("eager")
def test_every_version_is_a_whole_trajectory(server: Server, tmp_path: Path) -> None:
    _, _, run = train(tmp_path, 9, pause=0.1)
    count = len(server.ask("state")["collections"][f"{run.entity}/project/trajectory-{run.id}"]["versions"])
    lengths = [len(list(Trajectory.open(name_of(run, f"v{number}")).steps())) for number in range(count)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 9


@pytest.mark.usefixtures("eager")
def test_only_what_a_window_needs_is_fetched_and_only_once(server: Server, tmp_path: Path) -> None:
    job, tracker, run = train(tmp_path, 12)
    trajectory = Trajectory.open(name_of(run))
    before = server.downloads()
    query = job.queries["query"]
    rule, parts = tracker.quadrature, tracker.parts("query")
    found = explain(trajectory, job.model, query, window=(5, 7), quadrature=rule, parts=parts, progress=False)
    live = tracker.influence("query").data["influence"].sel(step=[5, 6])
    xr.testing.assert_allclose(found.data["influence"], live, rtol=1e-12, atol=1e-15)
    fetched = server.downloads() - before
    assert fetched <= 3  # one keyframe, at most two segments, of 4 and 6
    again = Trajectory.open(name_of(run))
    before = server.downloads()
    list(again.steps(5, 7))
    assert server.downloads() == before
    kept = [path for path in cache_directory().rglob("files/*/*") if path.suffix == ""]
    assert len(kept) == fetched


@pytest.mark.usefixtures("eager")
def test_the_whole_decomposition_from_the_artifact_is_the_live_one(server: Server, tmp_path: Path) -> None:
    job, tracker, run = train(tmp_path, 11)
    server.faults(fail_downloads=0.3)
    query = job.queries["query"]
    rule, parts = tracker.quadrature, tracker.parts("query")
    found = explain(Trajectory.open(name_of(run)), job.model, query, quadrature=rule, parts=parts, progress=False)
    xr.testing.assert_allclose(found.data, tracker.influence("query").data, rtol=1e-9, atol=1e-12)


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    _, _, run = train(tmp_path, 3)
    trajectory = Trajectory.open(name_of(run))
    entry = trajectory.manifest.entries[0]
    content = (tmp_path / "t" / entry.path).read_bytes()
    part = cache_directory() / "files" / entry.sha256[:2] / f"{entry.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" + content[1:1000])
    with pytest.raises(TrajectoryError, match="is not what was written"):
        trajectory.file(entry)  # so the first bytes were those that had been there
    part.write_bytes(content[:1000])
    assert trajectory.file(entry).read_bytes() == content


def test_a_download_that_has_all_or_too_much_blocks_nothing(server: Server, tmp_path: Path) -> None:
    """The server answers 416 where nothing is left of a file."""
    _, _, run = train(tmp_path, 3)
    trajectory = Trajectory.open(name_of(run))
    entry = trajectory.manifest.entries[0]
    content = (tmp_path / "t" / entry.path).read_bytes()
    kept = cache_directory() / "files" / entry.sha256[:2] / entry.sha256
    part = kept.with_suffix(".part")
    part.parent.mkdir(parents=True)

    before = server.downloads()
    part.write_bytes(content)
    assert trajectory.file(entry).read_bytes() == content
    assert server.downloads() == before  # it was all there
    kept.unlink()
    part.write_bytes(content + b"more")
    assert trajectory.file(entry).read_bytes() == content
    kept.unlink()
    part.write_bytes(b"x" * len(content))
    with pytest.raises(TrajectoryError, match="is not what was written"):
        trajectory.file(entry)
    assert trajectory.file(entry).read_bytes() == content


def test_a_file_of_another_length_does_not_arrive(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explaind_track.record.remote.ATTEMPTS", 2)
    _, _, run = train(tmp_path, 3)
    trajectory = Trajectory.open(name_of(run))
    entry = trajectory.manifest.entries[0]
    content = (tmp_path / "t" / entry.path).read_bytes()
    blob = server.state / "blobs" / hashlib.md5(content).hexdigest()

    blob.write_bytes(content[:-10])  # the second attempt asks for what is behind it: 416
    with pytest.raises(TrajectoryError, match="does not arrive"):
        trajectory.file(entry)
    blob.write_bytes(content + bytes(10**6))
    assert trajectory.file(entry).read_bytes() == content  # what comes behind it is not taken


@pytest.mark.usefixtures("server")
def test_an_artifact_writes_nowhere_but_into_the_cache(tmp_path: Path) -> None:
    opened = open_run("project", tmp_path)
    (tmp_path / "evil").write_bytes(b"evil")
    made = wandb.Artifact("influence-evil", "influence")
    made.metadata = {"file": "evil", "sha256": "../../../../autostart/evil"}
    made.add_file(str(tmp_path / "evil"), "evil")
    opened.log_artifact(made).wait(30)
    opened.finish()
    before = {path for path in tmp_path.rglob("*") if cache_directory() not in path.parents}
    with pytest.raises(TrajectoryError, match="no result of this package"):
        open_influence(f"wandb:{opened.entity}/project/influence-evil:latest")
    assert {path for path in tmp_path.rglob("*") if cache_directory() not in path.parents} == before
    assert not list(cache_directory().rglob("*evil*"))


def test_what_was_altered_on_the_way_is_refused(server: Server, tmp_path: Path) -> None:
    _, _, run = train(tmp_path, 3)
    trajectory = Trajectory.open(name_of(run))
    entry = trajectory.manifest.entries[0]
    content = bytearray((tmp_path / "t" / entry.path).read_bytes())
    blob = server.state / "blobs" / hashlib.md5(content).hexdigest()
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(TrajectoryError, match="is not what was written"):
        list(trajectory.steps())
    with pytest.raises(TrajectoryError, match="gives no artifact"):
        Trajectory.open("wandb:dev/project/nothing")


def test_an_offline_run_needs_no_account_and_is_sent_whole_afterwards(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    _, tracker, run = train(tmp_path, 5, mode="offline")
    own = Path(run.settings.sync_dir)
    run.finish()
    assert tracker.staging_mb == 0
    assert len(Trajectory.open(own)) == 5
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    (tmp_path / "t").rename(tmp_path / "elsewhere")  # what W&B sends does not depend on it any more
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(own)], check=True, capture_output=True)
    artifact = wandb.Api().artifact(f"dev/project/trajectory-{run.id}:final")
    assert same_files(Path(artifact.download(str(tmp_path / "fetched"))), tmp_path / "elsewhere")


def test_an_offline_run_that_goes_on_is_open_too(tmp_path: Path) -> None:
    job, run = make_job(), open_run("project", tmp_path, mode="offline")
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=4)
    job.run(tracker, 6)
    assert len(Trajectory.open(run.settings.sync_dir)) == 4
    tracker.finish()


def test_a_run_is_gone_on_with_where_it_is(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "out" / "trajectory")
    job.run(tracker, 2)
    tracker.finish()
    assert len(Trajectory.open(tmp_path / "out")) == 2
    with pytest.raises(ValueError, match="go on with that"):
        make_job().tracker(trajectory=tmp_path / "out", resume=True)


def test_results_are_artifacts_that_descend_from_the_trajectory(server: Server, tmp_path: Path) -> None:
    _, tracker, run = train(tmp_path, 4)
    influence = tracker.influence("query")
    influence.save(tmp_path / "influence.safetensors")
    log_result(run, tmp_path / "influence.safetensors", "influence", uses=Trajectory.open(name_of(run)))
    found = open_influence(f"wandb:{run.entity}/project/influence-{run.id}")
    xr.testing.assert_identical(found.data, influence.data)

    for kind, name, content in (("masks", "masks.safetensors", b"masks"), ("figure", "figure.png", b"\x89PNG")):
        (tmp_path / name).write_bytes(content)
        log_result(run, tmp_path / name, kind, uses=name_of(run).removeprefix("wandb:"))
        assert fetch_result(f"{run.entity}/project/{kind}-{run.id}").read_bytes() == content

    this = wandb.Api().run(f"{run.entity}/project/{run.id}")
    assert {artifact.type for artifact in this.used_artifacts()} == {"trajectory"}
    assert {artifact.type for artifact in this.logged_artifacts()} == {"trajectory", "influence", "masks", "figure"}
    with pytest.raises(TrajectoryError, match="no result"):
        open_influence(name_of(run))


@pytest.mark.parametrize("local", [True, False])
def test_a_rerun_is_an_artifact_that_descends_from_the_run(server: Server, tmp_path: Path, local: bool) -> None:
    job, _, run = train(tmp_path, 6)
    run.finish()
    original = Trajectory.open(tmp_path / "t" if local else name_of(run))
    again = rerun(
        original, job.model, sample_loss, lambda index: (job.x[index], job.y[index]), progress=False,
        start=4, change=Frozen("0.*", window=(4, 6)), out=tmp_path / "again",
    )  # fmt: skip

    own = open_run("project", tmp_path / "own")
    name = log_rerun(own, again)
    own.finish()
    found = Trajectory.open(name)
    assert found.manifest.head["lineage"]["changes"] == ["Frozen(window=(4, 6), parameters='0.*')"]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in found.state_dict(6).items())
    artifact = wandb.Api().artifact(name.removeprefix("wandb:"))
    assert {key: artifact.metadata[key] for key in ("run", "start")} == {"run": original.fingerprint, "start": 4}
    assert str(tmp_path) not in json.dumps(artifact.metadata)
    used = wandb.Api().run(f"{own.entity}/project/{own.id}").used_artifacts()
    assert [one.name.split(":")[0] for one in used] == [f"trajectory-{run.id}"]


def test_a_rerun_without_a_record_is_not_logged(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 2)
    tracker.finish()
    data, original = (lambda index: (job.x[index], job.y[index])), Trajectory.open(tmp_path / "t")
    with pytest.raises(ValueError, match="pass out=DIRECTORY"):
        log_rerun(None, rerun(original, job.model, sample_loss, data, progress=False))  # type: ignore[arg-type]


def test_a_rerun_in_an_offline_run_is_sent_by_wandb_sync(server: Server, tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 3)
    tracker.finish()
    data, original = (lambda index: (job.x[index], job.y[index])), Trajectory.open(tmp_path / "t")
    again = rerun(original, job.model, sample_loss, data, out=tmp_path / "again", progress=False)
    own = open_run("project", tmp_path / "own", mode="offline")
    log_rerun(own, again)
    sent = Path(own.settings.sync_dir)
    own.finish()
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(sent)], check=True, capture_output=True)
    assert len(Trajectory.open(f"wandb:dev/project/rerun-{own.id}")) == 3


@pytest.mark.usefixtures("eager")
def test_a_slow_or_silent_server_holds_up_no_step(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explaind_track.wandb_io.upload.FINISH_SECONDS", 1.0)
    job, run = make_job(), open_run("project", tmp_path)
    tracker = job.tracker(run=run, trajectory=tmp_path / "t", keyframe_every=4)
    longest = 0.0
    for number in range(30):
        server.faults(latency_ms=3000 if number < 15 else 0, down=number >= 15)
        started = time.monotonic()
        job.run(tracker, 1)
        longest = max(longest, time.monotonic() - started)
    assert longest < 2.5  # one that waited for an answer took 3 s at least
    with pytest.warns(LoggingWarning, match=r"explaind-track sync .*/t`"):
        tracker.finish()
    assert len(Trajectory.open(tmp_path / "t")) == 30


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("status", [500, 429])
def test_failing_requests_are_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.faults(fail_rate=0.3, fail_status=status)
    _, _, run = train(tmp_path, 6)
    fetched = Trajectory.open(name_of(run, "final"))
    steps = zip(fetched.steps(), Trajectory.open(tmp_path / "t").steps(), strict=True)
    assert all(torch.equal(a.after.parameters["0.weight"], b.after.parameters["0.weight"]) for a, b in steps)
