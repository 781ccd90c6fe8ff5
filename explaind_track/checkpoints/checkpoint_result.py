"""The numbers of single checkpoints, kept in files, and the influences over a series that are made of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.core import influence_file
from explaind_track.core.groups import Groups
from explaind_track.core.influence import Influence
from explaind_track.record.files import whole

REQUEST = "request"
"""The attribute of a file that says which question it answers."""


class Answers:
    """A directory with a file for each checkpoint that is done, `step-00000500.safetensors`; or none, and nothing is
    kept."""

    def __init__(self, directory: str | PathLike[str] | None, request: Mapping[str, str]) -> None:
        """request: what tells the question from others, by the arguments that it comes from."""
        self._directory = None if directory is None else Path(directory)
        self._request = dict(request)

    def known(self, checkpoint: Checkpoint) -> xr.Dataset | None:
        """The checkpoint's numbers, if they were computed before.

        Raises FileExistsError if the file answers another question; ValueError if it is damaged.
        """
        if self._directory is None or not (path := self._path(checkpoint)).is_file():
            return None
        data = influence_file.read(path)
        kept, wanted = json.loads(data.attrs.pop(REQUEST)), self._of(checkpoint)
        other = [name for name in wanted if kept.get(name) != wanted[name]]
        if other:
            raise FileExistsError(
                f"{path} answers another question, which differs in {', '.join(other)}; name a new directory, or "
                "remove that file first"
            )
        return data

    def keep(self, checkpoint: Checkpoint, data: xr.Dataset) -> xr.Dataset:
        """Writes the checkpoint's numbers. Raises TrajectoryError where they cannot be written."""
        if self._directory is not None:
            with whole(self._path(checkpoint)) as scratch:
                influence_file.write(data.assign_attrs({REQUEST: json.dumps(self._of(checkpoint))}), scratch)
        return data

    def _path(self, checkpoint: Checkpoint) -> Path:
        assert self._directory is not None
        return self._directory / f"step-{checkpoint.step:08}.safetensors"

    def _of(self, checkpoint: Checkpoint) -> dict[str, str]:
        return {**self._request, "the checkpoint": _files_of(checkpoint.path)}


def _files_of(path: Path) -> str:
    """Tells a folder or file from what it was before it was written to: names, sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def by_grouping(rows: Sequence[xr.Dataset], groups: Groups, extrapolate: bool) -> Influence:
    """The influence over steps and groups.

    rows: the numbers of each checkpoint, by tensor, in the order of their steps. extrapolate: whether to add what the
    batch does up to the next checkpoint.
    """
    steps = np.array([int(row.attrs["step"]) for row in rows])
    parts = list(dict.fromkeys(str(part) for row in rows for part in row["part"].values))

    # Ψ of a group is the sum over its tensors; a part that a checkpoint cannot tell of is no number there
    def grouped(values: xr.DataArray) -> xr.DataArray:
        sums = [values.sel(tensor=list(names)).sum("tensor", skipna=False) for names in groups.values()]
        return xr.concat(sums, "group").assign_coords(group=np.array(list(groups), dtype=object))

    of_steps = [grouped(row["influence"].reindex(part=parts)) for row in rows]
    influence = xr.concat(of_steps, "step").assign_coords(step=steps).transpose("part", "step", "group")
    scalars = {name: ("step", np.array([row[name].item() for row in rows])) for name in _SCALARS}
    data = xr.Dataset({"influence": influence, **scalars})

    data["importance"] = abs(data["influence"])
    data["total_importance"] = abs(data["influence"].sum("group", skipna=False))
    data["loss_before"] = data["loss_after"] - data["change"]
    size = abs(data["change"]).where(data["change"] != 0, 1.0)
    data["residual"] = abs(data["remainder"]) / size
    data["residual_floor"] = data["floor"] * abs(data["loss_after"]) / size
    data["buffers"] = xr.zeros_like(data["change"])

    if "by_source" in rows[0]:
        shares = [grouped(row["by_source"]) for row in rows]
        data["by_source"] = xr.concat(shares, "step").transpose("step", "source", "group")
    if extrapolate:
        gaps = np.diff(steps, append=2 * steps[-1] - steps[-2])
        ahead = [
            grouped(row["influence"].sel(part="kernel", drop=True) * _weight(row["beta"], int(gap)))
            for row, gap in zip(rows, gaps, strict=True)
        ]
        data["extrapolated"] = xr.concat(ahead, "step")

    span = {"first_step": int(steps[0]), "last_step": int(steps[-1]), "steps": len(steps)}
    versions = {"torch": torch.__version__, "explaind_track": version("explaind_track")}
    return Influence(data.drop_vars("floor").assign_attrs(**span, **versions))


_SCALARS = (
    "rounding", "change", "remainder", "loss_after", "nodes", "floor", "gradient_norm", "estimated", "seconds",
    "peak_mb",
)  # fmt: skip


def _weight(beta: xr.DataArray, steps: int) -> xr.DataArray:
    """Σ_{j<K} βʲ: what a gradient weighs in the first moment over K steps, in units of the first of them."""
    return ((1 - beta**steps) / (1 - beta)).where(beta > 0, 1.0)
