"""Compressed records: the same tensors bit for bit, in less room; what claims to be packed and is not is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import make_job
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from explaind_track import Trajectory
from explaind_track.core.tensors import same_bits
from explaind_track.errors import TrajectoryError
from explaind_track.record.files import PACKED, TensorFile, file_sha256, write_tensors
from explaind_track.record.packing import DTYPES, pack, signature_of, unpack


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=3), st.integers(0, 1000), st.booleans())
def test_every_bit_comes_back(name: str, shape: list[int], seed: int, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, DTYPES[name].itemsize), generator=generator, dtype=torch.uint8)
    tensor = (bits * (not sparse)).view(DTYPES[name]).reshape(shape)  # NaN and −0 among them
    assert same_bits(unpack(pack(tensor), signature_of(tensor)), tensor)


def recorded(directory: Path, **options: Any) -> Trajectory:
    job = make_job()
    tracker = job.tracker(trajectory=directory, keyframe_every=4, **options)
    job.run(tracker, 6)
    tracker.finish()
    return Trajectory.open(directory)


def test_a_compressed_record_gives_the_same_steps(tmp_path: Path) -> None:
    plain, packed = recorded(tmp_path / "plain"), recorded(tmp_path / "packed", compress=True)
    for one, other in zip(plain.steps(), packed.steps(), strict=True):
        for part, values in one.parts.items():
            assert all(torch.equal(value, other.parts[part][name]) for name, value in values.items())
    with safe_open(packed.file(packed.segments[0]), "pt") as file:
        assert "gradient:0:0.weight" in json.loads(file.metadata()[PACKED])

    # and is gone on with, packed or not
    for compress in (True, False):
        job = make_job()
        tracker = job.tracker(trajectory=tmp_path / "packed", compress=compress, resume=True, keyframe_every=4)
        job.run(tracker, 2)
        tracker.finish()
    assert len(list(Trajectory.open(tmp_path / "packed").steps())) == 10


def test_zeros_take_no_room(tmp_path: Path) -> None:
    tensors = {"gradient:0:weight": torch.zeros(1000, 100), "parameter:weight": torch.zeros(1000)}
    size, sha256 = write_tensors(tmp_path / "file", tensors, {}, compress=True)
    assert 4000 < size < 6000
    assert sha256 == file_sha256(tmp_path / "file")
    assert torch.equal(TensorFile(tmp_path / "file", 8 * 10**5)["gradient:0:weight"], torch.zeros(1000, 100))


BAD: dict[str, tuple[Any, str]] = {
    "another shape": ([[3, 1000], "float32"], "no tensor of shape"),
    "larger than any parameter": ([[10**9], "float32"], "is not packed"),
    "no type": ([[100], "int8"], "is not packed"),
    "no signature": ("all of it", "array"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_packed_as_it_says_is_refused(name: str, tmp_path: Path) -> None:
    told, match = BAD[name]
    write_tensors(tmp_path / "file", {"gradient:0:w": torch.randn(100)}, {}, compress=True)
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = {**file.metadata(), PACKED: json.dumps({"gradient:0:w": told})}
    tensors: dict[str, Tensor] = load_file(tmp_path / "file")
    save_file(tensors, tmp_path / "file", metadata)
    with pytest.raises((TrajectoryError, ValueError), match=match):
        _ = TensorFile(tmp_path / "file", 10**5)["gradient:0:w"]
