"""A batch that has no index, and the names of samples, as a segment's header and its tensors hold them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_track.core.alterations import Alteration, Alterations
from explaind_track.core.checks import shown
from explaind_track.errors import TrajectoryError
from explaind_track.record.validation import AlteredEntry, checked


class Fields(dict[str, Any]):
    """A recorded batch whose parts have names: they are had by `batch["x"]` and by `batch.x`, whichever it was."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the recorded batch has no {name!r}, but {', '.join(self)}") from None


def as_json(tree: Any, put: Callable[[Tensor], Any]) -> Any:
    """A batch as JSON has it; `put` keeps a tensor and gives its place. See `refuse_unrecordable`."""
    if isinstance(tree, Tensor):
        return put(tree)
    if is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in fields(tree)}
    if isinstance(tree, Mapping):
        return {key: as_json(item, put) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        return [as_json(item, put) for item in tree]
    return tree.tolist() if isinstance(tree, np.ndarray | np.generic) else tree


def refuse_unrecordable(tree: Any, name: str = "the batch") -> None:
    """Raises TypeError for a batch that no file can hold as it is: with other things in it than tensors, numbers and
    words, or with names that are no words."""
    if is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in fields(tree)}
    if isinstance(tree, Mapping):
        parts = [(f"{name}[{key!r}]", item, isinstance(key, str)) for key, item in tree.items()]
    elif isinstance(tree, tuple | list):
        parts = [(f"{name}[{place}]", item, True) for place, item in enumerate(tree)]
    else:
        parts = []
        is_array = isinstance(tree, np.ndarray) and tree.dtype.kind in "biufU"
        if not (is_array or tree is None or isinstance(tree, Tensor | str | int | float | np.generic)):
            raise TypeError(_unrecordable(name, tree))

    for part, item, is_named in parts:
        if not is_named:
            raise TypeError(_unrecordable(part, "a name that is no word"))
        refuse_unrecordable(item, part)


def _unrecordable(name: str, value: Any) -> str:
    return (
        f"a batch without index= is recorded itself, but {name} is {shown(value)}, which no record can hold: pass "
        "index=, the numbers or names of its samples, or leave that out of the batch"
    )


def as_bytes(names: Sequence[str]) -> Tensor:
    """The names of samples as a file holds them: a list in JSON."""
    return torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)


def words_of(content: Tensor) -> tuple[str, ...]:
    """The names that `as_bytes` was given. Raises ValueError or TrajectoryError for anything else."""
    names: list[str] = checked(json.loads(content.numpy().tobytes()), list[str], "a batch's list of names")
    return tuple(names)


def altered_json(altered: Alterations, weight: Callable[[Tensor | float], Any]) -> dict[str, Any]:
    """What was done to a step's gradient; `weight` keeps weights and gives their place."""
    changes = [[change.kind, change.amount] for change in altered.changes]
    return {"weight": weight(altered.loss_weight), "changes": changes}


def altered_of(entry: AlteredEntry, weight: Callable[[Any], Tensor | float]) -> Alterations:
    """What `altered_json` was given; `weight` finds weights by their place."""
    return Alterations(weight(entry.weight), tuple(Alteration(*change) for change in entry.changes))


FEW = 2**20
"""A batch may have so many samples whatever was recorded of it: they may have been made from a seed."""


def refuse_other_size(
    size: int,
    weights: Sequence[Tensor | float],
    index: Tensor | None,
    ids: Sequence[str] | None,
    data: Any,
    name: object,
) -> None:
    """Raises TrajectoryError where a recorded batch, in the file of that name, cannot have so many samples."""
    known = [tuple(value.shape) for value in (*weights, index) if isinstance(value, Tensor)]
    known += [(len(ids),)] if ids is not None else []
    if any(shape != (size,) for shape in known) or size > max(FEW, _leaves(data), size if known else 0):
        raise TrajectoryError(f"{name} has a batch of {size} samples, and for it the shapes {known}")


def _leaves(tree: Any) -> int:
    """The numbers and words in a batch."""
    if isinstance(tree, Tensor):
        return tree.numel()
    if isinstance(tree, dict | tuple):
        return sum(map(_leaves, tree.values() if isinstance(tree, dict) else tree))
    return 1
