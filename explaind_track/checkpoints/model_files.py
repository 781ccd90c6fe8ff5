"""The files that models are published in: safetensors or torch's, one file or shards with an index."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from explaind_track.checkpoints.torch_files import read_torch
from explaind_track.errors import CheckpointError

SAFETENSORS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
TORCH = ("pytorch_model.bin", "pytorch_model_fsdp.bin", "model.bin", "model.pt")


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files by name, each mapped from its file when it is asked for."""

    def __init__(self, shards: Mapping[str, Path]) -> None:
        """shards: the file of each tensor."""
        self._shards = shards

    @classmethod
    def of_file(cls, path: Path) -> "SafeTensors":
        """All tensors of one file. Raises CheckpointError if it is torn or none."""
        with _opened(path) as file:
            return cls(dict.fromkeys(file.keys(), path))

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._shards[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is torn, or no safetensors file ({error}). Copy it again") from None


def has_model(directory: Path) -> bool:
    """Whether a model of one of these files lies in the folder."""
    return _model_file(directory) is not None


def _model_file(directory: Path) -> Path | None:
    names = [name for file in (*SAFETENSORS, *TORCH) for name in (file, f"{file}.index.json")]
    return next((directory / name for name in names if (directory / name).is_file()), None)


def read_model(directory: Path) -> Mapping[str, Tensor]:
    """The weights in the folder by name, each read when it is asked for.

    Raises:
        CheckpointError: There are none, or a file or shard of them is missing, torn or of another kind.
    """
    path = _model_file(directory)
    if path is None:
        listed = ", ".join((*SAFETENSORS, *TORCH))
        raise CheckpointError(f"{directory} holds no weights: expected one of {listed}, or an index of shards")

    if path.suffix == ".json":
        return _sharded(path)
    if path.suffix == ".safetensors":
        return SafeTensors.of_file(path)
    return tensors_of(read_torch(path), path)


def _sharded(index: Path) -> Mapping[str, Tensor]:
    """The tensors of all shards that the index names."""
    try:
        shards = {name: index.parent / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}). Copy it again") from None

    files = sorted(set(shards.values()))
    elsewhere = [str(file) for file in files if file.parent != index.parent or file.name in ("", ".", "..")]
    if elsewhere:
        raise CheckpointError(
            f"{index} names files outside of its folder: {', '.join(elsewhere)}. Nothing of it is read"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}")

    if index.name.endswith(".safetensors.index.json"):
        for file in files:
            lacking = [name for name in shards if shards[name] == file and name not in SafeTensors.of_file(file)]
            if lacking:
                raise CheckpointError(f"{file} lacks {lacking[0]}, which {index.name} says it holds. Copy it again")
        return SafeTensors(shards)

    read = {file: tensors_of(read_torch(file), file) for file in files}
    return {name: read[file][name] for name, file in shards.items()}


def tensors_of(content: Any, path: Path) -> Mapping[str, Tensor]:
    """A file's content as tensors by name. Raises CheckpointError if it is something else."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no weights by name, as torch.save(model.state_dict(), …) writes them")
    return content
