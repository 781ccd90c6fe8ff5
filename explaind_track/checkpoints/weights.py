"""Puts the weights of a file into a model, after every name, shape and type has been compared."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from explaind_track.core.checks import first_few
from explaind_track.core.modules import plain_name
from explaind_track.core.tensors import same_bits
from explaind_track.errors import CheckpointError

NOT_LEARNED = (r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$", r"attention\.(masked_)?bias$", r"position_ids$")
"""Constants that older versions of transformers wrote along with the weights."""


def put_into(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights into the model in place, tied ones once; see `Checkpoint.load`."""
    pairs = dict(fitted(model, weights, path))
    with torch.no_grad():
        for target, source in pairs.values():
            target.copy_(source)


def fitted(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Every tensor of the model that is saved, by its first name, with the file's for it.

    Raises:
        CheckpointError: Names, shapes or types differ. All that do are told.
    """
    of_file = _by_plain_name(weights)
    targets = _tensors(model)
    complaints: dict[str, list[str]] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    for names, target in targets:
        sources = [of_file[name] for name in names if name in of_file]
        problem = _problem(names, target, sources, model)
        if problem is not None:
            complaints.setdefault(problem[0], []).append(problem[1])
        else:
            found[names[0]] = (target, sources[0])

    known = {name for names, _ in targets for name in names}
    ignored = [re.compile(pattern) for pattern in (*NOT_LEARNED, *_ignored_by(model))]
    foreign = [name for name in of_file if name not in known and not any(p.search(name) for p in ignored)]
    if foreign:
        complaints["the file holds what the model has not"] = foreign
    if complaints:
        told = "; ".join(f"{what}: {first_few(which)}" for what, which in complaints.items())
        raise CheckpointError(f"{path} is no checkpoint of this {type(model).__name__}. {told}")
    yield from found.items()


def _problem(names: list[str], target: Tensor, sources: list[Tensor], model: nn.Module) -> tuple[str, str] | None:
    """Why the model's tensor cannot be had from these of the file, and a word on which it is."""
    name = names[0]
    if not sources:
        return "the file lacks", name
    source = sources[0]

    # of another shape, type or tie
    if source.shape != target.shape:
        detail = f"{name} (file {tuple(source.shape)}, model {tuple(target.shape)})"
        if source.shape[1:] == target.shape[1:] and _is_vocabulary(model, names):
            return (
                "other numbers of tokens, as another tokenizer's vocabulary has them (make the model from the "
                "checkpoint's own config, with its tokenizer)",
                detail,
            )
        return "other shapes", detail
    if not _holds(target.dtype, source.dtype):
        advice = "make the model float32" if source.dtype.itemsize <= 4 else "make the model float64"
        return f"types that would lose digits ({advice})", f"{name} (file {source.dtype}, model {target.dtype})"
    if any(not same_bits(source, other) for other in sources[1:]):
        return "weights tied in the model, but not in the file (make it with tie_word_embeddings=False)", " = ".join(
            names
        )
    return None


def _holds(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether every number of the one type is one of the other."""
    if target == source:
        return True
    return target.is_floating_point and source.is_floating_point and torch.promote_types(target, source) == target


def _is_vocabulary(model: nn.Module, names: list[str]) -> bool:
    """Whether the rows of the parameter belong to tokens."""
    modules = dict(model.named_modules())
    owners = [next((m for key, m in modules.items() if plain_name(f"{key}.weight") == name), None) for name in names]
    is_head = any("head" in name or "embed_out" in name for name in names)
    return is_head or any(isinstance(owner, nn.Embedding) for owner in owners)


def _tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The model's parameters and saved buffers, each with all of its names."""
    saved = {plain_name(name) for name in model.state_dict()}
    found: dict[int, tuple[list[str], Tensor]] = {}
    for pairs in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in pairs:
            if plain_name(name) in saved:
                found.setdefault(id(tensor), ([], tensor.detach()))[0].append(plain_name(name))
    return list(found.values())


def _by_plain_name(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors by the names they have without what wrappers (DDP, torch.compile) put in front."""
    names = list(weights)
    wrapped = bool(names) and all(name.startswith("module.") for name in names)
    return {plain_name(name.removeprefix("module.") if wrapped else name): weights[name] for name in names}


def _ignored_by(model: nn.Module) -> list[str]:
    """Patterns of what the model's class itself leaves out when it reads files."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
