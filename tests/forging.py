"""A record as somebody who means harm could write it: with other content, and yet with hashes that fit."""

import hashlib
import json
from pathlib import Path
from typing import Any


def seal(directory: Path, content: dict[str, Any]) -> None:
    """Writes the manifest with a digest that fits its content."""
    content = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps({**content, "digest": digest}))


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
