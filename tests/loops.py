"""The training loops and model features that people have, each with a Tracker in it. `test_loops.py` runs them all."""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from inputs import columns, encoding, example, of_columns, of_encoding, of_example
from losses import answered, autocast_loss, cross_entropy, masked_tokens, of_answer, of_logits, of_pair, smoothed
from models import (
    Answer,
    Answers,
    Checkpointed,
    DroppedEncoder,
    ReadsItself,
    Structured,
    TiedLayers,
    Tokens,
    Twice,
    TwoHeads,
    batch_norm,
    dropout,
    frozen_norm,
    mlp,
)
from optimizers import adamw, nesterov
from torch import Tensor, nn
from untracked import NoTracker

from explaind_track import Query, Tracker

STEPS = 6
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Run:
    """What a loop works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sample_loss: Loss
    x: Tensor
    y: Tensor
    tracker: Tracker
    query: Query

    def backward(self, index: Tensor, weight: Tensor | float | str = "mean", batch: Any = None) -> None:
        """Tells of one batch, and adds the gradient of its loss."""
        data = (self.x[index], self.y[index]) if batch is None else batch
        self.tracker.batch(data, index=index, weight=weight)
        losses = self.sample_loss(self.model, data)
        sums = {"mean": losses.mean, "sum": losses.sum}
        (sums[weight]() if isinstance(weight, str) else (losses * weight).sum()).backward()

    def step(
        self, *index: Tensor, weight: Tensor | float | str = "mean", before: Callable[[], Any] | None = None
    ) -> None:
        """One step over these micro-batches; `before`: what the loop does before the optimizer's step."""
        with self.tracker.step():
            self.optimizer.zero_grad()
            for one in index:
                self.backward(one, weight)
            if before is not None:
                before()
            self.optimizer.step()


Body = Callable[[Run], None]


def batches(size: int = 8) -> Iterator[Tensor]:
    """Shuffled, without replacement within a batch."""
    return (torch.randperm(24)[:size] for _ in range(STEPS))


def plain(run: Run) -> None:
    for index in batches():
        run.step(index)


@dataclass
class Loop:
    """A training of six steps with a Tracker in it; `id` is its name in tests/README.md."""

    id: str
    body: Body = plain
    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    sample_loss: Loss = cross_entropy
    query: Callable[[Tensor, Tensor], Query] = Query.outputs
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    inputs: Callable[[], Tensor] = lambda: torch.randn(24, 4)
    warm: int = 0
    """Steps that the optimizer has taken before it is watched."""
    data: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)
    """A batch of these inputs and labels, as `sample_loss` takes it."""
    rounded: bool = False
    """Whether its arithmetic is so coarse that samples miss their sum, which a warning tells."""
    slower: bool = False
    """Whether a ForwardModeFallbackWarning tells that a slower way is taken."""
    mixed: bool = False
    """Whether the model has types of its own; `dtype` is that of the inputs then."""
    jumps: bool = False
    """Whether its derivative jumps along the path, so that a residual stays, and plain autograd has another one."""
    refused: str = ""
    """Why influences of single samples are, if they are."""

    @property
    def is_low_precision(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    def make(self) -> nn.Module:
        return self.model() if self.mixed else self.model().to(self.dtype)

    def run(self, tracked: bool = True, **options: Any) -> Run:
        """Trains; tracked: with a Tracker, or else as the loop's author would; options: more of the Tracker's."""
        torch.manual_seed(0)
        model = self.make()
        x, y = self.inputs(), torch.randint(0, 3, (24,))
        x = x.to(self.dtype) if x.is_floating_point() else x
        optimizer = self.optimizer(model)
        for _ in range(self.warm):
            optimizer.zero_grad()
            self.sample_loss(model, (x, y)).mean().backward()
            optimizer.step()

        query = self.query(x[:5], y[:5])
        options = {"queries": {"query": query}, "sample_loss": self.sample_loss, **self.options, **options}
        tracker: Any = Tracker(model, optimizer, **options) if tracked else NoTracker(model)
        run = Run(model, optimizer, self.sample_loss, x, y, tracker, query)
        self.body(run)
        tracker.finish()
        return run


# ------------------------------------------------------------- batches and weights


def ragged(run: Run) -> None:
    for number, index in enumerate(batches()):
        run.step(index[: 3 + number % 3])


def weighted(run: Run) -> None:
    for index in batches():
        run.step(index, weight=torch.rand(8, dtype=run.x.dtype) - 0.2)


def repeated(run: Run) -> None:
    for index in batches(4):
        run.step(torch.cat([index, index[:2]]))


def with_replacement(run: Run) -> None:
    for _ in range(STEPS):
        run.step(torch.randint(0, 24, (8,)))


def summed(run: Run) -> None:
    for index in batches():
        run.step(index, weight="sum")


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def class_weighted(run: Run) -> None:
    for index in batches():
        weight = CLASS_WEIGHTS.to(run.x)[run.y[index]]
        run.step(index, weight=weight / weight.sum())


def token_mean(run: Run) -> None:
    for index in batches():
        run.step(index, weight=1.0 / int((run.x[index][:, 1:] != 0).sum()))


# ------------------------------------------------------------- what becomes of the gradient


def accumulated(run: Run) -> None:
    for index in batches():
        run.step(index[:5], index[5:], weight=1.0 / 8)


def clipped_by_norm(run: Run) -> None:
    for index in batches():
        run.step(index, before=lambda: run.tracker.clip_grad_norm_(0.1))


def clipped_by_value(run: Run) -> None:
    for index in batches():
        run.step(index, before=lambda: run.tracker.clip_grad_value_(0.01))


def l1(model: nn.Module) -> Tensor:
    return sum((0.01 * p.abs().sum() for p in model.parameters()), torch.zeros(()))


def penalized(run: Run) -> None:
    for index in batches():
        run.step(index, before=lambda: l1(run.model).backward())


# ------------------------------------------------------------- optimizers, and what changes on the way


def scheduled(make: Callable[[torch.optim.Optimizer], Any]) -> Body:
    def body(run: Run) -> None:
        schedule = make(run.optimizer)
        for index in batches():
            run.step(index)
            schedule.step()

    return body


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)


