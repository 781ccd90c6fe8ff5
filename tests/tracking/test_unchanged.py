"""The Tracker never changes training: the same weights, buffers, optimizer state and random state, bit for bit."""

from functools import partial
from pathlib import Path

import pytest
import torch
from cases import OPTIMIZERS
from loops import LOOPS, Loop
from low_precision_loops import LOW_PRECISION_LOOPS
from models import MODELS, inputs
from outside_loops import OUTSIDE_LOOPS
from torch import nn
from untracked import compare_trained

from explaind_track import Query


def renormalized() -> nn.Module:
    """Its forward pass shortens rows of its weight in place, whoever asks."""
    return nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(16, 3))


RENORMALIZING = Loop(
    "embedding with max_norm", model=renormalized, inputs=lambda: torch.randint(0, 7, (24, 4)),
    query=lambda x, _: Query.outputs(x),
)  # fmt: skip

OF_MODELS = [Loop(f"model {name}", model=make, inputs=partial(inputs, make, 24)) for name, make in MODELS.items()]

OF_OPTIMIZERS = [
    Loop(f"optimizer {name}", optimizer=make, inputs=lambda: torch.randn(24, 4)) for name, make in OPTIMIZERS.items()
]

EVERY = [*LOOPS, *OUTSIDE_LOOPS, *LOW_PRECISION_LOOPS, RENORMALIZING, *OF_MODELS, *OF_OPTIMIZERS]


@pytest.mark.filterwarnings("ignore")  # each loop's own are for test_loops.py
@pytest.mark.parametrize("loop", EVERY, ids=lambda loop: loop.id)
def test_a_tracked_loop_is_the_untracked_one(loop: Loop, tmp_path: Path) -> None:
    plain = loop.run(tracked=False)
    after_plain = torch.get_rng_state()
    more = {} if loop.refused else {"audit_every": 3}
    tracked = loop.run(trajectory=tmp_path / "t", **more)
    after_tracked = torch.get_rng_state()

    assert torch.equal(after_plain, after_tracked)
    compare_trained((plain.model, plain.optimizer), (tracked.model, tracked.optimizer))
