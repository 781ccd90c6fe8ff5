"""A record as somebody who means harm could write it: with other content, and yet with hashes that fit."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def digest_of(content: Any) -> str:
    """Of what a JSON file says, as such a file says it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(directory: Path, content: dict[str, Any]) -> None:
    """Writes the manifest with a digest that fits its content."""
    content = {key: value for key, value in content.items() if key != "digest"}
    (directory / "manifest.json").write_text(json.dumps({**content, "digest": digest_of(content)}))


def read_manifest(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
    return content


def forge_entry(directory: Path, file: str, **values: Any) -> None:
    """Changes a file's entry in the manifest."""
    content = read_manifest(directory)
    content["files"] = [{**entry, **values} if entry["path"] == file else entry for entry in content["files"]]
    seal(directory, content)


def refit(directory: Path, file: str) -> None:
    """Lets the manifest tell of a file as it is now."""
    content = (directory / file).read_bytes()
    forge_entry(directory, file, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def read_influence(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an influence's file."""
    with safe_open(path, "pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["explaind_track"])
    return header, load_file(path)


def write_influence(path: Path, header: Any, tensors: dict[str, Tensor]) -> None:
    """The same, with a hash that fits where the header is one of ours otherwise."""
    if isinstance(header, dict):
        digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
            digest.update(tensors[name].numpy().tobytes())
        header = {**header, "sha256": digest.hexdigest()}
    save_file(tensors, path, {"explaind_track": json.dumps(header)})
