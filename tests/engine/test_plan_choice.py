"""The choice of a way by its counts, and the memory that every way keeps to."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import check
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from explaind_track import Explainer, Quadrature, Query, Step, StepObserver
from explaind_track.engine import plan_choice
from explaind_track.engine.plan_choice import Counts, Way, choose
from explaind_track.engine.shared_passes import SharedPasses


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def layers(width: int, outputs: int, depth: int = 3) -> nn.Module:
    hidden = [layer for _ in range(depth - 2) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), *hidden, nn.Linear(width, outputs))


def one_step(model: nn.Module, x: Tensor) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    model(x).square().mean().backward()
    observer.before({})
    optimizer.step()
    return observer.after(0, {})


def in_groups(model: nn.Module, count: int) -> dict[str, tuple[str, ...]]:
    names = [name for name, _ in model.named_parameters()]
    count = min(count, len(names))
    return {f"g{k}": tuple(names[k * len(names) // count : (k + 1) * len(names) // count]) for k in range(count)}


def explained(step: Step, model: nn.Module, query: Query, groups: dict[str, tuple[str, ...]], memory: int) -> Explainer:
    explainer = Explainer(
        model, query, groups, [("step", "group")], ("kernel", "regularization"), Quadrature.fixed(1), memory=memory
    )
    explainer.add(step)
    return explainer


SHAPES = [(8, 10, 8), (8, 1, 30), (2, 40, 2)]
"""Groups, outputs, queries."""


@pytest.mark.parametrize("way", ["chosen", "forward", "reverse"])
@pytest.mark.parametrize("reduced", [False, True], ids=["each", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_is_a_bound_for_every_way(
    way: str, reduced: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, outputs, queries = shape
    torch.manual_seed(0)
    model, x = layers(48, outputs), torch.randn(queries, 8)
    step, query = one_step(model, x[:1]), Query.outputs(x)
    if way != "chosen":
        monkeypatch.setattr(plan_choice, "REVERSE_COST", 0.0 if way == "reverse" else float("inf"))

    size = sum(p.numel() * 4 for p in model.parameters())
    memory, live = 7 * size, LiveBytes()
    with live:
        explained(step, model, query.mean() if reduced else query, in_groups(model, groups), memory)
    # beside it: θ_s(t), a direction that alone is larger, copies by which the query was looked at, and predictions
    assert live.peak <= memory + 3 * size + 16 * outputs * queries


def counts(**changed: Any) -> Counts:
    sizes = {"queries": 100, "outputs": 10, "reduced": False, "parts": 2, "groups": 36, "parameters": 1_200_000}
    return Counts(**{**sizes, "activations": 18_000, "operations": 36, "memory": 2**28, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("way", "changed"),
    [
        ("forward", {}),  # whose reverse way takes 1,000 gradients, of 1.2 GB
        ("reverse", {"reduced": True}),
        ("forward", {"reduced": True, "groups": 1}),
        ("forward", {"reduced": True, "outputs": 1000}),
        ("reverse", {"outputs": 1, "queries": 10}),
        ("forward", {"outputs": 1, "groups": 4}),
        ("reverse", {"outputs": 1, "reduced": True}),
        ("streaming", {"outputs": 1, "reduced": True, "memory": 2**22}),
        ("streaming", {"outputs": 1, "reduced": True, "memory": 2**22, "groups": 1}),
        ("forward", {"outputs": 1, "queries": 10, "memory": 2**22}),  # no memory for the directions
    ],
)
def test_the_counts_choose(way: Way, changed: dict[str, Any]) -> None:
    assert choose(counts(**changed)) == way


class Shuffling(nn.Module):
    """Operations on memory in place, beside plain ones, on two groups of parameters and what is made of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.relu(self.first(x), inplace=True)
        total = torch.zeros(len(x), 16).copy_(hidden.detach()).mul_(0.5)
        total += hidden.flip(0).cumsum(0)
        total[:2] = x.sum()
        return self.second(total + hidden * total.std()) + torch.arange(3.0)


@pytest.mark.parametrize("make", [lambda: layers(16, 3), Shuffling], ids=["layers", "in place"])
def test_shared_values_are_those_of_passes_of_their_own(make: Callable[[], nn.Module], monkeypatch: Any) -> None:
    """Bit for bit, with a pass for each group either way."""
    torch.manual_seed(0)
    model, x, calls = make(), torch.randn(20, 8), []
    step, groups = one_step(model, x), in_groups(model, 4)
    known, found = {}, SharedPasses.__torch_dispatch__

    def counted(self: SharedPasses, *given: Any) -> Any:
        calls.append(known.setdefault(id(self), self))
        return found(self, *given)

    monkeypatch.setattr(SharedPasses, "__torch_dispatch__", counted)
    monkeypatch.setattr(Counts, "pass_rows", 2)
    influences = []
    for shares in (False, True):
        monkeypatch.setattr(Counts, "shares", shares)
        (influence,) = explained(step, model, Query.outputs(x), groups, 2**28).results()
        influences.append(influence.data["influence"].values)
    assert calls
    check(influences[1], influences[0], tolerance=0)
