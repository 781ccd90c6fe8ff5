"""The file of an influence: safetensors, with arrays of numbers as its tensors and everything else in its JSON header.

The header has one entry of ours, `explaind_track`, which is a JSON object:

    format   "explaind_track influence 2"
    attrs    the attributes of the data
    dims     for every variable of numbers: the names of its axes (its values are the tensor of the same name)
    words    for every other variable (the labels of parts and groups): the names of its axes, and its values
    sha256   over the rest of this object and all tensors, see `_digest`

A variable that is named like an axis holds that axis' labels.
"""

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import msgspec
import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "explaind_track influence 2"


def write(data: xr.Dataset, path: str | PathLike[str]) -> None:
    """Writes the data of an influence."""
    dims: dict[str, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    for name, variable in data.variables.items():
        axes = [str(axis) for axis in variable.dims]
        if variable.dtype.kind in "fiu":
            dims[str(name)] = axes
            tensors[str(name)] = torch.from_numpy(np.array(variable.values, order="C"))
        else:
            words[str(name)] = [axes, variable.values.tolist()]

    header: dict[str, Any] = {"format": FORMAT, "attrs": data.attrs, "words": words, "dims": dims}
    header["sha256"] = _digest(header, tensors)
    save_file(tensors, path, metadata={"explaind_track": json.dumps(header)})


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON header of a file, as it may be."""

    format: str
    attrs: dict[str, Any]
    dims: dict[str, list[str]]
    words: dict[str, tuple[list[str], Any]]
    sha256: str


def read(path: str | PathLike[str]) -> xr.Dataset:
    """Reads what `write` wrote. Raises ValueError for anything else, and where it was altered."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get("explaind_track", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no influence, or is damaged: {error}") from None

    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"{path} holds no influence of this format ({FORMAT!r}): found {found!r}")
    try:
        header = msgspec.convert(content, Header)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: the influence in it has another header, {error}") from None
    del content["sha256"]
    if header.sha256 != _digest(content, tensors) or header.dims.keys() != tensors.keys():
        raise ValueError(f"{path} is damaged: the influence in it is not the one that was written")

    variables: dict[str, Any] = {name: (axes, tensors[name].numpy()) for name, axes in header.dims.items()}
    for name, (axes, values) in header.words.items():
        variables[name] = (axes, np.array(values, dtype=object))
    all_axes = {axis for axes, _ in variables.values() for axis in axes}
    labels = [name for name in variables if name in all_axes]
    return xr.Dataset(variables, attrs=header.attrs).set_coords(labels)  # a ValueError where axes do not fit


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header (JSON, keys sorted), then over name, type, shape and bytes of every tensor, by name."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
