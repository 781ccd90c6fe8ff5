"""The record of a run whose parameters are in pieces: keyframes by `torch.distributed.checkpoint`, and going on there.

Every process calls everything here, in the same order. `keyframe_list` says what is in the files.
"""

import shutil
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from explaind_track.checkpoints.distributed_files import PlainPlanner, PlainReader, shapes_in
from explaind_track.core.modules import buffers_of
from explaind_track.core.observer import StepObserver
from explaind_track.core.rng import random_state, set_random_state
from explaind_track.core.shards import is_piece, local
from explaind_track.core.step import State, Step
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.errors import ResumeWarning, TrajectoryError
from explaind_track.record.files import Lock, make_directory
from explaind_track.record.history import cut_history, steps_logged
from explaind_track.record.keyframe_list import FORMAT, KeyframeEntry, KeyframeList
from explaind_track.record.run_directory import is_finished
from explaind_track.record.schema import checkpoint_tensors, head_of, keyframe_header
from explaind_track.tracking.ddp import Ranks


class ShardedWriter:
    """Writes a keyframe every so many steps, and one at the end; the steps between are in the rows alone."""

    keeps_gradients = False

    def __init__(
        self,
        directory: str | PathLike[str],
        model: nn.Module,
        observer: StepObserver,
        ranks: Ranks,
        every: int,
        begun: KeyframeList | None = None,
    ) -> None:
        """begun: the record that is gone on with; None: it begins here.

        Raises FileExistsError, on rank zero, if one begins in a directory that holds anything; TrajectoryError if
        another process is writing there.
        """
        self.directory = Path(directory)
        self._model, self._observer, self._ranks, self._every = model, observer, ranks, every
        self._list = begun or KeyframeList({**head_of(model, observer), "format": FORMAT})
        self._lock: Lock | None = None
        ranks.at_zero(lambda: self._begin(is_new=begun is None))

    def _begin(self, is_new: bool) -> None:
        if is_new and self.directory.exists() and any(self.directory.iterdir()):
            raise FileExistsError(
                f"{self.directory} is not empty; name a new directory, remove that one first, or go on with the run in "
                "it by Tracker(…, resume=True)"
            )
        make_directory(self.directory)
        self._lock = Lock(self.directory)
        self._list.write(self.directory)

    def begin(self, number: int, buffers: Tensors) -> None:
        """As step `number` begins: writes a keyframe where one is due."""
        if number % self._every == 0 and all(entry.number != number for entry in self._list.keyframes):
            self._write(number)

    def pass_over(self, number: int, buffers: Tensors) -> None:
        """An interrupted step may have come to some processes and not to others. Raises RuntimeError."""
        raise RuntimeError(
            "a step was interrupted once the optimizer had begun to take it, on this process or another, so that the "
            "pieces of the parameters may be of different steps: end the run, and go on with resume=True"
        )

    def before(self, number: int) -> None:
        pass

    def add(self, step: Step, buffers_moved: bool, auxiliary: Mapping[str, Tensors]) -> None:
        pass

    def reach(self, number: int) -> None:
        pass

    def flush(self, number: int) -> None:
        pass

    def leave(self) -> None:
        """As the process goes: what the others do just now, nobody knows."""

    def close(self, number: int) -> None:
        """Ends the record behind step number − 1, with a keyframe."""
        if all(entry.number != number for entry in self._list.keyframes):
            self._write(number)
        self.release()

    def release(self) -> None:
        """Lets other processes write here."""
        if self._lock is not None:
            self._lock.release()

    def _write(self, number: int) -> None:
        state: dict[str, dict[str, Any]] = keyframe_header(self._observer, continues=True)["state"]
        tensors: dict[str, Tensor] = checkpoint_tensors(
            self._observer, State(self._observer.parameters, buffers_of(self._model))
        )
        tensors |= _share_tensors(self._observer)
        assert self._ranks.shards is not None  # else nobody makes this writer
        own = random_state(self._ranks.shards.device).items()
        tensors |= {f"random:{self._ranks.rank}:{device}": value for device, value in own}

        entry = KeyframeEntry(number, self._ranks.count, state, {})
        folder = self.directory / entry.folder
        self._ranks.at_zero(lambda: _make_empty(folder))
        try:
            save(dict(tensors), storage_writer=FileSystemWriter(folder))
        except (CheckpointException, OSError) as error:
            raise TrajectoryError(f"could not write {folder}: {error}. The keyframes before are whole") from error
        self._ranks.at_zero(lambda: self._enter(number, state))
        self._list = self._list.with_entry(entry)

    def _enter(self, number: int, state: dict[str, dict[str, Any]]) -> None:
        """On rank zero: lets the keyframe count, once it is on the disk."""
        self._list = self._list.with_entry(KeyframeEntry.of(self.directory, number, self._ranks.count, state))
        self._list.write(self.directory)


