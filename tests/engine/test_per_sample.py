"""A batch's losses, gradients and influences, as training ran it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check
from torch import Tensor, nn

from explaind_track import Batch, State, Step, StepObserver
from explaind_track.analysis.parameter_scores import parameter_scores
from explaind_track.core.queries import Query
from explaind_track.core.rng import random_state
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.engine.sample_influence import SampleInfluence, through_own_step
from explaind_track.errors import ForwardModeFallbackWarning, GradientMismatchWarning
from explaind_track.record.trajectory import Trajectory
from explaind_track.tracking.tracker import Tracker


class Dropped(nn.Module):
    """With dropout, batch statistics, and a parameter that has no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(torch.tanh(self.norm(self.first(x))), 0.4, self.training)) * self.scale


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(model: nn.Module) -> tuple[Step, list[Tensor], list[dict[str, Tensor]]]:
    """A step from two batches, the losses that training saw, and the gradients of every sample in it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = dict(model.named_parameters())
    observer = StepObserver(optimizer, parameters)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    batches, seen, gradients = [], [], []
    for size in (4, 3):
        data = (torch.randn(size, 3, dtype=torch.float64), torch.randint(0, 3, (size,)))
        before = random_state(data[0].device)
        losses = sample_loss(model, data)
        losses.mean().mul(0.5).backward(retain_graph=True)
        rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
        gradients += [dict(zip(parameters, row, strict=True)) for row in rows]
        batches.append(Batch(size, 0.5 / size, None, data, before))
        seen.append(losses.detach())
    observer.before(buffers)
    optimizer.step()
    return observer.after(0, buffers, tuple(batches)), seen, gradients


def test_samples_act_with_the_losses_and_gradients_that_training_saw() -> None:
    torch.manual_seed(0)
    model = Dropped().double()
    step, losses, gradients = trained(model)
    samples = PerSampleGradients(model, sample_loss, alone=False)
    features = {name: torch.randn_like(update.before) for name, update in step.updates.items()}
    torch.manual_seed(9)  # other random numbers than in training
    influence = SampleInfluence.of(samples, step, features)
    check(influence.loss, torch.cat(losses))
    assert influence.index.tolist() == [-1] * 7
    wanted = torch.stack([sum((features[n] * row[n]).sum() for n in features) for row in gradients])  # type: ignore[misc]
    check(influence.influence, wanted * 0.1 * influence.weight)


def test_a_step_that_moves_nothing_is_not_influenced() -> None:
    torch.manual_seed(0)
    model = Dropped().double()
    step, *_ = trained(model)
    assert through_own_step(PerSampleGradients(model, sample_loss), step, {}).tolist() == [0.0] * 7


def test_gradients_and_their_norms_are_those_of_the_samples() -> None:
    torch.manual_seed(0)
    model = Dropped().double().eval()
    step, losses, gradients = trained(model)
    samples = PerSampleGradients(model, sample_loss)
    for batch, loss, rows in zip(step.batches, losses, (gradients[:4], gradients[4:]), strict=True):
        total, found, norms = samples.gradient_and_norms(step.before, batch)
        check(found, loss)
        check(norms, torch.stack([sum(value.square().sum() for value in row.values()) for row in rows]).sqrt())  # type: ignore[misc]
        at_once = samples.gradient(step.before, batch, 1.0, total)
        for name in total:
            check(total[name], sum(row[name] for row in rows) * (0.5 / len(rows)), 1.0)  # type: ignore[arg-type]
            check(total[name], at_once[name], 1.0)


@pytest.mark.parametrize("broken", [lambda loss: loss.mean(), lambda loss: loss[:, None]])
def test_losses_that_are_not_one_for_each_sample_are_refused(broken: Any) -> None:
    model = Dropped().double()
    step, *_ = trained(model)
    samples = PerSampleGradients(model, lambda model, batch: broken(sample_loss(model, batch)))
    with pytest.raises(ValueError, match="unreduced losses of its 4 samples"):
        samples.losses(step.before, step.batches[0])


def test_batch_statistics_leave_no_gradient_to_a_sample() -> None:
    model = Dropped().double()
    state = State(dict(model.named_parameters()), dict(model.named_buffers()))
    batch = Batch(2, 0.5, None, (torch.randn(2, 3).double(), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="'norm' normalises with the statistics of its batch"):
        PerSampleGradients(model, sample_loss).gradient_and_norms(state, batch)


class Reversed(torch.autograd.Function):
    """Does nothing ahead, and turns the gradient around."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(Reversed.apply(self.first(x))))


def test_gradients_that_are_no_derivative_are_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Adversarial().double(), torch.randn(8, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(model, optimizer, queries={}, trajectory=tmp_path / "t")
    with tracker.step():
        model(x).square().mean().backward()
        optimizer.step()
    tracker.finish()
    slower = pytest.warns(ForwardModeFallbackWarning)
    with slower, pytest.warns(GradientMismatchWarning, match="is not the derivative of its forward pass"):
        parameter_scores(Trajectory.open(tmp_path / "t"), model, Query.outputs(x), progress=False)
