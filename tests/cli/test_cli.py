"""The command `explaind-track` on real runs, in processes of its own where it matters, and its report in a browser."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import xarray as xr
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from jobs import make_job, sample_loss
from rich.console import Console
from safetensors.torch import load_file
from servers import Server

from explaind_track import Influence, Quadrature, Task, Trajectory, explain, open_run
from explaind_track.analysis import parameter_scores, prune_masks, similarity
from explaind_track.cli.live_view import Follower, curve, view
from explaind_track.cli.main import main
from explaind_track.wandb_io.panels import Panels
from explaind_track.wandb_io.workspace import other_than

pytestmark = pytest.mark.usefixtures("closing_wandb")


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: Any) -> Any:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 9 steps without W&B, in `one/trajectory`."""
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "one" / "trajectory", keyframe_every=4, samples_every=8, map_queries=2)
    job.run(tracker, 9)
    tracker.finish()
    return tmp_path / "one"


def task(run: str) -> Task:
    job = make_job()

    def data(index: torch.Tensor) -> Any:
        return job.x[index], job.y[index]

    return Task(job.model, job.queries["query"], groups=1, sample_loss=sample_loss, data=data)


def lossless_task(run: str) -> Task:
    return replace(task(run), sample_loss=None)


def mapping_task(run: str) -> dict[str, Any]:
    return {"model": make_job().model}


def test_runs_tells_what_there_is_and_whether_it_goes_on(run: Path, tmp_path: Path) -> None:
    job = make_job("sgd")
    tracker = job.tracker(trajectory=tmp_path / "two")
    job.run(tracker, 2)
    shutil.copytree(tmp_path / "two", tmp_path / "killed")

    found = {Path(one["run"]).name: one for one in answer("runs", tmp_path)}
    assert {name: one["state"] for name, one in found.items()} == {
        "trajectory": "finished",
        "two": "running",
        "killed": "stopped",
    }
    assert found["trajectory"]["steps"] == 9
    assert found["two"]["optimizer"] == "SGD"

    tracker.finish()
    assert "9 steps" in call("runs", tmp_path).output
    (tmp_path / "empty").mkdir()
    assert "no run under" in call("runs", tmp_path / "empty").output


def test_a_run_is_listed_once_though_wandb_has_it_too(tmp_path: Path) -> None:
    job, opened = make_job(), open_run("project", tmp_path, mode="offline")
    tracker = job.tracker(run=opened, trajectory=tmp_path / "t")
    job.run(tracker, 2)
    tracker.finish()
    assert len(Trajectory.open(opened.settings.sync_dir)) == 2
    assert [Path(one["run"]).name for one in answer("runs", tmp_path)] == ["t"]
    shutil.rmtree(tmp_path / "t")
    assert [one["steps"] for one in answer("runs", tmp_path)] == [2]


def test_show_draws_the_last_step_and_follows_the_record(run: Path) -> None:
    assert answer("show", run)["row"]["train/step"] == 8
    done = call("show", run, "--once")
    assert done.exit_code == 0, done.output
    for word in ("finished", "step 8", "residual/query", "steps/s", "kernel", "total"):
        assert word in done.output
    assert "step 8" in call("show", run).output  # it does not wait for a run that has ended
    follower = Follower(run / "trajectory")
    assert follower.read()
    assert not follower.read()
    panels = Panels(None, run / "trajectory")
    panels.log({"train/step": 9})
    with (run / "trajectory" / "history.jsonl").open("a") as file:
        file.write('{"train/st')
    assert follower.read()
    assert [row["train/step"] for row in follower.rows] == list(range(10))


def test_a_long_record_is_followed_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explaind_track.cli.live_view.TAIL_BYTES", 100)
    for step in range(50):
        Panels(None, tmp_path).log({"train/step": step})
    follower = Follower(tmp_path)
    follower.read()
    found = [row["train/step"] for row in follower.rows]
    assert found == list(range(found[0], 50))
    assert 2 < len(found) < 10


def test_show_keeps_the_last_step_that_was_explained() -> None:
    explained = {"train/step": 0, "kernel/decoder": 0.25, "kernel/total": 0.25, "residual/query": 0.125}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(view(Path("t"), [explained, {"train/step": 1, "residual/nonfinite": 2}], "running"))
    assert "decoder" in shown.get()
    assert "nonfinite" not in shown.get()


