"""Which way a step's targets are differentiated: every way's cost counted beforehand, from its passes and its bytes.

*Forward*: one directional derivative for each (part, group) gives all outputs of all queries at once. *Reverse*: one
gradient for each output gives every direction, down to the single parameter. *Streaming*: the reverse way for targets
that all queries are reduced to, with no copy of a gradient or a direction held.

The counts alone decide, so that a live run, its record and a run that is gone on with take the same way, and with it
the same numbers to the last bit; a trial would tell a few percent more, and decide anew each time.
"""

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal

from explaind_track.engine.memory import CPU_PASS
from explaind_track.engine.shared_passes import WORTH_SHARING

Way = Literal["forward", "reverse", "streaming"]

CALL = 2**17
"""What an operation costs in a forward pass of many directions, however small its tensors: in bytes that could be
written meanwhile. In a plain backward pass, a quarter of that; in one of each query's, as much."""

PASS_ROWS = 5
"""Directions in one forward pass at least, of two groups or so, where passes do not share the model's own values.
Measured on the modulo-113 Transformer (6 groups × 2 parts, a whole live step): one group at a time, 38 ms, since passes
repeat each other's work; two, 27 ms; all at once, 28 ms: they carry zeros."""

REVERSE_COST = 1.0
"""What a byte that a reverse pass writes costs, in units of one that a forward pass writes."""

GRADIENT = 1.2
"""What a byte of a single query's or output's gradient costs: it is written, stacked, multiplied with directions."""


@dataclass(frozen=True)
class Counts:
    """What a step's cost follows from: the query's sizes, the directions' and the model's."""

    queries: int
    """X, the inputs."""
    outputs: int
    """O, of each input, or of all together."""
    reduced: bool
    """Whether all inputs are reduced to one."""
    parts: int
    """R, the directions of each group."""
    groups: int
    """G."""
    parameters: int
    """Bytes of the parameters."""
    activations: int
    """Bytes that a pass writes for each input."""
    operations: int
    """That a pass calls."""
    memory: int
    """Bytes that a pass may take."""

    @cached_property
    def whole(self) -> int:
        """Bytes that a pass over all inputs writes."""
        return self.queries * self.activations

    @property
    def shares(self) -> bool:
        """Whether forward passes share the model's own values, so that only directions cost something."""
        return self.groups > 1 and min(self.whole, CPU_PASS) >= WORTH_SHARING

    @property
    def pass_rows(self) -> int:
        """Directions that go through the model in one forward pass, of at least one group.

        R G / r passes repeat a half of the model each (what lies before their groups carries no derivative), unless
        they share it, and call its operations; r directions together carry zeros through each other's layers, as much
        as r models, and as many copies of the parameters. The sum is least at
        r = √(R G (repeated + called) / (values + parameters)).
        """
        values = min(self.whole, CPU_PASS)
        repeated = 0 if self.shares else values / 2
        rows = self.parts * self.groups * (repeated + self.operations * CALL) / (values + self.parameters)
        return max(self.parts if self.shares else PASS_ROWS, round(sqrt(rows)))

    @property
    def forward(self) -> float:
        """The cost of the forward way, in bytes."""
        together = max(1, self.pass_rows // self.parts)  # groups
        passes = -(-self.groups // together)
        rows = self.parts * self.groups
        behind = (passes + 1) / (2 * passes)  # of the model, what lies behind the first group of a pass
        values = 1 if self.shares else passes * behind
        written = self.whole * (values + rows * behind + rows / passes)
        return passes * self.operations * CALL + written + rows / passes * self.parameters

    @property
    def reverse(self) -> float:
        """The cost of the reverse way, in bytes."""
        gradients = self.outputs * (1 if self.reduced else self.queries)
        called = (1 + self.outputs) * self.operations * CALL / (4 if self.reduced else 1)
        written = self.whole * (2 + self.outputs) + (gradients * GRADIENT + self.parts) * self.parameters
        return REVERSE_COST * (called + written)

    @property
    def fits_reverse(self) -> bool:
        """Whether the directions, θ_s(t) and a gradient of one target, twice while it is stacked, fit the memory."""
        return (self.parts + 3) * self.parameters <= self.memory


def choose(counts: Counts) -> Way:
    """The way that costs least, of those whose memory fits. Where the directions of a single target do not, it is
    streamed, which holds none of them."""
    if counts.reduced and counts.outputs == 1 and not counts.fits_reverse:
        return "streaming"
    if counts.reverse >= counts.forward:
        return "forward"
    if counts.fits_reverse:
        return "reverse"
    return "streaming" if counts.reduced else "forward"
