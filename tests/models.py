"""The models that tests train: first those of the cases, on three inputs or tokens, then those of the loops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TOKENS = 4


class MLP(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(3, 4), nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class Attention(nn.Module):
    """Two heads, in which queries, keys and values are the same vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 4)
        self.project = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.project(self.embedding(tokens)).unflatten(-1, (2, 2)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads)
        return self.decoder(mixed.transpose(1, 2).flatten(-2)[:, -1])


class Tied(nn.Module):
    """Embedding and decoder are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(TOKENS, 3), nn.Linear(3, 3)
        self.decoder = nn.Linear(3, TOKENS, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(tokens).sum(1))))


class Matrices(nn.Module):
    """Without vectors, as Muon wants it: a tall matrix and a wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Scaled(MLP):
    """With a parameter that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=4, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3))


def normalized() -> nn.Module:
    """Its running statistics change with each step; a sample's loss depends on the whole batch."""
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def frozen() -> nn.Module:
    model = MLP()
    model.first.weight.requires_grad_(False)
    return model


INPUTS: dict[Any, tuple[int, ...]] = {convolution: (1, 6, 6), encoder: (2, 4)}


def inputs(model: Callable[[], nn.Module], rows: int) -> Tensor:
    if model in (Attention, Tied):
        return torch.randint(TOKENS, (rows, 3))
    return torch.randn(rows, *INPUTS.get(model, (3,)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: MLP(torch.relu),
    "scaled": Scaled,
    "attention": Attention,
    "convolution": convolution,
    "tied": Tied,
    "frozen": frozen,
    "encoder": encoder,
    "normalized": normalized,
}


class Dropped(nn.Module):
    """Dropout and batch norm: a sample's loss depends on chance and on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(torch.tanh(self.norm(self.first(x))), 0.4, self.training))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Tokens(nn.Module):
    """(B, T) tokens to (B, T, 5) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def frozen_norm() -> nn.Module:
    """One module is in eval mode while the others train."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))
    model[1].eval()
    return model


class TiedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Answers(nn.Module):
    """Takes two inputs by position and answers with a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, one: Tensor, two: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tanh(self.left(one)) * self.right(two)}


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Structured(nn.Module):
    """Answers with a dataclass, or with a tuple."""

    def __init__(self, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(4, 4), nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        return self.kind(self.head(hidden), hidden)


class DroppedEncoder(nn.Module):
    """Its attention gives a transposed view, on which a dropout draws its mask in the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            4, nhead=2, dim_feedforward=4, dropout=0.3, activation=F.gelu, batch_first=True
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(torch.stack([x, x.flip(1)], 1)).mean(1))


class Checkpointed(nn.Module):
    """Runs its body again in the backward pass, with the parameters that it has then."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, self.first(x), use_reentrant=self.use_reentrant))


class _Scale(torch.autograd.Function):
    """x · module.scale, whose backward pass asks the module for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, module: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ctx.module.scale, (gradient * x).sum(), None


class ReadsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(_Scale.apply(self.first(x), self.scale, self)))


class TwoHeads(nn.Module):
    """Of which the loss sees one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))
