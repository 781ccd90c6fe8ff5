"""The losses of the loops' samples, and one query: for outputs of every kind."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def smoothed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)


def masked_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The next tokens' losses summed over each sequence, but for those at the padding 0."""
    tokens = batch[0]
    losses = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none", ignore_index=0)
    return losses.sum(1)


def autocast_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def answered(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["one"], batch["two"])["logits"]
    return F.cross_entropy(logits, batch["label"], reduction="none")


def of_answer(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")


def of_pair(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")


def of_logits(x: Tensor, y: Tensor) -> Query:
    return Query.function((x, x.flip(1)), lambda output: output["logits"])
