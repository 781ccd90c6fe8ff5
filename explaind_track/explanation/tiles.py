"""How a result over the sample axis is cut into tiles, each for one sweep over the steps, with as many targets as fit
the memory."""

from dataclasses import dataclass

from explaind_track.core.tensors import cuts


@dataclass(frozen=True)
class Tile:
    """What one sweep is for: acting steps, rows of the query, and outputs."""

    steps: slice
    rows: slice
    outputs: slice
    apart: bool
    """Whether the acting steps are kept apart, each with targets of its own."""

    @property
    def name(self) -> str:
        return "x".join(f"{part.start}-{part.stop}" for part in (self.steps, self.rows, self.outputs))

    @property
    def acting(self) -> int:
        """The number of acting steps."""
        return int(self.steps.stop - self.steps.start)

    @property
    def slots(self) -> int:
        """The acting steps that have targets of their own: all of them, or one for all together."""
        return self.acting if self.apart else 1

    @property
    def targets(self) -> int:
        """The targets in flight."""
        return int((self.rows.stop - self.rows.start) * (self.outputs.stop - self.outputs.start) * self.slots)


def cut_tiles(
    window: tuple[int, int], apart: bool, queries: int, outputs: int, targets: int, at_least: int
) -> list[Tile]:
    """Tiles that cover the window's steps × queries × outputs, with at most so many targets each (but at least one);
    at least so many tiles, as far as queries and steps can be divided."""
    first, last = window
    some = min(outputs, targets)
    rows = min(-(-queries // at_least), max(1, targets // some))

    acting = last - first
    if apart:
        acting = min(acting, max(1, targets // (some * rows)))
    if -(-queries // rows) * -(-outputs // some) < at_least:
        acting = min(acting, -(-(last - first) // at_least))

    return [
        Tile(steps, inputs, part, apart)
        for steps in cuts(first, last, acting)
        for inputs in cuts(0, queries, rows)
        for part in cuts(0, outputs, some)
    ]