def _make_empty(folder: Path) -> None:
    """What a killed run has left of a keyframe goes."""
    if folder.is_dir():
        shutil.rmtree(folder)
    make_directory(folder)


def _share_tensors(observer: StepObserver) -> dict[str, Tensor]:
    """The shares of the momentum buffers, cut as their parameters are."""
    return {
        f"share:{part}:{name}": _cut_as(observer.parameters[name], share)
        for part, shares in observer.momentum_shares.items()
        for name, share in shares.items()
    }


def _cut_as(parameter: Tensor, piece: Tensor) -> Tensor:
    """The tensor of which this process holds the piece."""
    if not isinstance(parameter, DTensor):
        return piece
    return DTensor.from_local(
        piece, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


# ------------------------------------------------------------------- going on


def take_up(
    directory: Path, at: bool | int, model: nn.Module, observer: StepObserver, ranks: Ranks
) -> tuple[KeyframeList | None, int]:
    """Goes on with the run in `directory`, from a keyframe, with as many processes as there are now. Returns its record
    up to there, None where there is none, and the number of the step that comes next.

    at: True puts the model, the optimizer's state and the random state where the last keyframe has them. A number says
    that the caller has put them where step `at` begins; they are compared with the keyframe of that number.

    Raises ValueError if model or optimizer are not those of the record, or there is no keyframe of that number;
    TrajectoryError if it cannot be read.
    """
    found = ranks.from_zero(lambda: KeyframeList.read(directory) if directory.is_dir() else None)
    if found is None or not found.keyframes:
        return None, 0

    _check_run(found, {**head_of(model, observer), "format": FORMAT}, directory)
    numbers = [entry.number for entry in found.keyframes]
    number = max(numbers) if at is True else int(at)
    if number not in numbers:
        raise ValueError(
            f"a run whose parameters are in pieces is gone on with at one of its keyframes, and {directory} has those "
            f"of the steps {', '.join(map(str, sorted(numbers)))}, not of {number}: save your checkpoints at these "
            "steps (keyframe_every=), or let resume=True go on from the last"
        )

    entry = next(entry for entry in found.keyframes if entry.number == number)
    ranks.at_zero(lambda: entry.verify(directory))
    _take_over(directory / entry.folder, entry, model, observer, ranks, loads=at is True)
    ranks.at_zero(lambda: _cut_rows(directory, number, tells=at is True))
    return found.until(number), number


def _check_run(found: KeyframeList, head: Mapping[str, Any], directory: Path) -> None:
    for key in ("optimizer", "parameters", "buffers", "aliases"):
        if head[key] != found.head[key]:
            raise ValueError(f"the run in {directory} has other {key}: {found.head[key]}, here {head[key]}")


@torch.no_grad()
def _take_over(
    folder: Path, entry: KeyframeEntry, model: nn.Module, observer: StepObserver, ranks: Ranks, loads: bool
) -> None:
    """Reads a keyframe: into the model and the optimizer if it `loads`, else to compare them with it."""
    wanted = _room_for(folder, observer, buffers_of(model), ranks)
    try:
        load(wanted, storage_reader=PlainReader(folder), planner=PlainPlanner())
    except (CheckpointException, OSError, RuntimeError) as error:
        raise TrajectoryError(f"{folder} does not hold what a keyframe holds: {error}") from error

    if loads:
        _put_in_place(wanted, entry, model, observer)
        _set_random_states(wanted, entry, ranks)
    else:
        _compare(wanted, checkpoint_tensors(observer, State(observer.parameters, buffers_of(model))), entry, ranks)

    shares: dict[str, dict[str, Tensor]] = {}
    for name in (name for name in wanted if name.startswith("share:")):
        _, part, parameter = name.split(":", 2)
        shares.setdefault(part, {})[parameter] = local(wanted[name])
    observer.adopt(shares)
    observer.restart(buffers_of(model))


def _room_for(folder: Path, observer: StepObserver, buffers: Tensors, ranks: Ranks) -> dict[str, Tensor]:
    """Tensors for all that the keyframe holds, cut as the parameters are now; of random states, this process's.

    Raises TrajectoryError for names and shapes that are no keyframe's of this model.
    """
    room: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes_in(folder).items():
        kind, _, rest = name.partition(":")
        owner = rest if kind == "parameter" else rest.partition(":")[2]
        parameter = observer.parameters.get(owner)
        if kind == "random":
            if rest.partition(":")[0] == str(ranks.rank):
                room[name] = torch.empty(shape, dtype=dtype)
        elif kind == "buffer" and rest in buffers and buffers[rest].shape == shape:
            room[name] = torch.empty_like(buffers[rest])
        elif parameter is not None and parameter.shape == shape:
            room[name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        elif kind == "state" and parameter is not None and not shape:
            room[name] = torch.zeros(shape, dtype=dtype)  # a count of steps
        else:
            raise TrajectoryError(f"{folder} holds {name!r} of shape {list(shape)}, which this model has no place for")

    missing = {f"parameter:{name}" for name in observer.parameters} | {f"buffer:{name}" for name in buffers}
    if missing - room.keys():
        raise TrajectoryError(f"{folder} lacks {', '.join(sorted(missing - room.keys())[:5])}")
    return room


def _put_in_place(found: Tensors, entry: KeyframeEntry, model: nn.Module, observer: StepObserver) -> None:
    for name, parameter in observer.parameters.items():
        local(parameter).copy_(local(found[f"parameter:{name}"]))
    for name, buffer in buffers_of(model).items():
        buffer.copy_(found[f"buffer:{name}"])

    states: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in entry.state.items()}
    for name in (name for name in found if name.startswith("state:")):
        _, key, owner = name.split(":", 2)
        states.setdefault(owner, {})[key] = found[name]
    for group in observer.optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")  # then its counts of steps are where it computes
        for parameter in group["params"]:
            state = states.get(next(name for name, p in observer.parameters.items() if p is parameter), {})
            observer.optimizer.state[parameter] = {
                key: value.to(parameter.device) if on_device and isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _compare(wanted: Tensors, found: Tensors, entry: KeyframeEntry, ranks: Ranks) -> None:
    """Raises ValueError, on every process, unless model and optimizer are, bit for bit, as the keyframe has them."""
    names = [name for name in wanted if not name.startswith(("random:", "share:"))]
    other = [name for name in names if name not in found or not _same(found[name], wanted[name])]
    everywhere = [name for names in ranks.gather(other) for name in names]
    if everywhere:
        raise ValueError(
            f"the model and the optimizer are not what the record says they were before step {entry.number}: they "
            f"differ in {', '.join(list(dict.fromkeys(everywhere))[:5])}. Load the checkpoint of that step first, or "
            "let resume=True go on from the last keyframe"
        )


def _same(found: Tensor, recorded: Tensor) -> bool:
    here, there = local(found.detach()), local(recorded)
    return is_piece(found) == is_piece(recorded) and here.shape == there.shape and same_bits(here.to(there), there)


def _set_random_states(found: Tensors, entry: KeyframeEntry, ranks: Ranks) -> None:
    if entry.processes == ranks.count:
        prefix = f"random:{ranks.rank}:"
        set_random_state({name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)})
    elif ranks.rank == 0:
        warnings.warn(
            f"the run was trained by {entry.processes} processes, and {ranks.count} go on: what each draws at random "
            "from here on is not what it would have been",
            ResumeWarning,
            stacklevel=6,
        )


def _cut_rows(directory: Path, number: int, tells: bool) -> None:
    """Drops the rows of the steps from `number` on, which are taken again, and tells of them."""
    reached = max(steps_logged(directory), default=-1)
    is_end = is_finished(directory, number)
    cut_history(directory, number)
    if tells and reached >= number and not is_end:
        warnings.warn(
            f"training goes on from the last keyframe, that of step {number}: the steps {number} to {reached} were "
            "trained before, and are taken again",
            ResumeWarning,
            stacklevel=6,
        )
