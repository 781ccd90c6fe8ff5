"""A loop without its Tracker, for comparison."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn


class NoTracker:
    """Stands where a Tracker would, and does what its author would do without one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self) -> Any:
        return nullcontext()

    def batch(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def clip_grad_norm_(self, limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def clip_grad_value_(self, limit: float) -> None:
        nn.utils.clip_grad_value_(self.model.parameters(), limit)
