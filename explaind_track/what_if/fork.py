"""A record that begins as another one: its files up to a step, which a rerun goes on from."""

import os
import shutil
from pathlib import Path

from explaind_track.record.manifest import STEPS, Entry
from explaind_track.record.schema import outside_tensors
from explaind_track.record.trajectory import Trajectory


def fork(trajectory: Trajectory, at: int, directory: Path) -> list[Entry]:
    """Puts the record of the steps before `at` into another directory: files that are the same, by a link where the
    file system has them. Returns their entries.

    Raises FileExistsError if the directory holds anything.
    """
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; name a new directory for the rerun, or remove that one first")

    entries = []
    for entry in trajectory.manifest.entries:
        if entry.last <= at:
            target = directory / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(trajectory.file(entry), target)
            entries.append(entry)
        elif entry.first < at:  # a segment that goes on behind
            tensors, header = trajectory.read_segment(entry).before(at)
            tensors |= outside_tensors(at, trajectory.outside(at))
            entries.append(Entry.write(directory, STEPS, entry.first, at, tensors, header))
    return entries


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
