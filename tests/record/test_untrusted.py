"""Nothing that comes from a file or a server is trusted: names that lead elsewhere, links, numbers that cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forging import forge_entry, read_manifest, seal
from jobs import make_job

from explaind_track import Trajectory
from explaind_track.errors import TrajectoryError
from explaind_track.record.history import append_row, read_rows, steps_logged
from explaind_track.record.media import media_of
from explaind_track.record.run_directory import read_tie
from explaind_track.wandb_io.artifacts import trajectory_version

KEYFRAME, SEGMENT = "keyframes/00000000.safetensors", "steps/00000000.safetensors"

TIE = {"entity": "me", "project": "p", "id": "abc", "name": "a run", "offline": True, "directory": "/w/x"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded") / "t"
    job = make_job()
    tracker = job.tracker(trajectory=directory, keyframe_every=4)
    job.run(tracker, 6)
    tracker.finish()
    return directory


@pytest.fixture
def directory(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize(
    "path",
    ["../outside.safetensors", "/etc/passwd", "steps/../../x.safetensors", "steps/a", KEYFRAME + "\n", 3, None],
)
def test_names_that_lead_elsewhere_are_refused(path: Any, directory: Path) -> None:
    forge_entry(directory, KEYFRAME, path=path)
    with pytest.raises(TrajectoryError, match=r"`files` in .* is not what this package writes: .*path"):
        Trajectory.open(directory)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (KEYFRAME, {"sha256": "../../.config/autostart/evil"}),
        (KEYFRAME, {"sha256": "A" * 64}),
        (KEYFRAME, {"first": 1, "last": 1}),  # its name says 0
        (KEYFRAME, {"last": 4}),
        (KEYFRAME, {"size": -1}),
        (KEYFRAME, {"size": True}),
        (KEYFRAME, {"more": 1}),
        (SEGMENT, {"last": 10**12}),
        (SEGMENT, {"last": 5}),  # the next one begins at 4
        (SEGMENT, {"last": 3}),
        (SEGMENT, {"path": KEYFRAME.replace("0000000", "00000000")}),
    ],
)
def test_entries_that_cannot_be_are_refused(file: str, values: dict[str, Any], directory: Path) -> None:
    forge_entry(directory, file, **values)
    with pytest.raises(TrajectoryError):
        Trajectory.open(directory)


def test_a_segment_has_the_steps_that_its_manifest_says(directory: Path) -> None:
    content = read_manifest(directory)
    content["files"] = [entry for entry in content["files"] if entry["first"] == 0]
    seal(directory, content)
    forge_entry(directory, SEGMENT, last=7)
    with pytest.raises(TrajectoryError, match="has 4 steps, where its manifest says 7"):
        list(Trajectory.open(directory).steps())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameters", {"0.weight": [[2**70], "float32"]}),
        ("parameters", {"0.weight": [[-1], "float32"]}),
        ("parameters", {"0.weight": "float32"}),
        ("aliases", {"other": "no tensor"}),
        ("saved", ["no tensor"]),
        ("packages", []),
        ("optimizer", None),
    ],
)
def test_heads_that_cannot_be_are_refused(key: str, value: Any, directory: Path) -> None:
    seal(directory, {**read_manifest(directory), key: value})
    with pytest.raises(TrajectoryError, match="is not what this package writes"):
        Trajectory.open(directory)


def test_a_keyframe_has_the_shapes_that_its_manifest_says(directory: Path) -> None:
    content = read_manifest(directory)
    name = next(iter(content["parameters"]))
    content["parameters"][name][0] = [3, 1]
    seal(directory, content)
    with pytest.raises(TrajectoryError, match="has other parameters than its manifest says"):
        list(Trajectory.open(directory).steps())


@pytest.mark.parametrize("name", [KEYFRAME, "keyframes", "manifest.json", "history.jsonl", "run.json"])
def test_links_are_followed_neither_on_reading_nor_on_sending(name: str, directory: Path, tmp_path: Path) -> None:
    append_row(directory, {"train/step": 6, "picture": b"a picture"})
    (directory / "run.json").write_text(json.dumps(TIE))
    (directory / name).rename(tmp_path / "elsewhere")
    (directory / name).symlink_to(tmp_path / "elsewhere")

    def read() -> None:
        Trajectory.open(directory)
        read_rows(directory)
        read_tie(directory)

    def send() -> None:
        read_tie(directory)
        trajectory_version(directory, "trajectory", final=True)

    for use in (read, send):
        with pytest.raises(TrajectoryError, match="is a link, which leads out"):
            use()


def test_a_linked_picture_is_not_sent(directory: Path, tmp_path: Path) -> None:
    written = append_row(directory, {"train/step": 6, "picture": b"a picture"})["picture"]
    assert media_of(directory) == [f"media/{written.name}"]
    (directory / "media" / "secret.png").symlink_to(tmp_path)  # no name of ours: left alone
    assert media_of(directory) == [f"media/{written.name}"]
    written.rename(tmp_path / "secret")
    written.symlink_to(tmp_path / "secret")
    with pytest.raises(TrajectoryError, match="is a link"):
        trajectory_version(directory, "trajectory", final=True)


@pytest.mark.parametrize(
    "line",
    [
        '{"train/step": -1}',
        '{"train/step": "<b>"}',
        '{"train/step": true}',
        '{"train/step": 1e400}',
        '{"train/step": 1, "kernel/a": NaN}',
        '{"train/step": 1, "kernel/a": [1]}',
        '{"train/step": 1, "kernel/a": 1' + "0" * 400 + "}",
        '{"train/step": 1, "samples/map": {"picture": "../../etc/passwd"}}',
        '{"train/step": 1, "samples/table": {"columns": ["a"], "data": [[1, 2]]}}',
        '{"train/step": 1, "samples/table": {"columns": ["a"], "data": [[{"picture": "media/a.png"}]]}}',
    ],
)
def test_rows_that_cannot_be_are_refused_by_their_line(line: str, tmp_path: Path) -> None:
    append_row(tmp_path, {"train/step": 0})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TrajectoryError, match=r"line 2 of .*history\.jsonl is not what this package writes"):
        read_rows(tmp_path)


def test_a_step_of_more_digits_than_a_number_may_have_is_a_torn_one(tmp_path: Path) -> None:
    append_row(tmp_path, {"train/step": 0})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"train/step": ' + "9" * 5000 + "}\n")
    assert steps_logged(tmp_path) == {0}
    assert [row["train/step"] for row in read_rows(tmp_path)] == [0]


@pytest.mark.parametrize("field", ["entity", "project", "id"])
def test_a_wandb_run_has_plain_names(field: str, tmp_path: Path) -> None:
    for value, fits in (("one-2_3", True), ("../..", False), ("a/b", False), (3, False), ("a\n", False)):
        (tmp_path / "run.json").write_text(json.dumps({**TIE, field: value}))
        if fits:
            assert read_tie(tmp_path) is not None
            continue
        with pytest.raises(TrajectoryError, match="does not say which W&B run this is"):
            read_tie(tmp_path)
