"""The result over the sample axis while it is made: arrays that sweeps add to, in memory or in a directory."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr

from explaind_track.core import distributed
from explaind_track.core.influence import Influence
from explaind_track.explanation.reverse_replay import Mismatch
from explaind_track.explanation.sample_axis import SAMPLE_AXES, Array
from explaind_track.explanation.tiles import Tile
from explaind_track.record.results import Store

KERNEL_AXES = tuple(axis for axis in SAMPLE_AXES if axis not in ("seen", "sample"))
"""What the influence of all samples together is kept over."""


class SampleResult:
    """Influences of samples over all of `SAMPLE_AXES`; those that are not kept have length 1."""

    def __init__(
        self, keep: Sequence[str], sizes: Mapping[str, int], dtype: np.dtype[Any], store: Store | None
    ) -> None:
        self._keep, self._sizes, self._dtype, self._store = keep, sizes, dtype, store
        self._influence = self._array("influence", SAMPLE_AXES)
        self._kernel = self._array("kernel", KERNEL_AXES)
        self._mismatch: dict[str, dict[str, float]] = {} if store is None else store.notes
        """By tile that is done, and by step."""

    def _array(self, name: str, axes: Sequence[str]) -> Array:
        """Zeros, or what the directory holds."""
        sizes = {axis: self._sizes[axis] for axis in axes}
        if self._store is None:
            return np.zeros(tuple(sizes.values()), self._dtype)
        kept = {axis: size for axis, size in sizes.items() if axis in self._keep}
        return self._store.array(name, kept, self._dtype).reshape(tuple(sizes.values()))

    def lacks(self, tile: Tile) -> bool:
        """Whether the tile is still to be done."""
        return tile.name not in self._mismatch

    def cells(self, tile: Tile, first: int) -> tuple[Array, Array]:
        """A tile's part of both arrays, zeros to be added to. first: of the window."""
        acting = self._acting(tile, first)
        influence = self._influence[acting, :, :, tile.rows, tile.outputs]
        kernel = self._kernel[acting, :, tile.rows, tile.outputs]
        if self._store is not None:  # where an interrupted sweep may have left its beginning
            influence[...], kernel[...] = 0, 0
        return influence, kernel

    def _acting(self, tile: Tile, first: int) -> slice:
        """The tile's part of the axis `step`."""
        return slice(tile.steps.start - first, tile.steps.stop - first) if tile.apart else slice(0, 1)

    def done(self, tile: Tile, first: int, mismatch: Mismatch) -> None:
        """Takes note of a tile whose cells are filled. first: of the window."""
        self._mismatch[tile.name] = {str(number): value for number, value in mismatch.by_step.items()}
        if self._store is not None:
            parts = {"step": self._acting(tile, first), "query": tile.rows, "output": tile.outputs}
            self._store.done(tile.name, parts, self._mismatch[tile.name])

    def finish(self, labels: Mapping[str, Any], window: tuple[int, int], is_loss: bool) -> Influence:
        """Adds up what all processes have, and gives it its labels: those of group and sample are passed.

        is_loss: whether the target is a loss, of which `Influence.top` calls helpful what lowers it.
        """
        distributed.add_up(self._influence, self._kernel)
        mismatch: dict[int, float] = {}
        for found in distributed.gather(self._mismatch):
            for values in found.values():
                for number, value in values.items():
                    mismatch[int(number)] = max(value, mismatch.get(int(number), value))

        # nothing was seen before the first step that was gone back to
        (first, last), numbers = window, sorted(mismatch)
        low = min(numbers, default=first)
        influence = self._influence[:, low:] if "seen" in self._keep else self._influence
        dims, kernel_dims = ([axis for axis in axes if axis in self._keep] for axes in (SAMPLE_AXES, KERNEL_AXES))
        variables = {
            "influence": (dims, influence.squeeze(self._summed(SAMPLE_AXES))),
            "kernel": (kernel_dims, self._kernel.squeeze(self._summed(KERNEL_AXES))),
            "mismatch": (["walked"], np.array([mismatch[number] for number in numbers])),
        }

        labels = {
            "walked": np.array(numbers, dtype=np.int64),
            "step": np.arange(first, last),
            "seen": np.arange(low, low + influence.shape[1]),
            **labels,
        }
        kept = {name: values for name, values in labels.items() if name in (*dims, "walked")}
        attrs = {"first_step": first, "last_step": last - 1, "explaind_track": version("explaind_track")}
        attrs["is_loss"] = int(is_loss)
        data = xr.Dataset(variables, kept, attrs)
        return Influence(data) if self._store is None else self._store.complete(data, {"seen": low})

    def _summed(self, axes: Sequence[str]) -> tuple[int, ...]:
        """The places of the axes that are not kept."""
        return tuple(place for place, axis in enumerate(axes) if axis not in self._keep)
