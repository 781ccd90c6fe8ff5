"""Labels and predictions of a batch's samples, where the batch and the model are a classifier's of the usual form."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.rng import random_state
from explaind_track.core.step import Batch, State
from explaind_track.core.tokens import logits_of
from explaind_track.engine.functional import Functional, evaluation

UNKNOWN = -1


def inputs_and_labels(data: Any) -> tuple[Any, Tensor] | None:
    """A batch's inputs as a model is called with them, and its classes (N,); None for batches of another form.

    Known are `(inputs, …, classes)` and a mapping with the classes under "labels".
    """
    inputs: Any
    if isinstance(data, Mapping):
        labels, inputs = data.get("labels"), {name: value for name, value in data.items() if name != "labels"}
    elif isinstance(data, tuple | list) and len(data) > 1:
        labels, inputs = data[-1], data[0] if len(data) == 2 else tuple(data[:-1])
    else:
        return None
    return (inputs, labels) if isinstance(labels, Tensor) and _are_classes(labels) else None


def labels_and_predictions(functional: Functional, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
    """The classes that the samples have, and those that the model finds at the state, in eval mode; (N,) int64 each.

    −1 for what is not known: batches of another form, and models that do not score the classes.
    """
    unknown = torch.full((batch.size,), UNKNOWN)
    found = inputs_and_labels(batch.data)
    if found is None:
        return unknown, unknown
    (inputs, labels), device = found, next(iter(state.parameters.values())).device

    def predict(model: torch.nn.Module) -> Any:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    try:
        with torch.no_grad(), evaluation(functional.model):
            scores = logits_of(functional.replay(state, random_state(device), predict))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, NotImplementedError):
        return labels.cpu().long(), unknown  # the model is not called in this way

    scores_classes = isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > int(labels.max())
    if not scores_classes or scores.shape[1] < 2:
        return labels.cpu().long(), unknown
    return labels.cpu().long(), scores.argmax(1).cpu()


def _are_classes(labels: Tensor) -> bool:
    return (
        labels.ndim == 1
        and not labels.is_floating_point()
        and labels.dtype is not torch.bool
        and len(labels) > 0
        and int(labels.min()) >= 0
    )
