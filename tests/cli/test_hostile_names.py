"""Names out of a record reach the terminal as words: no markup, no escape sequence, no foreign file stops anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from jobs import make_job
from rich.console import Console

from explaind_track.cli.live_view import Follower, curve, view
from explaind_track.cli.main import main
from explaind_track.record.history import append_row

HOSTILE = "run[/x] [bold]a\x1b]0;title\x07\x1b[2J\u202eb"
INERT = r"run[/x] [bold]a\x1b]0;title\x07\x1b[2J\u202eb"


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def recorded(directory: Path) -> Path:
    job = make_job()
    tracker = job.tracker(trajectory=directory)
    job.run(tracker, 2)
    tracker.finish()
    return directory


def test_names_are_neither_markup_nor_escape_sequences(tmp_path: Path) -> None:
    row = {"train/step": 1, f"kernel/{HOSTILE}": 1.0, f"residual/{HOSTILE}": 0.5, f"{HOSTILE}/loss": 2.0}
    console = Console(width=400, force_terminal=True)
    with console.capture() as shown:
        console.print(view(tmp_path / HOSTILE.replace("/", ""), [row], "stopped"))
    assert shown.get().count(INERT) == 3
    assert shown.get().count(INERT.replace("/", "")) == 1
    assert "\x07" not in shown.get()
    assert "\x1b[2J" not in shown.get()


def test_what_commands_say_is_inert(tmp_path: Path) -> None:
    directory = recorded(tmp_path / HOSTILE.replace("/", ""))
    (directory / "run.json").write_text(json.dumps({"entity": HOSTILE}))
    done = call("runs", tmp_path)  # the error tells of the path
    assert INERT.replace("/", "") in done.output
    assert "\x1b" not in done.output


def test_words_in_the_place_of_numbers_are_left_out(tmp_path: Path) -> None:
    row = {"train/step": 1, "kernel/a": "much", "loss/kernel/a": "x", "cost/seconds_training": "long", "residual/q": 1}
    append_row(tmp_path, row)
    assert call("show", tmp_path, "--once").exit_code == 0
    assert call("report", tmp_path).exit_code == 0


def test_runs_goes_on_over_foreign_manifests_and_links(tmp_path: Path) -> None:
    recorded(tmp_path / "ours")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text('{"name')
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "manifest.json").symlink_to(tmp_path / "ours" / "manifest.json")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "history.jsonl").symlink_to(tmp_path / "nowhere")

    done = call("runs", tmp_path, "--json")
    assert done.exit_code == 0
    assert [Path(run["run"]).name for run in json.loads(done.stdout) if run["steps"]] == ["ours"]
    assert sorted(line.split(":")[0].rsplit("/", 1)[1] for line in done.stderr.splitlines()) == [
        "app",
        "linked",
        "torn",
    ]


def test_a_run_that_vanishes_while_it_is_described_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def state_of(directory: Path) -> str:
        if directory.name == "a":
            shutil.rmtree(directory)
            (directory / "gone").stat()
        return "stopped"

    monkeypatch.setattr("explaind_track.cli.main.state_of", state_of)
    assert [Path(run["run"]).name for run in json.loads(call("runs", tmp_path, "--json").stdout)] == ["b"]


def test_reports_of_two_runs_lie_in_their_directories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        append_row(tmp_path / name, {"train/step": 0, f"kernel/{name}": 1.0})
        assert call("report", tmp_path / name).exit_code == 0
    assert "kernel/a" not in (tmp_path / "b" / "report.html").read_text()
    assert "<title>a</title>" in (tmp_path / "a" / "report.html").read_text()


def test_show_survives_a_torn_line_in_the_middle(tmp_path: Path) -> None:
    append_row(tmp_path, {"train/step": 0, "kernel/a": 1.0})
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b'{"train/step": 1, "kern\xff\n\x00\n[]\n')
    append_row(tmp_path, {"train/step": 2, "kernel/a": 1.0})
    follower = Follower(tmp_path)
    follower.read()
    assert [row["train/step"] for row in follower.rows] == [0, 2]
    assert call("show", tmp_path, "--once").exit_code == 0


def test_curves_of_numbers_at_the_end_of_their_range() -> None:
    assert curve([-1e308, 0.0, 1e308]) == "▁▄█"
