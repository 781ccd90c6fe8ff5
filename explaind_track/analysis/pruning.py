"""Pruning by scores (§4.1): masks of what to keep, a model that runs without the rest, and what that costs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from explaind_track.core.checks import as_tensor, require_mapping, require_names, require_number, require_one_of
from explaind_track.core.faithfulness import faithfulness
from explaind_track.core.modules import parameters_of
from explaind_track.engine.functional import evaluation

Scores = Mapping[str, Tensor]
"""A number for every entry of every parameter, by name: `parameter_scores`, magnitudes, …"""

Masks = dict[str, Tensor]
"""True for what is kept, by name, of the parameter's shape; parameters that are not there are kept whole."""

By = Literal["global", "layer"]
Unit = Literal["parameter", "filter"]


def prune_masks(
    scores: Scores, keep: float, *, by: By = "global", exclude: Sequence[str] = (), unit: Unit = "parameter"
) -> Masks:
    """Keeps the fraction `keep` with the largest scores. Take `abs()` of signed scores first, where the size counts.

    `keep · n` of n units are kept, rounded (of each tensor, by layer); ties go to the earlier one.

    Args:
        scores: A number for every entry of every parameter, by name.
        keep: The fraction of units that is kept.
        by: "global" ranks all units together, "layer" within each parameter tensor (each module, for filters).
        exclude: Patterns of parameters that stay whole and do not count (`"head.*"`: the paper keeps the output layer).
        unit: "parameter" keeps or drops single entries; "filter" whole rows of the first axis (a convolution's filters,
            a linear layer's neurons) by their summed score, a module's `weight` and `bias` together.

    Returns:
        Masks, True for what is kept, of every parameter that is not excluded.

    Raises:
        ValueError: For a fraction outside of 0 to 1, a ranking or a unit that there is not, scores that are not finite,
            patterns that exclude nothing or everything, and filters of a module whose parameters share no first axis.

    Example:
        >>> import torch
        >>> from explaind_track.analysis import prune_masks
        >>> scores = {"weight": torch.tensor([[4.0, 1.0], [3.0, 0.0]]), "bias": torch.tensor([2.0, 0.5])}
        >>> masks = prune_masks(scores, keep=0.5)
        >>> masks["weight"].tolist(), masks["bias"].tolist()
        ([[True, False], [True, False]], [True, False])
        >>> prune_masks(scores, keep=0.5, unit="filter")["weight"].tolist()
        [[True, True], [False, False]]
    """
    keep = require_number("keep= (a fraction)", keep, 0, 1)
    require_one_of("by=", by, get_args(By))
    require_one_of("unit=", unit, get_args(Unit))
    require_mapping("the scores", scores, "those of parameter_scores")
    scores = {name: as_tensor(f"the score of {name!r}", score) for name, score in scores.items()}
    if exclude:
        exclude = require_names("exclude=", exclude, "parameter")

    names = _pruned_names(scores, exclude)
    layers = [(name,) for name in names] if unit == "parameter" else _layers(names)
    ranked = [_ranked(scores, layer, unit) for layer in layers]
    if by == "layer":
        kept = [_largest(values, keep) for values in ranked]
    else:
        whole = _largest(torch.cat(ranked), keep)
        kept = list(whole.split([len(values) for values in ranked]))
    return {
        name: _expanded(mask, scores[name], unit) for layer, mask in zip(layers, kept, strict=True) for name in layer
    }