def test_curves_go_from_the_smallest_to_the_largest() -> None:
    assert curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert curve([3.0, 3.0]) == "▁▁"
    assert len(curve(list(range(1000)))) == 12


def test_verify_finds_what_was_altered(run: Path) -> None:
    assert answer("verify", run, "--replay") == {"run": str(run), "steps": 9, "files": 7, "replayed": True}
    target = sorted((run / "trajectory" / "steps").iterdir())[0]
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    done = call("verify", run)
    assert done.exit_code == 1
    assert "was altered" in done.output


def test_audit_recomputes_a_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = answer("audit", run, "test_cli:task", "--step", "4", "--samples", "2")
    assert (content["ok"], content["step"]) == (True, 4)
    assert len([finding for finding in content["findings"] if finding["what"].startswith("sample ")]) == 2

    monkeypatch.setattr("explaind_track.analysis.step_audit.gauss_legendre", lambda nodes: ((0.5, 1.01),))
    done = call("audit", run, "test_cli:task")
    assert done.exit_code == 1
    assert "WRONG kernel through" in done.output


def test_explain_is_the_function_of_that_name(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "influence.safetensors"
    settings = ("keep=[query,output]", "window=[2,7]", "nodes=3", "close=true")
    content = answer("explain", run, "test_cli:task", *settings, "--out", out)
    job = make_job()
    expected = explain(
        Trajectory.open(run), job.model, job.queries["query"], keep=("query", "output"), window=(2, 7),
        quadrature=Quadrature.fixed(3), close=True, groups=1, progress=False,
    )  # fmt: skip
    xr.testing.assert_identical(Influence.load(out).data, expected.data)
    assert content["sizes"]["query"] == 5
    for arguments, code, message in (
        (("test_cli:nothing",), 1, "names no function"),
        (("no.module:task",), 1, "names no function"),
        (("test_cli:task", "node=3"), 2, "no setting node"),
        (("test_cli:task", "nodes=many"), 2, "nodes=8"),
        (("test_cli:task", "window=5"), 2, "window=[0,500]"),
        (("test_cli:task", "keep=step"), 2, "keep=[step,group]"),
        (("test_cli",), 1, "module:function"),
        (("test_cli:mapping_task",), 1, "returned a dict, where an explaind_track.Task was expected"),
        (("test_cli:task", "window=[0,99]"), 1, "the run has 9 steps"),
    ):
        done = call("explain", run, *arguments, "--out", out)
        assert done.exit_code == code
        assert message in done.output


def test_prune_and_similarity_are_the_functions_of_those_names(run: Path, tmp_path: Path) -> None:
    job, trajectory = make_job(), Trajectory.open(run)
    query, rule = job.queries["query"], Quadrature.fixed(2)
    masks = tmp_path / "masks.safetensors"
    content = answer("prune", run, "test_cli:task", "nodes=2", "--keep", 0.4, "--exclude", "2.*", "--out", masks)
    scores = parameter_scores(trajectory, job.model, query, quadrature=rule, progress=False)
    expected = prune_masks({name: value.abs() for name, value in scores.items()}, 0.4, exclude=("2.*",))
    found = load_file(masks)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert content["sparsity"] == pytest.approx(0.6)
    assert 0 <= content["agreement"] <= 1

    alike = tmp_path / "similarity.safetensors"
    content = answer("similarity", run, "test_cli:task", "nodes=2", "window=[0,4]", "--out", alike)
    wanted = similarity(
        trajectory, job.model, query, sample_loss=sample_loss, data=task("").data, groups=1, window=(0, 4),
        quadrature=rule, progress=False,
    )  # fmt: skip
    assert torch.equal(load_file(alike)["similarity"], torch.from_numpy(wanted.values))
    assert content["groups"] == wanted["group"].values.tolist()
    assert call("prune", run, "test_cli:task", "--keep", 2).exit_code == 2
    done = call("similarity", run, "test_cli:lossless_task", "--out", alike)
    assert (done.exit_code, "a Task without sample_loss=" in done.output) == (1, True)


def test_pull_makes_a_directory_of_its_own(server: Server, tmp_path: Path) -> None:
    job, opened = make_job(), open_run("project", tmp_path)
    tracker = job.tracker(run=opened, trajectory=tmp_path / "t", keyframe_every=4, samples_every=3, map_queries=2)
    job.run(tracker, 6)
    tracker.finish()
    opened.finish()

    name = f"dev/project/trajectory-{opened.id}:step-6"
    assert answer("pull", name, tmp_path / "here")["steps"] == 6
    for path in (tmp_path / "here").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "t" / path.relative_to(tmp_path / "here")).read_bytes()
    assert answer("verify", f"wandb:{name}", "--replay")["steps"] == 6
    assert (tmp_path / "here" / "history.jsonl").is_file()
    assert len(list((tmp_path / "here" / "media").iterdir())) == 4

    done = call("pull", name, tmp_path / "here")
    assert (done.exit_code, "not empty" in done.output) == (1, True)
    done = call("pull", "dev/project/other", tmp_path / "there")
    assert (done.exit_code, "gives no artifact" in done.output) == (1, True)
    assert answer("sync", tmp_path / "t")["rows_sent"] == 0


