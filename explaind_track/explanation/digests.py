"""Tells one question from another: digests of queries, functions and tensors."""

import hashlib
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.queries import Query
from explaind_track.core.tensors import tree_tensors


def fingerprint(*values: Any) -> str:
    """A digest of what the values print."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]


def _tensor_digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def query_digest(query: Query) -> str:
    """Tells one query from others: by its inputs and labels, and by what its target computes."""
    data = map(_tensor_digest, tree_tensors((query.inputs, query.labels)))
    return fingerprint(*data, query.reduction, query.module, function_digest(query.target))


def function_digest(function: Any) -> str:
    """Tells one function from others by its code, its constants and what it has closed over."""
    code: CodeType | None = getattr(function, "__code__", None)
    if code is None:
        return fingerprint(type(function).__qualname__, getattr(function, "__qualname__", ""))

    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return fingerprint(code.co_code, code.co_names, *map(_content, (*code.co_consts, *cells)))


def _content(value: Any) -> str:
    """What a constant or a closed-over value adds to a function's digest."""
    if isinstance(value, Tensor):
        return _tensor_digest(value)
    if isinstance(value, CodeType):
        return fingerprint(value.co_code, value.co_names, *map(_content, value.co_consts))
    return function_digest(value) if callable(value) else repr(value)
