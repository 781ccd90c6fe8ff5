"""The one list of cases, models × optimizers × loops × targets, that every test of the engine runs over."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from models import MLP, MODELS, Matrices, Tied, encoder, inputs
from optimizers import Lion
from reference import Reference, Rule, Training, Turn, copies, gauss_legendre, reference
from torch import Tensor, nn

from explaind_track import Batch, Query, Step, StepObserver, resolve_groups
from explaind_track.core.groups import Groups, GroupSpec

SAMPLES, QUERIES = 7, 3


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - F.one_hot(y, 3)).square().sum(1)


def l1(model: nn.Module) -> Tensor:
    return sum((0.05 * p.abs().sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))


Make = Callable[[nn.Module], torch.optim.Optimizer]
"""Makes a model's optimizer."""


def optimizer(cls: type[torch.optim.Optimizer], lr: float, **settings: Any) -> Make:
    return lambda model: cls(model.parameters(), lr=lr, **settings)


def adamw_in_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": biases, "lr": 0.03, "weight_decay": 0.0}, {"params": weights, "betas": (0.7, 0.95)}],
        lr=0.1, weight_decay=0.3,
    )  # fmt: skip


def sgd_in_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.05, "momentum": 0.0}, {"params": others}], 0.2, momentum=0.8)


ADAMW = optimizer(torch.optim.AdamW, 0.05, betas=(0.8, 0.9), weight_decay=0.2)
NESTEROV = optimizer(torch.optim.SGD, 0.2, momentum=0.7, nesterov=True, weight_decay=0.1)
OPTIMIZERS: dict[str, Make] = {
    "adamw": ADAMW,
    "adamw-groups": adamw_in_groups,
    "adamw-amsgrad": optimizer(torch.optim.AdamW, 0.1, betas=(0.8, 0.5), weight_decay=0.2, amsgrad=True),
    "adamw-maximize": optimizer(torch.optim.AdamW, 0.05, weight_decay=0.2, maximize=True),
    "adam": optimizer(torch.optim.Adam, 0.05, betas=(0.8, 0.9)),
    "adam-decay": optimizer(torch.optim.Adam, 0.05, betas=(0.8, 0.9), weight_decay=0.3),
    "adam-decay-maximize": optimizer(torch.optim.Adam, 0.05, weight_decay=0.3, amsgrad=True, maximize=True),
    "sgd": optimizer(torch.optim.SGD, 0.3),
    "sgd-decay": optimizer(torch.optim.SGD, 0.3, weight_decay=0.2),
    "sgd-momentum-decay": optimizer(torch.optim.SGD, 0.2, momentum=0.8, weight_decay=0.2),
    "sgd-dampening-decay": optimizer(torch.optim.SGD, 0.4, momentum=0.8, dampening=0.4, weight_decay=0.2),
    "sgd-nesterov-decay": NESTEROV,
    "sgd-nesterov-maximize": optimizer(
        torch.optim.SGD, 0.1, momentum=0.7, nesterov=True, weight_decay=0.2, maximize=True
    ),
    "sgd-groups": sgd_in_groups,
    "adamw-foreach": optimizer(torch.optim.AdamW, 0.05, weight_decay=0.2, foreach=True),
    "adamw-fused": optimizer(torch.optim.AdamW, 0.05, weight_decay=0.2, fused=True),
    "sgd-fused": optimizer(torch.optim.SGD, 0.2, momentum=0.8, weight_decay=0.2, fused=True),
    "nadam": optimizer(torch.optim.NAdam, 0.05, betas=(0.8, 0.9), weight_decay=0.2, momentum_decay=0.1),
    "nadamw": optimizer(torch.optim.NAdam, 0.05, weight_decay=0.2, decoupled_weight_decay=True, maximize=True),
    "radam": optimizer(torch.optim.RAdam, 0.05, betas=(0.8, 0.9), weight_decay=0.2),
    "radamw": optimizer(torch.optim.RAdam, 0.05, betas=(0.8, 0.9), weight_decay=0.2, decoupled_weight_decay=True),
    "rmsprop": optimizer(torch.optim.RMSprop, 0.05, alpha=0.8, weight_decay=0.2),
    "rmsprop-momentum": optimizer(torch.optim.RMSprop, 0.02, alpha=0.8, momentum=0.7, weight_decay=0.2, centered=True),
    "adagrad": optimizer(torch.optim.Adagrad, 0.2, lr_decay=0.1, weight_decay=0.2),
    "adadelta": optimizer(torch.optim.Adadelta, 20.0, rho=0.8, weight_decay=0.2),
    "lion": optimizer(Lion, 0.05, betas=(0.8, 0.9), weight_decay=0.2),
}


