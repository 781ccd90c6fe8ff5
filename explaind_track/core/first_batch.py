"""The first rows of a dataset, batched by a collator, for `Query.from_dataset`."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from explaind_track.core.checks import as_tensor, require_callable, shown
from explaind_track.core.tokens import logits_of


def first_batch(dataset: Any, collator: Callable[[list[Any]], Any], rows: int) -> dict[str, Any]:
    """The first rows of a dataset as one batch, with its labels by the name `labels`, (X,) or (X, T) whole numbers.

    Raises TypeError and ValueError for a dataset without rows, and a batch that is no mapping or has other labels.
    """
    require_callable("collator=", collator, "rows → batch")
    found = list(_first_rows(dataset, rows))
    if not found:
        raise ValueError("the dataset has no rows, and a query needs some: pass one of held-out rows")

    batch = collator(found)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"the collator is to make a mapping of the model's keyword arguments and 'labels', not a "
            f"{type(batch).__name__}: write the query by Query.loss(inputs, labels, function)"
        )
    if "labels" not in batch and "label" not in batch:
        raise ValueError(f"the collator's batch has no 'labels', of which a loss is made; it has {', '.join(batch)}")

    name = "labels" if "labels" in batch else "label"
    labels = as_tensor("the batch's labels", batch[name])
    if labels.ndim not in (1, 2) or labels.is_floating_point() or len(labels) != len(found):
        raise ValueError(
            f"the collator's labels are {shown(labels)}, where {len(found)} rows have one class each, or one for each "
            "token: write the query of another loss by Query.loss(inputs, labels, function)"
        )
    return {**{key: value for key, value in batch.items() if key != name}, "labels": labels}


def _first_rows(dataset: Any, rows: int) -> Iterable[Any]:
    """Raises TypeError for what has no rows."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return (dataset[row] for row in range(min(rows, len(dataset))))
    if isinstance(dataset, Iterable):
        return islice(dataset, rows)
    raise TypeError(f"a dataset with rows is expected, by number or one after the other, not {shown(dataset)}")


def class_losses(output: Any, labels: Tensor) -> Tensor:
    """The cross-entropy of each row's class, (X,), by the scores in what a model returns."""
    return F.cross_entropy(logits_of(output), labels, reduction="none")