def _pruned_names(scores: Scores, exclude: Sequence[str]) -> list[str]:
    """The parameters that no pattern excludes. Raises ValueError for idle patterns, and where nothing can be ranked."""
    idle = [pattern for pattern in exclude if not any(fnmatchcase(name, pattern) for name in scores)]
    if idle:
        raise ValueError(f"exclude={idle} matches no parameter; there are {', '.join(scores)}")
    names = [name for name in scores if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    if not names:
        raise ValueError(f"exclude={list(exclude)} leaves nothing to prune")

    bad = [name for name in names if not bool(scores[name].isfinite().all())]
    if bad:
        raise ValueError(f"the scores of {', '.join(bad[:5])} are not finite")
    return names


def _layers(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The parameters of each module, which share their filters."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return [tuple(members) for members in layers.values()]


def _ranked(scores: Scores, layer: Sequence[str], unit: str) -> Tensor:
    """One score for each unit of a layer."""
    if unit == "parameter":
        return scores[layer[0]].flatten()
    counts = {scores[name].shape[:1] for name in layer}
    if len(counts) > 1 or counts == {torch.Size()}:
        shapes = {name: tuple(scores[name].shape) for name in layer}
        raise ValueError(f"the parameters of one module do not share their first axis, so it has no filters: {shapes}")
    return torch.stack([scores[name].reshape(len(scores[name]), -1).sum(1) for name in layer]).sum(0)


def _largest(values: Tensor, fraction: float) -> Tensor:
    """True for the fraction of the values that is largest; of equal ones the earlier come first."""
    count = round(fraction * len(values))
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[values.argsort(descending=True, stable=True)[:count]] = True
    return mask


def _expanded(mask: Tensor, like: Tensor, unit: str) -> Tensor:
    """The mask of a layer's units, as one of a parameter's entries."""
    if unit == "parameter":
        return mask.reshape(like.shape)
    return mask.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """The fraction of entries that the masks drop."""
    dropped = sum(int((~mask).sum()) for mask in masks.values())
    return dropped / max(1, sum(mask.numel() for mask in masks.values()))


@contextmanager
def pruned(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Sets what the masks drop to 0 within a context; the model's own values come back after it, bit for bit.

    Sets parameters in place and keeps aside only what is dropped.

    Args:
        model: The module that is pruned.
        masks: By parameter, True for what is kept, of the parameter's shape.

    Returns:
        A context that gives the model.

    Raises:
        TypeError: For masks that are not boolean.
        ValueError: For masks that do not fit the model.

    Example:
        >>> import torch
        >>> from explaind_track.analysis import pruned
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> with pruned(model, {"weight": torch.tensor([[True, False]])}):
        ...     model(torch.ones(1, 2)).item()
        3.0
        >>> model(torch.ones(1, 2)).item()
        7.0
    """
    parameters = parameters_of(model)
    require_mapping("masks", masks, "those of prune_masks")
    numbers = [name for name, mask in masks.items() if getattr(mask, "dtype", None) is not torch.bool]
    if numbers:
        raise TypeError(
            f"masks are boolean tensors, True for what is kept; those of {', '.join(numbers[:5])} are not: write "
            "mask.bool(), or scores > threshold"
        )
    wrong = [
        f"{name}: mask {tuple(mask.shape)}, parameter {tuple(parameters[name].shape) if name in parameters else None}"
        for name, mask in masks.items()
        if name not in parameters or mask.shape != parameters[name].shape
    ]
    if wrong:
        raise ValueError(f"the masks do not fit the model. {'; '.join(wrong[:5])}")

    aside: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, mask in masks.items():
            gone = ~mask.to(parameters[name].device)
            aside[name] = parameters[name][gone]
            parameters[name][gone] = 0

    try:
        yield model
    finally:
        with torch.no_grad():
            for name, values in aside.items():
                parameters[name][~masks[name].to(values.device)] = values


@torch.no_grad()
def evaluate_pruning(model: nn.Module, masks: Mapping[str, Tensor], x: Any, y: Tensor) -> dict[str, float]:
    """Measures what pruning costs a classifier, in eval mode.

    Args:
        model: The module that is pruned; its outputs are logits or log-probabilities (X, O).
        masks: By parameter, True for what is kept, as `prune_masks` gives them.
        x: Inputs, what the model is called with.
        y: Their labels (X,).

    Returns:
        `accuracy` of the pruned model; `agreement`, the fraction of decisions that stay; `kl`, the mean
        KL(model ‖ pruned model) in nats; `sparsity`, the fraction of the masks' entries that are dropped.

    Raises:
        ValueError: For masks that do not fit the model.

    Example:
        >>> import torch
        >>> from explaind_track.analysis import evaluate_pruning, prune_masks
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
        >>> sizes = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
        >>> cost = evaluate_pruning(model, prune_masks(sizes, keep=0.8), x, y)
        >>> list(cost), cost["sparsity"]
        (['accuracy', 'agreement', 'kl', 'sparsity'], 0.2)
    """
    with evaluation(model):
        before = model(x)
        with pruned(model, masks):
            after = model(x)
    return {
        "accuracy": float((after.argmax(-1) == y).double().mean()),
        **faithfulness(before, after),
        "sparsity": sparsity(masks),
    }
