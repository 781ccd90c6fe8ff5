"""Influence: labelled arrays of summed influences, and the sums of the paper's §4 by their names."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from explaind_track.core.faithfulness import faithfulness
from explaind_track.core.step import SHARES

AXES = ("step", "group", "query", "output")
"""What an influence can be kept over; the axes that are not kept are summed over."""

FORMAT = "explaind_track influence 2"


@dataclass(frozen=True)
class Influence:
    """Influences of a training run on one query's targets, summed over all axes but those kept.

    `data` holds, each over `part` and those of step, group, query and output that are kept:

    - `influence` (part, step, group, query, output): Ψ, signed; subtracted from the prediction (paper's sign);
    - `importance` (part, step, group, query): Ψ̄ = Σ_x Σ_j |Ψ|, summed over all outputs and the queries that are not
      kept, after the signed sum over the steps and groups that are not;
    - `total_importance` (part, step, query): the same with the groups summed (signed) as well;
    - `rounding`, `buffers`, `change` (step, query, output): the influence of float rounding on the parameters, the
      change that the model's buffers made, and f(θ_{s+1}) − f(θ_s);
    - `residual` (step): ‖remainder‖₂ / ‖change‖₂ over queries × outputs, and `residual_floor` (step), below which
      float arithmetic does not let it go; where steps are summed, both of the summed terms;
    - `nodes` (step): the quadrature nodes taken; the largest where steps are summed;
    - `remainder` (step, query, output): change + ΣΨ, signed, as it was before any closing;
    - `initial`, `final` (query, output): the prediction before and after, if both axes are kept.

    Parts are `kernel`, `regularization` (and `past`); `momentum` is a share of the kernel, in no sum.
    """

    data: xr.Dataset

    def importance(self) -> xr.DataArray:
        """Ψ̄ and Ψ̄^reg: absolute influence, summed over queries and outputs (part, and step, group, query if kept)."""
        return self.data["importance"]

    def total_importance(self) -> xr.DataArray:
        """The importance of all groups together: their signed influences are summed first."""
        return self.data["total_importance"]

    def relative_regularization(self) -> xr.DataArray:
        """D(Θ) = Σ_θ (Ψ − Ψ^reg), over the kept axes but `part`: signed kernel minus signed regularization."""
        influence = self.data["influence"]
        kernel, decay = influence.sel(part="kernel"), influence.sel(part="regularization")
        return (kernel - decay).drop_vars("part", errors="ignore").rename("relative_regularization")

    @property
    def residual(self) -> xr.DataArray:
        """‖remainder‖₂ / ‖change‖₂ of every step, or of their sum."""
        return self.data["residual"]

    def total(self) -> xr.DataArray:
        """Everything that was subtracted from the prediction: all parts (no shares), groups and the rounding."""
        influence = self.data["influence"]
        owned = influence.sel(part=[name for name in influence["part"].values if name not in SHARES])
        axes = [axis for axis in ("part", "group") if axis in owned.dims]
        return (owned.sum(axes) + self.data["rounding"]).rename("total")

    def prediction(self) -> xr.DataArray:
        """The path-kernel prediction f_{θ_0} − ΣΨ − ΣΨ^reg (Thm. 3.1), with what buffers did added, (query, output).

        Raises ValueError unless query and output were kept.
        """
        if "initial" not in self.data:
            raise ValueError(f"the prediction needs keep=('query', 'output', …), this influence kept {self.kept}")
        total, buffers = self.total(), self.data["buffers"]
        if "step" in total.dims:
            total, buffers = total.sum("step"), buffers.sum("step")
        return (self.data["initial"] - total + buffers).rename("prediction")

    def faithfulness(self) -> dict[str, float]:
        """How well the path-kernel prediction stands for the model (Table 1), for outputs that score classes:
        `agreement`, the fraction of queries with the same decision, and `kl`, the mean KL(model ‖ path kernel) in
        nats. Raises ValueError unless query and output were kept."""
        prediction = torch.from_numpy(self.prediction().values)
        return faithfulness(torch.from_numpy(self.data["final"].values), prediction)

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(axis for axis in AXES if axis in self.data["influence"].dims)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one safetensors file; labels and attributes go into its JSON header."""
        variables = {name: (list(map(str, array.dims)), array) for name, array in self.data.variables.items()}
        numbers = {name: item for name, item in variables.items() if item[1].dtype.kind in "fiu"}
        words = {
            name: [dims, array.values.tolist()] for name, (dims, array) in variables.items() if name not in numbers
        }
        header = {"format": FORMAT, "attrs": self.data.attrs, "words": words}
        header["dims"] = {name: dims for name, (dims, _) in numbers.items()}
        tensors = {
            str(name): torch.from_numpy(np.array(array.values, order="C")) for name, (_, array) in numbers.items()
        }
        header["sha256"] = _digest(header, tensors)
        save_file(tensors, path, metadata={"explaind_track": json.dumps(header)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Influence":
        """Reads what `save` wrote. Raises ValueError for anything else; see `open_influence` for results that lie
        elsewhere."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("explaind_track", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} holds no influence, or is damaged: {error}") from None
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} holds no influence of this format ({FORMAT!r}): found {header.get('format')!r}")
        if header.pop("sha256", None) != _digest(header, tensors):
            raise ValueError(f"{path} is damaged: the influence in it is not the one that was written")
        variables: dict[str, Any] = {name: (dims, tensors[name].numpy()) for name, dims in header["dims"].items()}
        variables |= {name: (dims, np.array(values, dtype=object)) for name, (dims, values) in header["words"].items()}
        dims = {dim for names, _ in variables.values() for dim in names}
        return cls(
            xr.Dataset(variables, attrs=header["attrs"]).set_coords([name for name in variables if name in dims])
        )


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
