"""DeepSpeed's ZeRO partitions: flat float32 weights and moments, cut over processes, put together by parameter."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explaind_track.checkpoints.torch_files import read_torch
from explaind_track.core.checks import first_few
from explaind_track.errors import CheckpointError

OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_00_model_states\.pt$")
MASTERS = ("single_partition_of_fp32_groups", "local_sub_partitions_of_fp32_groups", "fp32_flat_groups")
"""What a process's float32 weights are called: in stage 1 and 2, in stage 1 of old versions (Pythia's), in stage 3."""
OBJECTS = ("deepspeed.",)
"""Its own objects beside the tensors (a loss scaler, a stage) are read as inert ones."""


@dataclass(frozen=True)
class Fragment:
    """Where a part of a parameter lies."""

    rank: int
    piece: int
    start: int
    count: int


class ZeroFiles:
    """The partitions of all processes in a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if files are missing, torn or of model parallelism."""
        self.folder = folder
        self._ranks = [read_torch(path, OBJECTS) for path in _rank_files(folder)]
        self._parts: list[Mapping[str, Any]] = [content.get("optimizer_state_dict") for content in self._ranks]
        if not all(isinstance(part, Mapping) for part in self._parts):
            raise CheckpointError(f"{folder} holds no partitions of ZeRO: its files have no 'optimizer_state_dict'")

        models = sorted(path for path in folder.iterdir() if MODEL.match(path.name))
        self.model: Mapping[str, Any] = read_torch(models[0], OBJECTS) if models else {}
        """What was saved of the model itself: buffers, frozen weights, shapes."""
        self._require_all_ranks()
        self._masters = next((name for name in MASTERS if name in self._parts[0]), None)
        if self._masters is None:
            raise CheckpointError(f"{folder} holds no float32 weights: expected one of {', '.join(MASTERS)}")

        self.shapes = self._shapes()
        """Of each group's parameters, by name."""
        self._places = {name: list(found) for group in range(len(self.shapes)) for name, found in self._cut(group)}
        self._group_of = {name: group for group, shapes in enumerate(self.shapes) for name in shapes}

    # ------------------------------------------------------------------------------------------------------ settings

    @property
    def config(self) -> Mapping[str, Any]:
        """DeepSpeed's configuration of the run, as far as it was saved."""
        return self._ranks[0].get("ds_config") or self.model.get("ds_config") or {}

    @property
    def settings(self) -> list[dict[str, Any]] | None:
        """The settings of each group; None where the version saved none."""
        base = self._base(0)
        return [dict(group) for group in base["param_groups"]] if isinstance(base, Mapping) else None

    @property
    def steps_taken(self) -> int | None:
        """How many steps the optimizer has counted; None where it did not."""
        steps = self.model.get("global_steps")
        return None if steps is None else int(steps)

    @property
    def kinds(self) -> list[str]:
        """What the optimizer holds for each number, such as `exp_avg`."""
        return [key for key, value in self._states(0)[0][0].items() if isinstance(value, Tensor) and value.ndim]

    def counted(self, name: str) -> Tensor | None:
        """The step count in a parameter's state; None where there is none."""
        step = self._states(0)[self._group_of[name]][0].get("step")
        return None if step is None else torch.as_tensor(float(step))

    # ------------------------------------------------------------------------------------------------------- tensors

    def weight(self, name: str) -> Tensor:
        """A parameter in float32."""
        return self._gather(name, lambda rank, group: _as_list(self._parts[rank][str(self._masters)][group]))

    def state(self, name: str, kind: str) -> Tensor:
        """A parameter's moment."""
        return self._gather(name, lambda rank, group: [piece[kind] for piece in self._states(rank)[group]])

    def _gather(self, name: str, partition: Any) -> Tensor:
        """The parameter from its fragments; a view of the file where there is only one."""
        group = self._group_of[name]
        shape = self.shapes[group][name]
        pieces = [partition(at.rank, group)[at.piece][at.start : at.start + at.count] for at in self._places[name]]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if whole.numel() < math.prod(shape):
            raise CheckpointError(
                f"{self.folder} holds {whole.numel()} numbers of {name}, which has {math.prod(shape)}"
            )
        return whole[: math.prod(shape)].view(shape)

    # -------------------------------------------------------------------------------------------------------- layout

    def _base(self, rank: int) -> Any:
        part = self._parts[rank]
        return part.get("base_optimizer_state", part.get("optimizer_state_dict"))

    def _states(self, rank: int) -> list[list[Mapping[str, Any]]]:
        """A process's states of each group, in as many pieces as its numbers."""
        base = self._base(rank)
        if isinstance(base, Mapping):
            return [[base["state"][group]] for group in sorted(base["state"])]
        return [_as_list(group) for group in base]

    def _require_all_ranks(self) -> None:
        count = self._parts[0].get("partition_count")
        expected = max(count) if isinstance(count, list) else count
        if expected is not None and expected != len(self._parts):
            raise CheckpointError(
                f"{self.folder} lacks {expected - len(self._parts)} of {expected} partitions: expected a file "
                "zero_pp_rank_…_optim_states.pt of every process"
            )

    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        told = self.model.get("param_shapes") or self._ranks[0].get("param_shapes")
        count = len(self._parts[0][str(self._masters)])
        if not told:
            raise CheckpointError(f"{self.folder} does not tell the shapes of its parameters ('param_shapes')")
        if isinstance(told, Mapping):  # old versions: of all groups in one, matrices decay and the rest does not
            shapes = {name: tuple(shape) for name, shape in told.items()}
            matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
            rest = {name: shape for name, shape in shapes.items() if len(shape) <= 1}
            told = {1: [shapes], 2: [matrices, rest]}.get(count, [])
        if len(told) != count:
            raise CheckpointError(f"{self.folder} has {count} groups of parameters and the shapes of {len(told)}")
        return [{name: tuple(shape) for name, shape in group.items()} for group in told]

    def _cut(self, group: int) -> Iterator[tuple[str, Iterator[Fragment]]]:
        """Where the parameters of a group lie."""
        slices = [part.get("param_slice_mappings") for part in self._parts]
        if self._masters == MASTERS[2]:
            yield from self._cut_each(group)
        elif all(slices):
            for name in self.shapes[group]:
                found = [(rank, held[group].get(name)) for rank, held in enumerate(slices) if held is not None]
                yield name, (Fragment(rank, 0, at.start, at.numel) for rank, at in found if at is not None)
        else:
            yield from self._cut_flat(group)

    def _cut_each(self, group: int) -> Iterator[tuple[str, Iterator[Fragment]]]:
        """Stage 3: every parameter is cut over all processes, the last of which is padded."""
        start, world = 0, len(self._parts)
        for name, shape in self.shapes[group].items():
            share = math.ceil(math.prod(shape) / world)
            yield name, iter([Fragment(rank, 0, start, share) for rank in range(world)])
            start += share

    def _cut_flat(self, group: int) -> Iterator[tuple[str, Iterator[Fragment]]]:
        """The group's numbers one behind the other, cut over all pieces and, within each, over all processes."""
        if self.config.get("zero_optimization", {}).get("round_robin_gradients"):
            raise CheckpointError(
                f"{self.folder} was written with round_robin_gradients by a version that does not tell the order of "
                "its parameters: save it again by a newer version"
            )
        pieces = [_as_list(part[str(self._masters)][group]) for part in self._parts]
        order = [(rank, piece) for piece in range(len(pieces[0])) for rank in range(len(pieces))]
        bounds = [0]
        for rank, piece in order:
            bounds.append(bounds[-1] + pieces[rank][piece].numel())

        paddings = self._parts[0].get("param_alignment_paddings")
        start = 0
        for place, (name, shape) in enumerate(self.shapes[group].items()):
            stop = start + math.prod(shape)
            if stop > bounds[-1]:
                raise CheckpointError(f"{self.folder} holds {bounds[-1]} numbers, too few for {name} at {start}")
            yield name, _between(start, stop, order, bounds)
            start = stop + (paddings[group][place] if paddings else 0)


def _between(start: int, stop: int, order: Sequence[tuple[int, int]], bounds: Sequence[int]) -> Iterator[Fragment]:
    """The fragments of the numbers start ≤ n < stop. bounds: where each piece begins, and the last ends."""
    for (rank, piece), begin, end in zip(order, bounds, bounds[1:], strict=False):
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield Fragment(rank, piece, first - begin, last - first)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _rank_files(folder: Path) -> list[Path]:
    """The file of each process, in order."""
    found = {}
    for path in folder.iterdir():
        match = OPTIMIZER.match(path.name)
        if match is not None and int(match[2]):
            raise CheckpointError(
                f"{folder} is of a run with model parallelism ({path.name}), which is not put together here: merge it "
                "by the tool of the library that trained it, and pass the result"
            )
        if match is not None:
            found[int(match[1])] = path
    missing = [str(rank) for rank in range(max(found, default=0)) if rank not in found]
    if missing:
        raise CheckpointError(f"{folder} lacks the partitions of processes {first_few(missing)}")
    return [found[rank] for rank in sorted(found)]
