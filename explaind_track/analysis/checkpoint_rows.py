"""What was found at each checkpoint, as rows of a table and as rows of the panels, with the keys of live runs."""

from collections.abc import Mapping
from typing import Any

import xarray as xr

from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    NODES,
    SECONDS_INFLUENCE,
    TOTAL,
    change_key,
    importance_key,
    measure_key,
    residual_key,
    section_of_part,
    whole_change_key,
)

QUERY = "unseen"
"""The name of the unseen batch's loss in the rows of the panels."""

Changes = Mapping[str, xr.DataArray]
"""Changes of the loss, −Ψ, over (part, step, group), by the name of the grouping."""


def panel_row(row: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A checkpoint's row of the panels, with the keys of live ones (see `record.history`).

    The first grouping owns the plain names (`kernel/<group>`, `loss/kernel/<group>`); of the others, changes of the
    loss stand under their name (`layer/kernel/<group>`). The target is one number: an importance is an absolute change.

    row: of `summary.json`.
    """
    keys: dict[str, Any] = {
        AXIS: row["step"],
        measure_key(QUERY, "loss"): row["loss_before"],
        whole_change_key(): row["change"],
        residual_key(QUERY): abs(row["residual"] / row["change"]) if row["change"] else 0.0,
        NODES: row["nodes"],
        SECONDS_INFLUENCE: row["seconds"],
    }
    for number, (grouping, values) in enumerate(changes.items()):
        here = values.sel(step=row["step"])
        names = {} if number else {"loss": "loss"}
        for part in here["part"].values:
            section, cells = section_of_part(str(part)), here.sel(part=part)
            by_group = {str(group): float(cells.sel(group=group)) for group in cells["group"].values}
            for group, change in by_group.items():
                keys[change_key(section, group, names.get("loss", grouping))] = change
            if number == 0:
                keys[change_key(section, TOTAL)] = sum(by_group.values())
                keys |= {importance_key(section, group): abs(change) for group, change in by_group.items()}
                keys[importance_key(section, TOTAL)] = abs(sum(by_group.values()))
        if number == 0:
            keys |= _differences(here)
    return keys


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


def group_totals(changes: xr.DataArray) -> list[dict[str, Any]]:
    """What each group did to the loss, a row for each group: the mean over the checkpoints through each part."""
    means = changes.mean("step")
    return [
        {"group": str(group), **{str(part): float(means.sel(part=part, group=group)) for part in means["part"].values}}
        for group in means["group"].values
    ]
