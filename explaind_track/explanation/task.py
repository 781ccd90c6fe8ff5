"""The task: what belongs to a training job and only its author knows."""

from dataclasses import dataclass

from torch import nn

from explaind_track.core.groups import GroupSpec
from explaind_track.core.queries import Query
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.explanation.sample_axis import Data


@dataclass(frozen=True)
class Task:
    """A training job as `explain` and the command line take it: its model, what is asked, and its samples.

    Its fields have the names that `explain` has for them: `explain(trajectory, **vars(task))` asks its question.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from explaind_track import Query, Task
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> task = Task(
        ...     model=torch.nn.Linear(3, 2),
        ...     query=Query.margin(x[:4], y[:4]),
        ...     sample_loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        ...     data=lambda index: (x[index], y[index]),
        ... )
        >>> sorted(vars(task))
        ['data', 'groups', 'model', 'query', 'sample_loss']
    """

    model: nn.Module
    """The module that was trained; its own values do not matter."""
    query: Query
    groups: GroupSpec = None
    """See `resolve_groups`."""
    sample_loss: SampleLoss | None = None
    """`(model, batch)` → unreduced losses (N,); needed for anything about single samples."""
    data: Data | None = None
    """From an index tensor (N,) to the batch that `sample_loss` takes."""