def test_misuse_and_missing_runs_are_told_apart(tmp_path: Path) -> None:
    for arguments, code, message in (
        (("show", tmp_path), 1, "holds no run"),
        (("sync", tmp_path), 1, "holds no run"),
        (("report", tmp_path), 1, "holds no run"),
        (("show", "wandb:entity/project/name"), 1, "explaind-track pull wandb:entity/project/name"),
        (("workspace", "entity"), 1, "ENTITY/PROJECT"),
        (("show",), 2, "Missing argument"),
        (("nothing",), 2, "No such command"),
    ):
        done = call(*arguments)
        assert (done.exit_code, message in done.output) == (code, True), done.output

    commands = re.findall(r"^  (\w+)  ", call("--help").output, re.MULTILINE)
    assert {"runs", "show", "pull", "explain", "prune", "similarity", "report", "sync", "verify", "workspace"} <= set(
        commands
    )
    assert all(call(command, "--help").exit_code == 0 for command in commands)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package that makes it
def test_the_workspace_is_saved_with_our_panels_and_a_report(server: Server) -> None:
    pytest.importorskip("wandb_workspaces")
    assert call("workspace", "dev/project").exit_code == 1  # nothing has run there
    wandb.Api().create_project("project", "dev")
    urls = answer("workspace", "dev/project")
    assert "dev/project" in urls["url"]
    assert "dev/project/reports/" in urls["report"]

    report, view = server.ask("state")["views"].values()
    assert report["type"] == "runs"
    blocks = json.loads(report["spec"])["blocks"]
    grids = [block["metadata"]["panelBankSectionConfig"]["panels"] for block in blocks if block["type"] == "panel-grid"]
    drawn = [panel["config"] for panels in grids for panel in panels]
    (shares,) = [one for one in drawn if one.get("plotType") == "pct-area"]
    assert re.search(shares["metricRegex"], "kernel/head")
    assert not re.search(shares["metricRegex"], "kernel/total")
    (points,) = [one for one in drawn if "yAxis" in one and "total_mean" in str(one["yAxis"])]
    assert (points["xAxis"], points["yAxis"]) == ("summary:reg/total_mean", "summary:kernel/total_mean")

    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    panels = [panel for section in sections for panel in section["panels"]]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert {line["xAxis"] for line in lines} == {"train/step"}

    keys = ["kernel/head", "kernel/total", "reg/body", "D/tot", "loss/kernel/head", "residual/query", "residual/nodes"]
    keys += ["loss/kernel/type/norm", "loss/kernel/layer/layer.07", "loss/share/momentum", "code/change"]
    shown = {key: [line["chartTitle"] for line in lines if re.search(line["metricRegex"], key)] for key in keys}
    assert shown == {
        "kernel/head": ["of the training samples (kernel)", "shares of the groups in it"],
        "kernel/total": ["importance of all groups together"],
        "reg/body": ["of weight decay"],
        "D/tot": ["kernel minus regularization (D), by group"],
        "loss/kernel/head": ["through the training samples"],
        "residual/query": ["residual"],
        "residual/nodes": [],
        "loss/kernel/type/norm": ["what the training samples did to the loss, by type"],
        "loss/kernel/layer/layer.07": ["the same by layer"],
        "loss/share/momentum": ["shares of the step's gradients, of momentum and of weight decay"],
        "code/change": ["change of each loss"],
    }


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4), st.text("abc", min_size=1, max_size=5))
def test_the_pattern_takes_every_string_but_those(words: list[str], string: str) -> None:
    assert (re.fullmatch(other_than(*words), string) is None) == (string in words)