def mean(*index: int, **special: Any) -> Turn:
    return Turn(index, (1 / len(index),) * len(index), **special)


# The loops: what is in each step's batch, and what else happens in it. Samples come again, so that momentum matters.
FULL = tuple(mean(*range(SAMPLES)) for _ in range(4))
RAGGED = (mean(0, 1, 2), mean(3, 4, 5, 6), mean(1, 6), mean(5, 2, 0), mean(1, 6))
WEIGHTED = (
    Turn((0, 1, 2), (0.5, 0.2, 0.1)),
    Turn((3, 4), (2.0, 0.0)),
    Turn((5, 6, 0, 0), (0.3, -0.2, 0.4, 0.1)),
    Turn((1, 2), (0.7, 0.7)),
)


def scheduled(loop: tuple[Turn, ...], **settings: tuple[Any, ...]) -> tuple[Turn, ...]:
    """The loop with other hyperparameters in each step."""
    steps = zip(loop, *settings.values(), strict=True)
    return tuple(replace(turn, settings=dict(zip(settings, values, strict=True))) for turn, *values in steps)


CLIPPED = (mean(0, 1, 2, clip_norm=0.5), mean(3, 4, 5, 6, clip_norm=0.2), mean(1, 6, clip_norm=100.0), mean(5, 2))
DECAYS = (0.1, 0.3, 0.0, 0.2)
RATES = scheduled(RAGGED, lr=(0.01, 0.1, 0.2, 0.05, 0.0))
BETAS = scheduled(FULL, betas=((0.9, 0.9), (0.5, 0.8), (0.7, 0.9), (0.8, 0.95)), weight_decay=DECAYS)
MOMENTA = scheduled(FULL, momentum=(0.9, 0.5, 0.7, 0.8), weight_decay=DECAYS)
FIRST = ("first.weight", "first.bias")
THAWED = (mean(0, 1, 2), mean(3, 4, without=FIRST), mean(5, 6, without=("first.bias",)), mean(1, 2), mean(3, 0))
LATE = (mean(0, 1, without=FIRST), mean(2, 3, without=("first.weight",)), mean(4, 5), mean(6, 0))


@dataclass(frozen=True)
class Target:
    """A query, and beside it what it means in plain torch: `plain(model, x, y)` → (X, O)."""

    query: Callable[[Tensor, Tensor], Query]
    plain: Callable[[nn.Module, Tensor, Tensor], Tensor]


def picked(values: Tensor, index: Tensor) -> Tensor:
    """values[x, index[x]], (X, 1)."""
    return torch.stack([row[int(i)] for row, i in zip(values, index, strict=True)])[:, None]


def best_other(values: Tensor, index: Tensor) -> Tensor:
    rows = [torch.cat([row[: int(i)], row[int(i) + 1 :]]).max() for row, i in zip(values, index, strict=True)]
    return torch.stack(rows)[:, None]


def entropy(values: Tensor) -> Tensor:
    chances = values.exp() / values.exp().sum(1, keepdim=True)
    return -(chances * chances.log()).sum(1, keepdim=True)


