"""Whatever happens to a stored file is found, before its content is used, and without taking memory on its word."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forging import refit
from jobs import make_job

from explaind_track import Influence, Trajectory
from explaind_track.errors import TrajectoryError


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded") / "t"
    job = make_job()
    tracker = job.tracker(trajectory=directory, keyframe_every=4)
    job.run(tracker, 11)
    tracker.finish()
    return directory


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def overwrite(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    run = chance.randbytes(chance.randint(1, 64))
    content[start : start + len(run)] = run


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def extend(content: bytearray, chance: random.Random) -> None:
    content += chance.randbytes(chance.randint(1, 64))


def swap(content: bytearray, chance: random.Random) -> None:
    """Two stretches change places."""
    half = len(content) // 2
    start, other, length = chance.randrange(half), half + chance.randrange(half), chance.randint(1, 32)
    one, two = content[start : start + length], content[other : other + length]
    content[start : start + len(two)], content[other : other + len(one)] = two[: len(two)], one[: len(one)]


DAMAGE: list[Callable[[bytearray, random.Random], None]] = [flip, overwrite, truncate, extend, swap]


def damage(directory: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    files = [directory / "manifest.json", *sorted(directory.rglob("*.safetensors"))]
    contents = {path: path.read_bytes() for path in files}

    for trial in range(count):
        path = chance.choice(files)
        content = bytearray(contents[path])
        chance.choice(DAMAGE)(content, chance)
        if bytes(content) == contents[path]:
            continue

        path.write_bytes(content)
        try:
            with pytest.raises(TrajectoryError):
                Trajectory.open(directory)
        except BaseException:
            print(f"trial {trial}: {path}")
            raise
        path.write_bytes(contents[path])
    Trajectory.open(directory)


def test_random_damage_is_found(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "t")
    damage(tmp_path / "t", 400, 0)


@pytest.mark.slow
def test_ten_thousand_damages_are_found(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "t")
    damage(tmp_path / "t", 10_000, 1)


def test_a_damaged_influence_is_found(tmp_path: Path) -> None:
    chance, path = random.Random(3), tmp_path / "influence.safetensors"
    job = make_job()
    tracker = job.tracker()
    job.run(tracker, 3)
    tracker.influence("query", ("query", "output")).save(path)
    content = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(content)
        chance.choice(DAMAGE)(damaged, chance)
        if bytes(damaged) == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="influence"):
            Influence.load(path)


def test_forged_files_do_no_harm(recorded: Path, tmp_path: Path) -> None:
    """The header of a file says anything: it is refused as an error of the trajectory, or means something."""
    chance = random.Random(2)
    for trial in range(150):
        directory = tmp_path / f"{trial}"
        shutil.copytree(recorded, directory)
        path = chance.choice(sorted(directory.rglob("*.safetensors")))

        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        head = content[: 8 + length]
        chance.choice([flip, overwrite])(head, chance)
        path.write_bytes(head + content[8 + length :])
        refit(directory, str(path.relative_to(directory)))

        try:
            for step in Trajectory.open(directory).steps():
                assert step.number < 11
        except TrajectoryError:
            pass
        shutil.rmtree(directory)
