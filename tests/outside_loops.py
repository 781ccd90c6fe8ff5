"""Training loops in which something other than the optimizer changes the model, each with a Tracker in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from loops import Body, Loop, Run, batches, nesterov, second_layer
from models import batch_norm, mlp
from torch import Tensor, nn

from explaind_track import Query


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    """As for the critic of a Wasserstein GAN."""
    for parameter in model.parameters():
        parameter.clamp_(-0.25, 0.25)


def clamp_data(model: nn.Module) -> None:
    """The same, past autograd's count of writes."""
    for parameter in model.parameters():
        parameter.data.clamp_(-0.25, 0.25)


def between(change: Callable[[nn.Module], None]) -> Body:
    def body(run: Run) -> None:
        for index in batches():
            run.step(index)
            change(run.model)

    return body


def clamped_behind(run: Run) -> None:
    for index in batches():
        with run.tracker.step():
            run.optimizer.zero_grad()
            run.backward(index)
            run.optimizer.step()
            clamp(run.model)


def clamped_before(run: Run) -> None:
    for index in batches():
        with run.tracker.step():
            clamp(run.model)
            run.optimizer.zero_grad()
            run.backward(index)
            run.optimizer.step()


class OnlineAndTarget(nn.Module):
    """A network, and a copy of it that lags behind, as Q-learning has them."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.online(x) + 0.5 * self.target(x).tanh()


def online_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.online.parameters(), lr=0.02, weight_decay=0.1)


def target_copied(run: Run) -> None:
    for number, index in enumerate(batches()):
        run.step(index)
        if number % 2:
            run.model.target.load_state_dict(run.model.online.state_dict())


def other_optimizer(run: Run, parameters: list[nn.Parameter]) -> None:
    """Takes a step of its own between those that are watched."""
    other = torch.optim.SGD(parameters, lr=0.1)
    for index in batches():
        run.step(index)
        other.zero_grad()
        run.model(run.x).square().mean().backward()
        other.step()


def of_the_target(run: Run) -> None:
    other_optimizer(run, list(run.model.target.parameters()))


def of_the_same(run: Run) -> None:
    other_optimizer(run, list(run.model.parameters()))


def behind_one_backward(run: Run) -> None:
    """Another optimizer has the first layer, and takes its step behind the same backward pass, before this one's."""
    other = torch.optim.SGD(run.model[0].parameters(), lr=0.1)
    for index in batches():
        with run.tracker.step():
            other.zero_grad()
            run.optimizer.zero_grad()
            run.backward(index)
            other.step()
            run.optimizer.step()


def averaged(run: Run) -> None:
    """The mean of the weights is copied in at the end."""
    mean = torch.optim.swa_utils.AveragedModel(run.model)
    for index in batches():
        run.step(index)
        mean.update_parameters(run.model)
    run.model.load_state_dict(mean.module.state_dict())


def masked(run: Run) -> None:
    """Half of the weights are pruned, and kept so."""
    masks = {name: torch.rand_like(value) < 0.5 for name, value in run.model.named_parameters()}
    for index in batches():
        run.step(index)
        with torch.no_grad():
            for name, value in run.model.named_parameters():
                value.mul_(masks[name])


def statistics_reset(run: Run) -> None:
    for number, index in enumerate(batches()):
        run.step(index)
        if number % 2:
            run.model[1].reset_running_stats()


def reborn(run: Run) -> None:
    """Some weights start anew, and with them what the optimizer holds of them."""
    for number, index in enumerate(batches()):
        run.step(index)
        if number == 2:
            with torch.no_grad():
                run.model[0].weight[:2].normal_()
            for key in ("exp_avg", "exp_avg_sq"):
                run.optimizer.state[run.model[0].weight][key][:2] = 0


@contextmanager
def swapped(model: nn.Module) -> Iterator[None]:
    """The model with other weights, as averages of them are swapped in to be looked at."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        yield
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)


def swapped_and_restored(run: Run) -> None:
    for index in batches():
        run.step(index)
        with swapped(run.model):
            run.model(run.x)


def words(renormalized: float) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(7, 4, max_norm=renormalized), nn.Flatten(), nn.Linear(16, 3))


OUTSIDE_LOOPS = [
    Loop("weights clamped between steps", between(clamp)),
    Loop("weights clamped between steps, Nesterov", between(clamp), optimizer=nesterov),
    Loop("weights clamped through .data", between(clamp_data)),
    Loop("weights clamped behind the optimizer's step", clamped_behind),
    Loop("weights clamped before the forward pass", clamped_before),
    Loop("target network copied every other step", target_copied, OnlineAndTarget, online_adamw),
    Loop("second optimizer on other parameters", of_the_target, OnlineAndTarget, online_adamw),
    Loop("second optimizer on the same parameters", of_the_same),
    Loop("second optimizer behind the same backward pass", behind_one_backward, optimizer=second_layer),
    Loop("averaged weights copied in at the end", averaged),
    Loop("pruning masks", masked),
    Loop("batch-norm statistics reset", statistics_reset, batch_norm, nesterov),
    Loop("weights swapped for others and restored", swapped_and_restored),
    Loop("bfloat16 weights clamped between steps", between(clamp), optimizer=nesterov, dtype=torch.bfloat16),
    Loop("embedding with max_norm", model=words(0.5), inputs=lambda: torch.randint(0, 7, (24, 4)),
         query=lambda x, _: Query.outputs(x), jumps=True),
]  # fmt: skip
