"""What tables of samples show: labels, predictions, and whatever `render=` gives."""

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import wandb
from jobs import make_job, sample_loss

from explaind_track.cli.report import make_report
from explaind_track.errors import LoggingWarning
from explaind_track.record.history import SAMPLES, read_rows
from explaind_track.record.media import from_json, media_of
from explaind_track.tracking.rendering import cell_of
from explaind_track.wandb_io.media import for_wandb


def pixels(value: Any) -> Any:
    content = cell_of(value)
    assert isinstance(content, bytes)
    return np.asarray(PIL.Image.open(io.BytesIO(content))).tolist()


def test_pictures_are_scaled_by_what_they_hold() -> None:
    assert pixels(np.array([[0.0, 0.5], [1.0, 0.2]])) == [[0, 128], [255, 51]]
    assert pixels(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)) == [[0, 255]]
    assert pixels(np.array([[0, 7], [255, 1]])) == [[0, 7], [255, 1]]
    assert pixels(np.array([[0, 1]], dtype=np.uint8)) == [[0, 1]]
    assert pixels(np.array([[True, False]])) == [[255, 0]]
    assert pixels(np.array([[0.0, 255.0]])) == [[0, 255]]
    assert pixels(np.array([[-1.0, 0.0, 1.0]])) == [[0, 128, 255]]
    assert pixels(np.zeros((2, 2))) == [[0, 0], [0, 0]]
    assert pixels(torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 1, 2)) == [[[255, 0, 0], [255, 0, 0]]]
    assert pixels(torch.zeros(1, 2, 3)) == [[0, 0, 0], [0, 0, 0]]
    assert pixels(PIL.Image.new("L", (2, 1), 9)) == [[9, 9]]


def test_words_and_numbers_are_shown_as_they_are() -> None:
    assert [cell_of(value) for value in ("a text", 3, torch.tensor(0.5), None)] == ["a text", 3, 0.5, None]


def heard(value: Any) -> tuple[int, int, list[int]]:
    content = cell_of(value)
    assert isinstance(content, bytes)
    with wave.open(io.BytesIO(content)) as file:
        frames = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return file.getframerate(), file.getnchannels(), frames.tolist()


def test_sounds_are_waves_of_16_bits() -> None:
    assert heard((8000, np.array([0.0, 0.5, -1.0]))) == (8000, 1, [0, 16384, -32767])
    assert heard((8000, np.array([0.0, 2.0, -4.0]))) == (8000, 1, [0, 16384, -32767])  # too loud
    assert heard((16, np.array([1, -5], dtype=np.int16))) == (16, 1, [1, -5])
    assert heard((16, np.array([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))) == (16, 2, [32767, 0, 0, -32767, 0, 0])
    assert heard((16, torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))) == (16, 2, [32767, 0, 0, -32767, 0, 0])
    for wrong in ((0, np.zeros(3)), (8000, np.array([np.nan])), (8000, np.zeros(0)), (8000, "a"), (1, 2, 3)):
        with pytest.raises((TypeError, ValueError)):
            cell_of(wrong)


def test_media_of_wandb_are_what_they_hold(tmp_path: Path) -> None:
    content = cell_of((8000, np.zeros(4)))
    assert isinstance(content, bytes)
    (tmp_path / "a.wav").write_bytes(content)
    assert cell_of(wandb.Audio(str(tmp_path / "a.wav"))) == content
    assert pixels(wandb.Image(PIL.Image.new("L", (2, 1), 9))) == [[9, 9]]


def test_sounds_are_kept_and_shown(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path, samples_every=1, render=lambda index: (8000, np.full(4, index / 99)))
    job.run(tracker, 1)
    tracker.finish()
    (row,) = read_rows(tmp_path)
    place = row[SAMPLES]["columns"].index("audio")
    names = {line[place]["sound"] for line in row[SAMPLES]["data"]}
    assert names == set(media_of(tmp_path))
    assert len(names) == 8

    table = for_wandb(from_json(row, tmp_path))[SAMPLES]
    assert all(isinstance(line[place], wandb.Audio) for line in table.data)
    assert isinstance(for_wandb({"a": cell_of((8000, np.zeros(4)))})["a"], wandb.Audio)
    assert make_report([row], {}, "run", directory=tmp_path).count("<audio controls") == 8


@pytest.mark.parametrize(
    "value", [np.zeros(3), np.full((2, 2), np.nan), np.array([[0, 300]]), np.zeros((5, 4, 7)), object()], ids=range(5)
)
def test_what_is_no_picture_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        cell_of(value)


def test_a_picture_that_fails_leaves_its_row(tmp_path: Path) -> None:
    job = make_job()

    def render(index: int) -> Any:
        if index % 2:
            raise OSError(f"no file of {index}")
        return f"sample {index}"

    tracker = job.tracker(trajectory=tmp_path, samples_every=1, render=render)
    expected = sample_loss(job.model, (job.x, job.y)).detach()
    scores = job.model(job.x)
    with pytest.warns(LoggingWarning, match="no file of") as told:
        job.run(tracker, 1)
    assert len([one for one in told if one.category is LoggingWarning]) == 1
    tracker.finish()
    (row,) = read_rows(tmp_path)
    table = [dict(zip(row[SAMPLES]["columns"], line, strict=True)) for line in row[SAMPLES]["data"]]
    assert len(table) == 8
    for line in table:
        index = line["sample"]
        assert line["rendered"] == (None if index % 2 else f"sample {index}")
        assert line["label"] == int(job.y[index])
        assert line["prediction"] == int(scores[index].argmax())
        assert line["loss"] == pytest.approx(float(expected[index]))
