"""Labels and predictions of a batch's samples: of classifiers of the usual form, and the tokens of language models."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.rng import random_state
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import cuts, tree_slice
from explaind_track.core.tokens import logits_of
from explaind_track.engine.functional import Functional, evaluation

UNKNOWN = -1

ROWS_AT_ONCE = 4
"""Sequences whose scores over a vocabulary are held at a time."""


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


@dataclass(frozen=True)
class SampleTokens:
    """Token ids of one sample; below zero where there is padding, or a label that is ignored."""

    ids: list[int]
    labels: list[int]
    """Empty where they are the ids themselves, as of most causal models, or not known."""
    predictions: list[int]
    """The likeliest token at each place, whether that is the place's own or the next; empty where it is not known."""


def tokens_and_predictions(functional: Functional, state: State, batch: Batch) -> list[SampleTokens]:
    """The tokens of each sample of a mapping with `input_ids`, and what the model takes for them, in eval mode; empty
    for other batches."""
    data = batch.data
    ids = data.get("input_ids") if isinstance(data, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return []

    mask, labels = data.get("attention_mask"), data.get("labels")
    has_mask = isinstance(mask, Tensor) and mask.shape == ids.shape
    shown = ids.masked_fill(mask == 0, UNKNOWN) if has_mask else ids
    is_other = isinstance(labels, Tensor) and labels.ndim == 2 and not _are_same(labels, ids)
    predicted = [_likeliest(functional, state, batch, rows) for rows in cuts(0, len(ids), ROWS_AT_ONCE)]
    known = [one for one in predicted if one is not None]
    found = torch.cat(known) if len(known) == len(predicted) else None
    if found is not None and found.shape == ids.shape:
        found = found.masked_fill(shown.cpu() == UNKNOWN, UNKNOWN)
    nothing: list[list[int]] = [[] for _ in range(len(ids))]
    columns = (
        shown.tolist(),
        labels.tolist() if is_other else nothing,
        nothing if found is None else found.tolist(),
    )
    return [SampleTokens(*row) for row in zip(*columns, strict=True)]


def _are_same(labels: Tensor, ids: Tensor) -> bool:
    return labels.shape == ids.shape and bool(((labels == ids) | (labels < 0)).all())


def _likeliest(functional: Functional, state: State, batch: Batch, rows: slice) -> Tensor | None:
    """The likeliest token at each place of some rows, (n, T) int64; None for a model that does not tell."""
    taken = signature(functional.model.forward).parameters
    content: Mapping[str, Any] = tree_slice(batch.data, rows.start, rows.stop)
    inputs = {name: value for name, value in content.items() if name in taken and name not in ("labels", "label")}

    def predict(model: torch.nn.Module) -> Any:
        return model(**inputs)

    device = next(iter(state.parameters.values())).device
    try:
        with torch.no_grad(), evaluation(functional.model):
            scores = logits_of(functional.replay(state, random_state(device), predict))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, NotImplementedError):
        return None  # the model is not called in this way
    if not isinstance(scores, Tensor) or scores.ndim != 3:
        return None
    return scores.argmax(-1).cpu()


def _are_classes(labels: Tensor) -> bool:
    return (
        labels.ndim == 1
        and not labels.is_floating_point()
        and labels.dtype is not torch.bool
        and len(labels) > 0
        and int(labels.min()) >= 0
    )
