"""Groups by layer and type in rows: the cells that a row holds, and the sums over layers and over types in their place.

A run with `groups="layer.type"` has some hundred groups. Its history keeps them all; what is shown of a row is the sums
of the signed numbers (changes of losses, D), `<section>/type/<type>` and `<section>/layer/<layer>`. Importances are
sizes, which do not add up to those of a layer, and are shown for all groups together alone.
"""

from collections.abc import Container, Iterable, Mapping
from functools import lru_cache
from typing import Any

from explaind_track.core.architectures import Cell, cells_of
from explaind_track.record.history import (
    DIFFERENCE,
    KERNEL,
    MOMENTUM,
    OUTSIDE,
    PAST,
    REGULARIZATION,
    TOTAL,
    whole_change_key,
)

PARTS_SHOWN = (KERNEL, MOMENTUM, REGULARIZATION, PAST, OUTSIDE, "rounding", DIFFERENCE)

LAYER, TYPE = "layer", "type"


def sections_with_cells(keys: Iterable[str]) -> dict[str, dict[str, Cell]]:
    """The cells of the Tracker's sections that are by layer and type, by their group; keys: of a row."""
    known, by_section = dict.fromkeys(keys), dict[str, list[str]]()
    for key in known:
        section, slash, group = key.rpartition("/")
        if slash and group != TOTAL and (section.rpartition("/")[2] in PARTS_SHOWN or is_signed(section, known)):
            by_section.setdefault(section, []).append(group)
    found = {section: _cells_of(tuple(groups)) for section, groups in by_section.items()}
    return {section: cells for section, cells in found.items() if cells}


@lru_cache(maxsize=256)
def _cells_of(groups: tuple[str, ...]) -> dict[str, Cell]:
    return cells_of(groups)


def is_signed(section: str, keys: Container[str]) -> bool:
    """Whether the numbers of a section add up over groups: they are changes of a loss, or D. keys: of its row."""
    name, _, last = section.rpartition("/")
    return last == DIFFERENCE or (bool(name) and whole_change_key(name) in keys)


def without_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it is shown: each section that is by layer and type as its sums; a row without such as it is.

    Example:
        >>> from explaind_track.record.layer_types import without_cells
        >>> row = {"train/step": 0, "loss/change": -3.0, "loss/kernel/embedding": -0.5}
        >>> row |= {"loss/kernel/layer.0.norm": -1.0, "loss/kernel/layer.1.norm": -1.5, "loss/kernel/total": -3.0}
        >>> without_cells(row)["loss/kernel/type/norm"], without_cells(row)["loss/kernel/layer/layer.1"]
        (-2.5, -1.5)
    """
    sections = sections_with_cells(row)
    cells = {f"{section}/{group}" for section, groups in sections.items() for group in groups}
    shown = {key: value for key, value in row.items() if key not in cells}
    for section, groups in sections.items():
        if is_signed(section, row):
            for group, cell in groups.items():
                for key in (f"{section}/{TYPE}/{cell.type}", f"{section}/{LAYER}/{cell.layer}"):
                    shown[key] = shown.get(key, 0.0) + row[f"{section}/{group}"]
    return shown
