"""The summary of a recorded run: what its manifest and its rows say at a glance."""

from pathlib import Path
from typing import Any

from explaind_track.core.summary import Summary, curve
from explaind_track.record.history import is_measure, is_residual, read_rows
from explaind_track.record.manifest import Manifest


def run_summary(directory: Path, manifest: Manifest) -> Summary:
    """Steps, files and optimizer; and losses, accuracies and residuals over the steps, where rows are there."""
    rows: list[list[Any]] = [
        ["steps", manifest.steps, ""],
        ["files", f"{len(manifest.entries)}, {sum(entry.size for entry in manifest.entries) / 1e6:,.1f} MB", ""],
        ["optimizer", str(manifest.head.get("optimizer", "")).rsplit(".", 1)[-1], ""],
        ["parameters", f"{len(manifest.head.get('parameters', {}))} tensors", ""],
    ]

    logged = read_rows(directory)
    keys = dict.fromkeys(key for row in logged for key in row if is_measure(key) or is_residual(key))
    for key in keys:
        values = [float(row[key]) for row in logged if isinstance(row.get(key), int | float)]
        rows.append([key, values[-1] if values else None, curve(values) if len(values) > 1 else ""])
    return Summary(f"Trajectory {directory}", ["", "", "over the steps"], rows)