def groups_of_rates(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.AdamW([{"params": [first], "lr": 0.1, "weight_decay": 0.0}, {"params": rest}], lr=0.01)


def thawed(run: Run) -> None:
    for number, index in enumerate(batches()):
        run.model[0].requires_grad_(number >= 3)
        run.step(index)


def zeros_kept(run: Run) -> None:
    clear = run.optimizer.zero_grad
    run.optimizer.zero_grad = lambda: clear(set_to_none=False)  # type: ignore[method-assign]
    for number, index in enumerate(batches()):
        run.model[0].requires_grad_(number < 3)
        run.step(index)


def joined(run: Run) -> None:
    """The first layer's parameters join the optimizer after three steps."""
    for number, index in enumerate(batches()):
        if number == 3:
            run.optimizer.add_param_group({"params": list(run.model[0].parameters()), "lr": 0.01})
        run.step(index)


def second_layer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model[2].parameters(), lr=0.02)


# ------------------------------------------------------------- precision, and steps that are not taken


def scaled(run: Run) -> None:
    """With a GradScaler, whose second step overflows and is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number, index in enumerate(batches()):
        with run.tracker.step():
            run.optimizer.zero_grad()
            data = (run.x[index], run.y[index])
            run.tracker.batch(data, index=index)
            loss = run.sample_loss(run.model, data).mean()
            scaler.scale(loss * float("inf") if number == 1 else loss).backward()
            scaler.unscale_(run.optimizer)
            run.tracker.clip_grad_norm_(1.0)
            scaler.step(run.optimizer)
            scaler.update()


def left_out(run: Run) -> None:
    for number, index in enumerate(batches()):
        with run.tracker.step():
            run.optimizer.zero_grad()
            run.backward(index)
            if number != 2:
                run.optimizer.step()


# ------------------------------------------------------------- inputs and outputs that are no tensors


def with_mappings(run: Run) -> None:
    for index in batches():
        with run.tracker.step():
            run.optimizer.zero_grad()
            run.backward(index, batch={"one": run.x[index], "two": run.x[index].flip(1), "label": run.y[index]})
            run.optimizer.step()


def with_batches(make: Callable[[Tensor, Tensor], Any]) -> Body:
    def body(run: Run) -> None:
        for index in batches():
            with run.tracker.step():
                run.optimizer.zero_grad()
                run.backward(index, batch=make(run.x[index], run.y[index]))
                run.optimizer.step()

    return body


def told_by(index_of: Callable[[Tensor], Any], weight_of: Callable[[Tensor], Any]) -> Body:
    """Indices and weights of other kinds than tensors; the loss is the same weighted sum."""

    def body(run: Run) -> None:
        for index in batches():
            weight = torch.rand(8, dtype=run.x.dtype) + 0.1
            weight = weight if isinstance(weight_of(weight), Sized) else torch.full_like(weight, 0.125)
            with run.tracker.step():
                run.optimizer.zero_grad()
                data = (run.x[index], run.y[index])
                run.tracker.batch(data, index=index_of(index), weight=weight_of(weight))
                (run.sample_loss(run.model, data) * weight).sum().backward()
                run.optimizer.step()

    return body


def ids(index: Tensor) -> list[str]:
    return [f"id{number}" for number in index.tolist()]


def in_numpy(run: Run) -> None:
    """The learning rate is a number of NumPy's, which changes from step to step."""
    for number, index in enumerate(batches()):
        run.optimizer.param_groups[0]["lr"] = np.float64(0.01 + 0.002 * number)
        run.step(index, weight=np.float32(0.125))