MATRIX = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]], dtype=torch.float64)
OUTPUTS = Target(lambda x, _: Query.outputs(x), lambda f, x, _: f(x))
LOSS = Target(Query.loss, lambda f, x, y: -picked(f(x).log_softmax(1), y))
MEAN_LOSS = Target(lambda x, y: Query.loss(x, y).mean(), lambda f, x, y: -picked(f(x).log_softmax(1), y).mean(0)[None])
TARGETS = {
    "outputs": OUTPUTS,
    "labelled-outputs": Target(Query.outputs, OUTPUTS.plain),
    "summed-outputs": Target(lambda x, _: Query.outputs(x).sum(), lambda f, x, _: f(x).sum(0)[None]),
    "loss": LOSS,
    "mean-loss": MEAN_LOSS,
    "own-loss": Target(
        lambda x, y: Query.loss(x, y, lambda output, y: (output[:, 0] - y) ** 2),
        lambda f, x, y: ((f(x)[:, 0] - y) ** 2)[:, None],
    ),
    "logit": Target(lambda x, _: Query.logit(x, 1), lambda f, x, _: f(x)[:, 1:2]),
    "logits": Target(Query.logit, lambda f, x, y: picked(f(x), y)),
    "margin": Target(Query.margin, lambda f, x, y: picked(f(x), y) - best_other(f(x), y)),
    "margin-of-two": Target(
        lambda x, y: Query.margin(x, y, (y + 1) % 3), lambda f, x, y: picked(f(x), y) - picked(f(x), (y + 1) % 3)
    ),
    "projection": Target(
        lambda x, _: Query.projection(x, MATRIX), lambda f, x, _: torch.stack([MATRIX @ row for row in f(x)])
    ),
    "entropy": Target(lambda x, _: Query.entropy(x), lambda f, x, _: entropy(f(x))),
    "function": Target(
        lambda x, y: Query.function(x, lambda output, y: output.square() * y[:, None], y),
        lambda f, x, y: torch.stack([row**2 * label for row, label in zip(f(x), y, strict=True)]),
    ),
    "activation": Target(lambda x, _: Query.activation(x, "first"), lambda f, x, _: f.first(x)),
    "mean-activation": Target(
        lambda x, _: Query.activation(x, "first").mean(), lambda f, x, _: f.first(x).mean(0, keepdim=True)
    ),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A small training and a question about it, in float64: the oracle's, and as the package sees it."""

    id: str
    model: Callable[[], nn.Module] = MLP
    optimizer: Make = ADAMW
    loop: tuple[Turn, ...] = RAGGED
    target: Target = OUTPUTS
    groups: GroupSpec = None
    sample_loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
    dtype: torch.dtype = torch.float64
    auxiliary: Callable[[nn.Module], Tensor] | None = None
    """A term of the loss that belongs to no sample."""

    def make(self, seed: int = 0) -> nn.Module:
        """The model; of another seed, with other weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model().to(self.dtype)

    def data(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            x = inputs(self.model, rows)
            return x.to(self.dtype) if x.is_floating_point() else x, torch.randint(3, (rows,))

    def training(self) -> Training:
        model = self.make()
        return Training(
            model, self.optimizer(model), self.sample_loss, *self.data(SAMPLES, 1), self.loop, self.auxiliary
        )

    def query(self) -> Query:
        return self.target.query(*self.data(QUERIES, 2))

    def resolved_groups(self) -> Groups:
        return resolve_groups(self.groups, dict(self.make().named_parameters()))

    def reference(self, nodes: int) -> Reference:
        """The oracle's answer with so many Gauss–Legendre nodes in each step."""
        return self.reference_by(gauss_legendre(nodes))

    @cache  # noqa: B019
    def reference_by(self, rule: Rule) -> Reference:
        x, y = self.data(QUERIES, 2)
        return reference(self.training(), lambda model: self.target.plain(model, x, y), rule)

    def auxiliary_gradients(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        if self.auxiliary is None:
            return {}
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        found = torch.autograd.grad(self.auxiliary(model), list(learning.values()))
        return {"auxiliary": dict(zip(learning, found, strict=True))}

    def steps(self, first: int = 0, lasting: bool = False) -> Iterator[Step]:
        """The training's steps, as the package sees them if it watches from step `first` on; lasting: in tensors of
        their own."""
        training = self.training()
        model, parameters = training.model, dict(training.model.named_parameters())
        buffers = copies(model.named_buffers())
        observer: StepObserver | None = None

        for number, (turn, losses) in enumerate(training.losses()):
            auxiliary = self.auxiliary_gradients(model)
            clip = training.backward(turn, losses)

            if number == first:
                observer = StepObserver(training.optimizer, parameters)
            if observer is not None:
                clipped = {part: {n: g * clip for n, g in found.items()} for part, found in auxiliary.items()}
                observer.before(buffers, clipped)
            training.optimizer.step()

            buffers = copies(model.named_buffers())
            if observer is not None:
                step = observer.after(number, buffers, (batch_of(turn, clip, self.dtype),))
                yield observer.lasting(step) if lasting else step

    def sample_options(self) -> dict[str, Any]:
        """What `explain` needs to know of the training samples."""
        x, y = self.data(SAMPLES, 1)
        return {
            "sample_loss": lambda model, batch: self.sample_loss(model, *batch),
            "data": lambda index: (x[index], y[index]),
        }


def batch_of(turn: Turn, clip: float, dtype: torch.dtype) -> Batch:
    return Batch(len(turn.index), torch.tensor(turn.weights, dtype=dtype) * clip, torch.tensor(turn.index))


CASES = [
    *(Case(name, optimizer=make, loop=RAGGED) for name, make in OPTIMIZERS.items()),
    *(
        Case(f"{name}-{loop}", optimizer=OPTIMIZERS[name], loop=turns)
        for name in ("adamw", "adam-decay", "sgd-dampening-decay")
        for loop, turns in {"weighted": WEIGHTED, "rates": RATES, "thawed": THAWED, "late": LATE}.items()
    ),
    *(
        Case(f"{name}-{what}", optimizer=OPTIMIZERS[name], **special)
        for name in ("adamw", "adam-decay", "sgd-nesterov-decay", "rmsprop-momentum", "lion")
        for what, special in {
            "clipped": {"loop": CLIPPED},
            "auxiliary": {"auxiliary": l1},
            "clipped-auxiliary": {"loop": CLIPPED, "auxiliary": l1},
        }.items()
    ),
    Case("muon", model=Matrices, optimizer=optimizer(torch.optim.Muon, 0.05, momentum=0.8)),
    Case("muon-plain", model=Matrices, optimizer=optimizer(torch.optim.Muon, 0.05, nesterov=False, weight_decay=0.3)),
    Case("adamw-full", loop=FULL),
    Case("adamw-betas", loop=BETAS),
    Case("adam-betas", optimizer=OPTIMIZERS["adam-decay"], loop=BETAS),
    Case("nadam-betas", optimizer=OPTIMIZERS["nadam"], loop=BETAS),
    Case("rmsprop-momenta", optimizer=OPTIMIZERS["rmsprop-momentum"], loop=MOMENTA),
    Case(
        "radam-long", optimizer=optimizer(torch.optim.RAdam, 0.05, betas=(0.8, 0.99), weight_decay=0.1), loop=FULL * 2
    ),
    Case("sgd-momenta", optimizer=OPTIMIZERS["sgd-momentum-decay"], loop=MOMENTA),
    Case("sgd-full", optimizer=OPTIMIZERS["sgd"], loop=FULL, sample_loss=squared_error),
    *(Case(f"{name}-adamw", model=model, loop=RAGGED[:3]) for name, model in MODELS.items()),
    *(
        Case(f"{name}-nesterov-loss", model=model, optimizer=NESTEROV, target=LOSS, loop=RAGGED[:3])
        for name, model in MODELS.items()
    ),
    *(Case(f"target-{name}", target=target, loop=WEIGHTED) for name, target in TARGETS.items()),
    Case("tied-mean-loss", model=Tied, target=MEAN_LOSS),
    Case("late-activation", loop=LATE, target=TARGETS["activation"]),
    Case("late-mean-activation", loop=LATE, target=TARGETS["mean-activation"]),
    Case(
        "patterns",
        groups={"weights": "*.weight", "biases": ("first.bias", "second.b*")},
        optimizer=OPTIMIZERS["sgd-nesterov-decay"],
        target=LOSS,
    ),
    Case("depth-two-loss", groups=2, model=encoder, target=LOSS, loop=RAGGED[:2]),
    Case("depth-two-mean-loss", groups=2, model=encoder, target=MEAN_LOSS, loop=RAGGED[:2]),
]
