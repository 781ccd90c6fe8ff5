"""An optimizer of one's own, and its update rule: the registered example."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track import Rule, update_rule


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al. 2023): θ ← θ − α (sign(c_s) + λ θ), c_s = β₁ m_{s−1} + (1−β₁) g_s."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                held = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.sub_(held.lerp(parameter.grad, 1 - beta1).sign_(), alpha=rate)
                held.lerp_(parameter.grad, 1 - beta2)


@update_rule.register
def _lion(optimizer: Lion, settings: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> Rule:
    """sign(c) = P c with P = 1/|c|; c in terms of m_s = β₂ m_{s−1} + (1−β₂) g_s is (β₁ m_s + (β₂−β₁) g_s) / β₂."""
    (beta1, beta2), rate, held = settings["betas"], settings["lr"], state["momentum"]
    own, new = beta1 / beta2, (beta2 - beta1) / beta2

    def precondition(direction: Tensor, seen: Tensor) -> Tensor:
        size = (held * own + seen * new).abs_()
        return direction.mul_(torch.where(size > 0, 1 / size, 0))

    decay = rate * settings["weight_decay"]
    return Rule(
        held, beta2, b=1 - beta2, e=rate * own, d=rate * new, precondition=precondition, decoupled=decay
    )  # fmt: skip


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def nesterov(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.05)
