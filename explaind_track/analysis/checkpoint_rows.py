"""What was found at each checkpoint, as rows of a table and as rows of the panels, with the keys of live runs."""

import math
from collections.abc import Mapping
from typing import Any

import xarray as xr

from explaind_track.checkpoints.check import SeriesCheck
from explaind_track.record.history import (
    AXIS,
    COST,
    DIFFERENCE,
    LOSS,
    NODES,
    SECONDS_INFLUENCE,
    TOTAL,
    change_key,
    importance_key,
    measure_key,
    residual_key,
    section_of_part,
    share_row,
    whole_change_key,
)

PEAK = f"{COST}/peak_mb"
"""The key of the most memory that was held, in megabytes."""

QUERY = "unseen"
"""The name of the unseen batch's loss in the rows of the panels."""

Changes = Mapping[str, xr.DataArray]
"""Changes of the loss, −Ψ, over (part, step, group), by the name of the grouping."""


def checkpoint_rows(data: xr.Dataset, check: SeriesCheck) -> list[dict[str, Any]]:
    """The rows of summary.json: of the loss, its change in one step, what the parts add up to, and what they miss.

    data: of an influence over the checkpoints. `sum`, `residual` and `rounding` are changes of the loss, as `change`:
    the residual is what the sum misses of it, the rounding what of the sum is float arithmetic's. check: of the series.
    """
    rows, findings = [], {found.step: found for found in check.findings}
    for step in data["step"].values.tolist():
        here, found = data.sel(step=step), findings[step]
        change, left = float(here["change"]), float(here["remainder"])
        rows.append(
            {
                "step": step,
                "loss_before": float(here["loss_before"]),
                "loss_after": float(here["loss_after"]),
                "change": change,
                "sum": change - left,
                "residual": left,
                "rounding": -float(here["rounding"]),
                "nodes": int(here["nodes"]),
                "seconds": float(here["seconds"]),
                "peak_mb": float(here["peak_mb"]),
                "gradient_norm": float(here["gradient_norm"]),
                "estimated": bool(here["estimated"]),
                "correlation": found.correlation,
                "check": found.notes,
            }
        )
    return rows


def panel_row(row: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A checkpoint's row of the panels, with the keys of live ones (see `record.history`).

    The first grouping owns the plain names (`kernel/<group>`, `loss/kernel/<group>`); of the others, changes of the
    loss stand under their name (`layer/kernel/<group>`). The target is one number: an importance is an absolute change.

    row: of `summary.json`.
    """
    keys: dict[str, Any] = {
        AXIS: row["step"],
        measure_key(QUERY, "loss"): row["loss_before"],
        residual_key(QUERY): abs(row["residual"] / row["change"]) if row["change"] else 0.0,
        NODES: row["nodes"],
        SECONDS_INFLUENCE: row["seconds"],
        PEAK: row["peak_mb"],
    }

    # the first grouping owns the plain names
    for number, (grouping, values) in enumerate(changes.items()):
        here = values.sel(step=row["step"])
        loss = grouping if number else LOSS
        keys[whole_change_key(loss)] = row["change"]
        sections = [section_of_part(str(part)) for part in here["part"].values]
        for part in map(str, here["part"].values):
            cells = here.sel(part=part)
            by_group = {str(group): float(cells.sel(group=group)) for group in cells["group"].values}
            by_group[TOTAL] = sum(by_group.values())
            keys |= {change_key(section_of_part(part), group, loss): value for group, value in by_group.items()}
            if loss == LOSS:
                keys |= {importance_key(section_of_part(part), group): abs(value) for group, value in by_group.items()}
        if loss == LOSS:
            keys |= share_row({section: keys[change_key(section, TOTAL)] for section in sections})
            keys |= _differences(here)
    return {key: value for key, value in keys.items() if math.isfinite(value)}


def _differences(changes: xr.DataArray) -> dict[str, float]:
    """D of each group and of all: signed kernel minus signed regularization influence."""
    if not {"kernel", "regularization"} <= set(changes["part"].values):
        return {}
    difference = changes.sel(part="regularization") - changes.sel(part="kernel")
    found = {
        importance_key(DIFFERENCE, str(group)): float(difference.sel(group=group))
        for group in difference["group"].values
    }
    return {**found, importance_key(DIFFERENCE, TOTAL): float(difference.sum())}
