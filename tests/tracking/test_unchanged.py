"""The Tracker never changes training: the same weights, buffers, optimizer state and random state, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LOOPS, Loop
from torch import Tensor, nn

from explaind_track import Query


def bits(tree: Any) -> list[Tensor]:
    """All tensors and numbers of a tree of mappings and lists, in order."""
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in bits(value)]
    if isinstance(tree, list | tuple):
        return [tensor for value in tree for tensor in bits(value)]
    return [torch.as_tensor(tree)] if isinstance(tree, Tensor | float | int) else []


def renormalized() -> nn.Module:
    """Its forward pass shortens rows of its weight in place, whoever asks."""
    return nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(16, 3))


RENORMALIZING = Loop(
    "embedding with max_norm", model=renormalized, inputs=lambda: torch.randint(0, 7, (24, 4)),
    query=lambda x, _: Query.outputs(x),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # each loop's own are for test_loops.py
@pytest.mark.parametrize("loop", [*LOOPS, RENORMALIZING], ids=lambda loop: loop.id)
def test_a_tracked_loop_is_the_untracked_one(loop: Loop, tmp_path: Path) -> None:
    plain = loop.run(tracked=False)
    after_plain = torch.get_rng_state()
    more = {} if loop.refused else {"audit_every": 3}
    tracked = loop.run(trajectory=tmp_path / "t", **more)
    after_tracked = torch.get_rng_state()

    assert torch.equal(after_plain, after_tracked)
    for one, two in ((plain.model, tracked.model), (plain.optimizer, tracked.optimizer)):
        wanted, found = bits(one.state_dict()), bits(two.state_dict())
        assert len(wanted) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert [module.training for module in plain.model.modules()] == [m.training for m in tracked.model.modules()]
    for one, two in zip(plain.model.parameters(), tracked.model.parameters(), strict=True):
        assert one.requires_grad == two.requires_grad
        assert (one.grad is None) == (two.grad is None)