LOOPS = [
    Loop("batches of one size"),
    Loop("ragged batches", ragged),
    Loop("weighted samples", weighted),
    Loop("samples repeated in a batch", repeated),
    Loop("sampling with replacement", with_replacement),
    Loop("sum of the losses", summed),
    Loop("label smoothing", sample_loss=smoothed),
    Loop("class weights", class_weighted),
    Loop(
        "masked token losses", token_mean, Tokens, sample_loss=masked_tokens,
        query=lambda x, _: Query.outputs(x), inputs=lambda: torch.randint(0, 5, (24, 4)),
    ),
    Loop("auxiliary loss (L1)", penalized, options={"auxiliary": {"l1": l1}}),
    Loop("gradient accumulation", accumulated),
    Loop("clipping by norm", clipped_by_norm, optimizer=nesterov),
    Loop("clipping by value", clipped_by_value, refused="clipped by value"),
    Loop("learning-rate schedule", scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS))),
    Loop("OneCycle, Adam's betas", scheduled(one_cycle)),
    Loop("OneCycle, SGD's momentum", scheduled(one_cycle), optimizer=nesterov),
    Loop("rates and decays by group", optimizer=groups_of_rates),
    Loop("warm start", warm=3),
    Loop("warm start, Nesterov", warm=3, optimizer=nesterov),
    Loop("frozen, thawed later", thawed),
    Loop("frozen later, zero gradients kept", zeros_kept),
    Loop("parameter group added later", joined, optimizer=second_layer),
    Loop("maximize", optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, maximize=True)),
    Loop("bfloat16 autocast", sample_loss=autocast_loss, dtype=torch.float32, rounded=True),
    Loop("GradScaler with a skipped step", scaled),
    Loop("step left out", left_out),
    Loop("dropout", model=dropout),
    Loop("dropout on a transposed activation", model=DroppedEncoder),
    Loop("activation checkpointing", model=lambda: Checkpointed(use_reentrant=False), slower=True),
    Loop("activation checkpointing, scalar query", model=lambda: Checkpointed(use_reentrant=False),
         query=lambda x, y: Query.loss(x, y).sum(), slower=True),
    Loop("backward pass that reads the module", model=ReadsItself, slower=True),
    Loop("parameters without a part in the loss", model=TwoHeads),
    Loop("gradients that are the same for all samples", model=lambda: nn.Sequential(nn.Linear(4, 3)),
         sample_loss=lambda model, batch: model(batch[0]).sum(1)),
    Loop("batch norm", model=batch_norm, optimizer=nesterov),
    Loop("module in eval mode", model=frozen_norm),
    Loop("tied weights", model=TiedLayers),
    Loop("module used twice", model=Twice),
    Loop("mappings as batches and outputs, two inputs", with_mappings, Answers, sample_loss=answered, query=of_logits,
         data=lambda x, y: {"one": x, "two": x.flip(1), "label": y}),
    Loop("dataclass as output", model=lambda: Structured(Answer), sample_loss=of_answer,
         query=lambda x, _: Query.function(x, lambda output: output.logits)),
    Loop("tuple as output", model=lambda: Structured(lambda *both: both), sample_loss=of_pair,
         query=lambda x, _: Query.function(x, lambda output: output[0])),
    Loop("index as an array of NumPy, weights too",
         told_by(lambda index: index.numpy(), lambda weight: weight.numpy())),
    Loop("index as a list, weights too", told_by(lambda index: index.tolist(), lambda weight: weight.tolist())),
    Loop("index of pandas, a weight of NumPy",
         told_by(lambda index: pd.Index(index.numpy()), lambda weight: np.float32(0.125))),
    Loop("samples named by words", told_by(ids, lambda weight: weight)),
    Loop("samples named by words, in an array", told_by(lambda index: np.array(ids(index)), lambda weight: weight)),
    Loop("learning rates and weights of NumPy", in_numpy),
    Loop("encoding as a batch", with_batches(encoding), sample_loss=of_encoding, data=encoding),
    Loop("read-only mapping as a batch", with_batches(columns), sample_loss=of_columns, data=columns),
    Loop("dataclass as a batch, with words", with_batches(example), sample_loss=of_example, data=example),
    Loop("query in another precision", query=lambda x, _: Query.outputs(x.float())),
    Loop("query as arrays of NumPy", query=lambda x, y: Query.loss(x.numpy(), y.tolist())),
    Loop("float32", dtype=torch.float32),
]  # fmt: skip
