"""The audit finds what engines have got wrong: each fault is put back into this one, and has to be told of.

What it cannot find, being told of a single step: that steps do not follow on each other (the record's keyframes prove
that they do), and analyses of influences that are right (scores, masks, names of rows), which have tests of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explaind_track import Query, Tracker, Trajectory, audit
from explaind_track.analysis import Audit
from explaind_track.core.step import State
from explaind_track.engine import batch_losses, derivatives, functional, per_sample, renormalizing
from explaind_track.engine.functional import Functional

Patch = Callable[[pytest.MonkeyPatch], None]
TOKENS = 7
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the engine's own checks, which are not asked here


class Checkpointed(nn.Module):
    """Runs a block once more in the backward pass, with the parameters that it has then."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.block, x, use_reentrant=False))
        return out


class ReadsLater(nn.Module):
    """Its autograd function looks at the module in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        head = self.head

        class Times(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
                context.save_for_backward(hidden)
                return hidden @ weight.T

            @staticmethod
            def backward(context: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
                (hidden,) = context.saved_tensors
                return slope @ head.weight, slope.T @ hidden

        out: Tensor = Times.apply(torch.tanh(self.body(x)), head.weight) + head.bias  # type: ignore[no-untyped-call]
        return out


class Shortening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, 4, max_norm=1.0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(x[:, :3].abs().mul(3).long() % TOKENS).mean(1))
        return out


class Attending(nn.Module):
    """Dropout on a transposed activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x[:, None, :] * torch.ones(3, 1, dtype=x.dtype)).mean(1))
        return out


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(3)).double(), torch.arange(12) % 3
QUERY = Query.outputs(X[:3])


def recorded(make: Callable[[], nn.Module], directory: Path, weight: Any = "mean") -> nn.Module:
    """A model that was trained for four steps, the values of the last of which are its own."""
    torch.manual_seed(0)
    model = make().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Tracker(model, optimizer, queries={}, trajectory=directory, sample_loss=sample_loss) as tracker:
        for index in torch.arange(12).split(3):
            batch = X[index], Y[index]
            with tracker.step():
                optimizer.zero_grad()
                tracker.batch(batch, index=index, weight=weight)
                sample_loss(model, batch).mean().backward()
                optimizer.step()
    return model


def audited(model: nn.Module, directory: Path) -> Audit:
    return audit(
        Trajectory.open(directory), model, QUERY, step=1, sample_loss=sample_loss, nodes=2, samples=2, targets=2,
        data=lambda index: (X[index], Y[index]),
    )  # fmt: skip


# ------------------------------------------------------------------ the faults


def no_proofs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(functional, "prove_same", lambda *_: None)
    patch.setattr(per_sample, "prove_same", lambda *_: None)
    patch.setattr(derivatives, "_prove_adjoint", lambda *_: None)


def gradients_taken_later(patch: pytest.MonkeyPatch) -> None:
    """Backward passes run when the model has its own parameters back."""

    def held(self: derivatives.PointFunction, parameters: Any, use: Callable[[Tensor], Any]) -> Any:
        with torch.enable_grad():
            return use(self._run(parameters, lambda value: value))

    no_proofs(patch)
    patch.setattr(derivatives.PointFunction, "held", held)
    patch.setattr(per_sample, "vjp_rows", lambda function, primals: derivatives.vjp_rows(function, primals))


def another_mask(patch: pytest.MonkeyPatch) -> None:
    """A pass that gives other losses than training's is taken for it."""
    patch.setattr(derivatives, "_relative", lambda *_: 0.0)


def shortened_unseen(patch: pytest.MonkeyPatch) -> None:
    """As ordinary autograd, which does not see what a forward pass does to its parameters."""
    right = renormalizing._shortened
    patch.setattr(renormalizing, "_shortened", lambda *given, differentiable: right(*given, differentiable=False))


def own_buffers(patch: pytest.MonkeyPatch) -> None:
    """The model's statistics of today in the place of the step's."""
    right = Functional.__call__

    def wrong(self: Functional, state: State, function: Callable[[nn.Module], Any]) -> Any:
        return right(self, State(state.parameters, {}), function)

    patch.setattr(Functional, "__call__", wrong)


def other_random_numbers(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(_: Any) -> Iterator[None]:
        yield

    another_mask(patch)
    patch.setattr(functional, "replayed_random_state", nothing)
    patch.setattr(batch_losses, "replayed_random_state", nothing)


FAULTS: dict[str, tuple[Callable[[], nn.Module], Patch, set[str]]] = {
    "checkpoints, gradients taken later": (Checkpointed, gradients_taken_later, {"influence of parameters", "sample"}),
    "a function that reads the module, gradients taken later": (ReadsLater, gradients_taken_later, {"sample"}),
    "another dropout mask": (Attending, another_mask, {"sample"}),
    "other random numbers": (Attending, other_random_numbers, {"sample"}),
    "rows that the forward pass writes to": (Shortening, shortened_unseen, {"kernel through embedding"}),
    "buffers of another time": (normalized, own_buffers, {"prediction before", "kernel through 0"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, fault, expected = FAULTS[name]
    model = recorded(make, tmp_path)
    right = audited(model, tmp_path)
    assert right.ok, str(right)
    fault(monkeypatch)
    wrong = audited(model, tmp_path)
    found = {"sample" if finding.what.startswith("sample") else finding.what for finding in wrong.wrong}
    assert expected <= found, str(wrong)


@pytest.mark.parametrize("weight", [1 / 4, [1.0, 0.0, 0.0]])
def test_weights_that_are_not_trainings_are_found(weight: Any, tmp_path: Path) -> None:
    wrong = audited(recorded(normalized, tmp_path, weight), tmp_path)
    assert [finding.what for finding in wrong.wrong] == ["gradient of the batches"]
