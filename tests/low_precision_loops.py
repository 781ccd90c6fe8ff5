"""Training loops of parameters in bfloat16 and float16, each with a Tracker in it."""

import torch
import torch.nn.functional as F
from loops import Loop, accumulated, l1, nesterov, penalized
from models import TiedLayers, batch_norm, dropout
from torch import Tensor, nn


class Half(nn.Module):
    """In bfloat16, but for a norm in float32 and buffers of either; one parameter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.second.weight.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)).to(self.norm.weight.dtype)).to(x.dtype)
        return self.head(torch.tanh(self.second(hidden))) * self.scale


def half() -> nn.Module:
    model = Half().bfloat16()
    model.norm.float()
    return model


def in_float32(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, fused=True)


def foreach(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, foreach=True)


def coarse(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)


LOW_PRECISION_LOOPS = [
    Loop("bfloat16 weights", dtype=torch.bfloat16),
    Loop("bfloat16 weights, foreach", optimizer=foreach, dtype=torch.bfloat16),
    Loop("bfloat16 weights, fused", optimizer=fused, dtype=torch.bfloat16),
    Loop("bfloat16 weights, steps below their rounding", optimizer=coarse, dtype=torch.bfloat16),
    Loop("bfloat16 weights, Nesterov", optimizer=nesterov, dtype=torch.bfloat16),
    Loop("bfloat16 weights, auxiliary loss", penalized, optimizer=nesterov, dtype=torch.bfloat16,
         options={"auxiliary": {"l1": l1}}),
    Loop("bfloat16 weights, accumulation", accumulated, dtype=torch.bfloat16),
    Loop("bfloat16 weights, warm start", warm=3, optimizer=nesterov, dtype=torch.bfloat16),
    Loop("bfloat16 weights and batch norm", model=batch_norm, optimizer=nesterov, dtype=torch.bfloat16),
    Loop("bfloat16 weights, dropout", model=dropout, dtype=torch.bfloat16),
    Loop("bfloat16 weights, tied", model=TiedLayers, optimizer=nesterov, dtype=torch.bfloat16),
    Loop("bfloat16 beside float32, some frozen", model=half, optimizer=nesterov, sample_loss=in_float32,
         dtype=torch.bfloat16, mixed=True),
    Loop("float16 weights", optimizer=nesterov, dtype=torch.float16),
    Loop("float16 weights, no momentum", optimizer=plain_sgd, dtype=torch.float16),
]  # fmt: skip
