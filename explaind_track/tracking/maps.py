"""Maps of what the last so many steps did: of losses by layer and type, of losses by domain, and of single tokens."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from explaind_track.core.architectures import Cell, cells_of
from explaind_track.core.colored_text import ALL
from explaind_track.core.step import SHARES
from explaind_track.record import history
from explaind_track.record.media import Table
from explaind_track.tracking.live import Live

MOST_TOKENS = 1000
"""Rows of a table of tokens."""

DRAWN = (history.KERNEL, history.REGULARIZATION, history.PAST, history.OUTSIDE)
"""The parts whose changes a map adds up."""


class Maps:
    """Adds up the changes of losses between two maps, and draws these."""

    def __init__(self, live: Live, every: int) -> None:
        """every: so many steps have maps together. Raises ValueError where there is nothing to draw."""
        self._live, self._every = live, every
        self._tokens = [name for name in live.losses if live.is_of_tokens(name)]
        losses = [name for name in live.losses if name not in self._tokens] or live.losses
        self._losses = {name: history.LOSS if name == live.losses[0] else name for name in losses}
        """The section in the rows of each loss that is drawn by group, by its query's name: those of tokens have maps
        of their own, if there are others."""
        self._cells: dict[str, Cell] = cells_of(live.groups)
        if not (self._tokens or len(self._losses) > 1 or (self._cells and self._losses)):
            raise ValueError(
                "maps_every= draws losses by layer and type (groups='layer.type' and a Query.loss), several losses by "
                "group, and tokens (Query.tokens), and there is none of these among the queries"
            )
        self._sums: dict[str, dict[str, float]] = {name: dict.fromkeys(live.groups, 0.0) for name in self._losses}
        """By query and group."""
        self._before: dict[str, np.ndarray[Any, Any]] = {}
        """How the tokens' losses had changed up to the last map, by query: (groups, tokens)."""
        self.steps = 0
        """Those that were explained since the last map."""

    def add(self, number: int, row: Mapping[str, float]) -> bool:
        """Adds up the changes that the row of step `number` tells of. Returns whether maps are due."""
        self.steps += 1
        for name, section in self._losses.items():
            for group in self._sums[name]:
                keys = (history.change_key(part, group, section) for part in DRAWN)
                self._sums[name][group] += sum(row.get(key, 0.0) for key in keys)
        return (number + 1) % self._every == 0

    def draw(self) -> dict[str, Any]:
        """The maps of the steps since the last ones, by their keys; the next begin behind these."""
        drawn: dict[str, Any] = {history.MAP_STEPS: self.steps}
        if self._cells:
            drawn[history.LAYER_TYPE_MAP] = _layer_type_map(self._sums, self._cells)
        if len(self._losses) > 1:
            drawn[history.DOMAIN_MAP] = _domain_map(self._sums, self._cells)
        for name in self._tokens:
            drawn[f"{history.TOKENS}/{name}"] = self._token_table(name)

        self._sums = {name: dict.fromkeys(own, 0.0) for name, own in self._sums.items()}
        self.steps = 0
        return drawn

    def _token_table(self, name: str) -> Table:
        """The loss of each token, and how it has changed since the last map: through all groups, and each."""
        data = self._live.influence(name, ("group", "token")).data
        sums = -data["influence"].sel(part=[part for part in data["part"].values if part not in SHARES]).sum("part")
        names = [_shown_group(str(group), self._cells) for group in data["group"].values]
        by_name = np.array([sums.values[[one == own for one in names]].sum(0) for own in dict.fromkeys(names)])
        changes = by_name - self._before.get(name, np.zeros_like(by_name))
        self._before[name] = by_name

        columns = ["token", "input", "loss", ALL, *dict.fromkeys(names)]
        known = (data["token"].values, data["input"].values, data["final"].values, changes.sum(0), *changes)
        return Table(columns, [list(row) for row in zip(*(one[:MOST_TOKENS].tolist() for one in known), strict=True)])


def _shown_group(group: str, cells: Mapping[str, Cell]) -> str:
    """What stands for a group where there is no room for all: of groups by layer and type, the type."""
    return cells[group].type if group in cells else group


def _layer_type_map(sums: Mapping[str, Mapping[str, float]], cells: Mapping[str, Cell]) -> bytes:
    from explaind_track.analysis import plots

    layers, types = (list(dict.fromkeys(names)) for names in zip(*cells.values(), strict=True))
    tables = {}
    for name, own in sums.items():
        tables[name] = np.full((len(layers), len(types)), np.nan)
        for group, cell in cells.items():
            tables[name][layers.index(cell.layer), types.index(cell.type)] = own[group]
    return _png(plots.change_maps(tables, layers, types))


def _domain_map(sums: Mapping[str, Mapping[str, float]], cells: Mapping[str, Cell]) -> bytes:
    """Losses downwards, and to the right their groups; of groups by layer and type, the types."""
    from explaind_track.analysis import plots

    of_group = {group: _shown_group(group, cells) for group in next(iter(sums.values()))}
    groups: Sequence[str] = list(dict.fromkeys(of_group.values()))
    table = np.zeros((len(sums), len(groups)))
    for place, own in enumerate(sums.values()):
        for group, value in own.items():
            table[place, groups.index(of_group[group])] += value
    return _png(plots.change_maps({"each loss": table}, list(sums), groups))


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
