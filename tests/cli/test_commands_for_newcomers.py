"""The commands that a newcomer meets first: demo, doctor, completion; and several runs beside each other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from jobs import child_environment

from explaind_track import Trajectory, audit
from explaind_track.cli import demo as demo_module
from explaind_track.cli.comparison import HIGHEST, LOWEST, comparison_of, make_comparison, merged_rows
from explaind_track.cli.main import main
from explaind_track.record.history import read_rows


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "run"
    done = call("demo", directory, "--steps", 3, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["steps"], found["generalised_at"]) == (3, None)
    assert Path(found["report"]).read_text().startswith("<!doctype html>")
    return directory


def test_the_demo_leaves_a_run_that_other_commands_take(short_demo: Path) -> None:
    assert len(Trajectory.open(short_demo)) == 3
    assert audit(Trajectory.open(short_demo), **vars(demo_module.task("")), step=1, samples=1).ok
    done = call("explain", short_demo, "explaind_track.cli.demo:task", "--out", short_demo / "influence.safetensors")
    assert done.exit_code == 0, done.output
    done = call("demo", short_demo)
    assert (done.exit_code, "name a new directory: explaind-track demo DIRECTORY" in done.output) == (1, True)


@pytest.mark.slow
def test_the_demo_groks(tmp_path: Path) -> None:
    found = json.loads(call("demo", tmp_path / "run", "--json").stdout)
    assert found["memorised_at"] <= 60 < 200 < found["generalised_at"] < 600
    assert found["agreement"] > 0.99


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "explaind_track", "runs", str(tmp_path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "explaind-track demo" in done.stdout  # what to do where there is no run


def test_doctor_tells_what_is_there_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("explaind_track.cli.doctor._version", lambda name: None if name == "matplotlib" else "999")
    monkeypatch.setattr(
        "explaind_track.cli.doctor.requires", lambda _: ["torch>=2.8", "matplotlib>=3; extra == 'plots'"]
    )
    done = call("doctor", "--json")
    assert done.exit_code == 0, done.output
    checks = {check["what"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["extra plots"]["advice"] == "pip install 'explaind_track[plots]'"
    assert checks["torch"]["ok"]
    assert "offline" in checks["W&B"]["found"]

    monkeypatch.setattr("explaind_track.cli.doctor._version", lambda name: "1.0" if name == "torch" else None)
    done = call("doctor")
    assert done.exit_code == 1
    assert "pip install 'torch>=2.8'" in done.output
    assert "something has to be mended" in done.output

    monkeypatch.setattr("explaind_track.cli.doctor.requires", lambda _: [])
    monkeypatch.setattr("explaind_track.cli.doctor.os.access", lambda *_: False)
    done = call("doctor")
    assert (done.exit_code, "cannot be written" in done.output) == (1, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str) -> None:
    done = call("completion", shell)
    assert done.exit_code == 0, done.output
    assert "_EXPLAIND_TRACK_COMPLETE" in done.output


def test_a_shell_completes_commands_and_leaves_runs_to_paths() -> None:
    environment = {"_EXPLAIND_TRACK_COMPLETE": "bash_complete"}
    for words, position, expected in (
        ("explaind-track do", "1", "plain,doctor"),
        ("explaind-track show a", "2", "file,a"),
    ):
        variables = {**environment, "COMP_WORDS": words, "COMP_CWORD": position}
        done = CliRunner().invoke(main, [], env=variables, prog_name="explaind-track")
        assert expected in done.output


# ------------------------------------------------------------------------------------------------------ several runs


def rows(scale: float, steps: int = 3) -> list[dict[str, Any]]:
    keys = ("test/accuracy", "residual/test", "kernel/body", "kernel/total", "D/body", "loss/kernel/body")
    return [{"train/step": step, "words": "x", **dict.fromkeys(keys, scale * (step + 1))} for step in range(steps)]


def test_bands_reach_from_the_lowest_to_the_highest_run() -> None:
    merged = merged_rows({"a": rows(1.0), "b": rows(2.0), "c": rows(6.0, 2)})
    assert [row["train/step"] for row in merged] == [0, 1, 2]
    assert merged[1]["kernel/body"] == pytest.approx((2 + 4 + 12) / 3)
    assert (merged[1]["kernel/body" + LOWEST], merged[1]["kernel/body" + HIGHEST]) == (2.0, 12.0)
    assert merged[2]["kernel/body"] == pytest.approx(4.5)  # of those that have the step


def test_two_runs_are_told_by_their_difference_and_several_by_their_deviation() -> None:
    two = {row["number"]: row for row in comparison_of({"a": rows(1.0), "b": rows(2.5)})}
    assert two["last test/accuracy"]["difference"] == pytest.approx(4.5)
    assert two["median residual/test"]["values"] == {"a": 2.0, "b": 5.0}
    assert two["Σ kernel/body"]["mean"] == pytest.approx((6 + 15) / 2)
    several = {row["number"]: row for row in comparison_of({name: rows(float(name)) for name in "123"})}
    assert several["Σ D/body"]["deviation"] == pytest.approx(6.0)
    assert "difference" not in several["Σ D/body"]

    html = make_comparison({"a": rows(1.0), "<b>": rows(2.5)})
    assert "Differences" in html
    assert "<b>" not in html
    assert '"banded": true' in html
    assert "Differences" not in make_comparison({name: rows(float(name)) for name in "123"})
    with pytest.raises(ValueError, match="b has no rows yet"):
        make_comparison({"a": rows(1.0), "b": []})


def test_report_and_compare_take_several_runs(short_demo: Path, tmp_path: Path) -> None:
    done = call("compare", short_demo, short_demo)
    assert (done.exit_code, "named twice" in done.output) == (1, True)
    assert call("compare", short_demo).exit_code == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "trajectory").symlink_to(short_demo / "trajectory")
    done = call("compare", short_demo, short_demo / "trajectory" / ".." / "trajectory", "--json")
    assert done.exit_code == 0, done.output
    assert {row["difference"] for row in json.loads(done.stdout)} == {0.0}
    assert "difference" in call("compare", short_demo, short_demo / "trajectory").output

    target = tmp_path / "comparison.html"
    done = call("report", short_demo, short_demo / "trajectory", "--out", target)
    assert done.exit_code == 0, done.output
    assert f"training steps 0 to {read_rows(short_demo / 'trajectory')[-1]['train/step']}" in target.read_text()
