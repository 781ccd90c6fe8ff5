"""The task: what belongs to a training job and only its author knows."""

from dataclasses import dataclass

from torch import nn

from explaind_track.core.groups import GroupSpec
from explaind_track.core.queries import Query
from explaind_track.engine.functional import SampleLoss
from explaind_track.explanation.sample_axis import Data


@dataclass(frozen=True)
class Task:
    """A training job as `explain` and the command line take it: its model, what is asked, and its samples."""

    model: nn.Module
    """The module that was trained; its own values do not matter."""
    query: Query
    groups: GroupSpec = None
    """See `resolve_groups`."""
    sample_loss: SampleLoss | None = None
    """`(model, batch)` → unreduced losses (N,); needed for anything about single samples."""
    data: Data | None = None
    """From an index tensor (N,) to the batch that `sample_loss` takes."""
