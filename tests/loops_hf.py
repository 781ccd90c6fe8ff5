"""Loops that train the models of transformers, each with a Tracker and, beside it, a witness.

What the witness saw is explained by plain autograd on copies of the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models_hf import Family
from reference import Moment, Reference, Turn, copies, explain_moments, gauss_legendre
from torch import Tensor, nn
from untracked import NoTracker

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain

RATE, EPSILON, DECAY, SMOOTHING = 0.01, 1e-3, 0.1, 0.1
NODES = 2


@dataclass(frozen=True)
class Variant:
    """How a model is trained."""

    id: str
    checkpointing: bool = False
    lora: bool = False
    smoothing: float = 0.0
    accumulated: int = 1
    """Micro-batches to a step; the last step of an epoch has fewer."""
    autocast: bool = False
    dtype: torch.dtype = torch.float64
    compiled: bool = False

    @property
    def rounded(self) -> bool:
        return self.autocast or self.dtype is torch.bfloat16

    def model(self, family: Family) -> nn.Module:
        torch.manual_seed(0)
        model: Any = family.make()
        if self.lora:
            import peft

            config = peft.LoraConfig(r=2, target_modules=list(family.adapted), init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model.to(self.dtype).train()  # type: ignore[no-any-return]

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


VARIANTS = [
    Variant("plain"),
    Variant("checkpointing", checkpointing=True),
    Variant("lora", lora=True),
    Variant("smoothing", smoothing=SMOOTHING),
    Variant("accumulation", accumulated=3),
    Variant("autocast", autocast=True, dtype=torch.float32),
    Variant("bfloat16", dtype=torch.bfloat16),
    Variant("compile", compiled=True),
]


@dataclass
class Micro:
    """A micro-batch as the model saw it."""

    index: Tensor
    random_state: Tensor


@dataclass
class Seen:
    """A step as the optimizer took it."""

    before: dict[str, Tensor]
    gradients: dict[str, Tensor]
    settings: dict[str, dict[str, Any]]
    batches: list[Micro]
    after: dict[str, Tensor] = field(default_factory=dict)


class Witness:
    """Watches an optimizer through hooks of its own, without any code of the package."""

    def __init__(self, family: Family, variant: Variant, model: nn.Module) -> None:
        self.family, self.variant, self.model = family, variant, model
        self.copy = deepcopy(model)
        """As it was before training."""
        self.steps: list[Seen] = []
        self._batches: list[Micro] = []

    def note(self, index: Tensor) -> None:
        """The next micro-batch, right before its forward pass."""
        self._batches.append(Micro(index, torch.get_rng_state()))

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())

    def _before(self) -> None:
        parameters = dict(self.model.named_parameters())
        settings = {
            name: {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
            for name, parameter in parameters.items()
            if parameter.grad is not None and any(parameter is member for member in group["params"])
        }
        gradients = {name: parameters[name].grad.clone() for name in settings}  # type: ignore[union-attr]
        self.steps.append(Seen(copies(self.model.named_parameters()), gradients, settings, self._batches))
        self._batches = []

    def _after(self) -> None:
        self.steps[-1].after = copies(self.model.named_parameters())

    def reference(self, weights: list[list[Tensor]], target: Callable[[nn.Module], Tensor]) -> Reference:
        """The oracle's answer; weights: those of each step's micro-batches."""
        moments = []
        for seen, own in zip(self.steps, weights, strict=True):
            gradients = [one for micro in seen.batches for one in self._sample_gradients(seen, micro)]
            index, by_sample = torch.cat([micro.index for micro in seen.batches]), torch.cat(own)
            turn = Turn(tuple(index.tolist()), tuple(by_sample.tolist()))
            before, after = (_double(values) for values in (seen.before, seen.after))
            none = {name: torch.zeros_like(value) for name, value in before.items()}
            moments.append(Moment(turn, before, after, {}, {}, gradients, none, 1.0, seen.settings))
        exact = deepcopy(self.copy).double()
        return explain_moments(
            moments, self.optimizer, exact, len(self.family.data()["labels"]), target, gauss_legendre(NODES)
        )

    def missed(self, number: int, weights: list[Tensor]) -> float:
        """By how much `Σ_k w_k ∇L_k` misses the gradient that the optimizer saw, relative to its norm."""
        seen, off, norm = self.steps[number], 0.0, 0.0
        gradients = [one for micro in seen.batches for one in self._sample_gradients(seen, micro)]
        for name, gradient in seen.gradients.items():
            total = sum(w * own[name] for w, own in zip(torch.cat(weights).tolist(), gradients, strict=True))
            off += float((total - gradient).square().sum())
            norm += float(gradient.square().sum())
        return (off / norm) ** 0.5

    def _sample_gradients(self, seen: Seen, micro: Micro) -> Iterator[dict[str, Tensor]]:
        """Every sample's own, in the company and with the random numbers that it had."""
        data = self.family.data()
        dtype = torch.float32 if self.variant.autocast else torch.float64  # as samples are explained
        model = deepcopy(self.copy).to(dtype)
        model.load_state_dict(seen.before, strict=False)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        torch.set_rng_state(micro.random_state)
        with self.variant.precision():
            output = model(**{name: data[name][micro.index] for name in ("input_ids", "attention_mask")})
        losses = self.family.losses(output.logits.to(dtype), data["labels"][micro.index], self.variant.smoothing)
        for loss in losses:
            found = torch.autograd.grad(loss, list(learning.values()), retain_graph=True)
            yield _double(dict(zip(learning, found, strict=True)))


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}


def query(family: Family) -> Query:
    return Query.function(inputs(family), logits_of)


def inputs(family: Family) -> dict[str, Tensor]:
    """Of two samples."""
    return {name: family.data()[name][:2] for name in ("input_ids", "attention_mask")}


def logits_of(output: Any) -> Tensor:
    return output.logits[:, 2, :2]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Errors:
    """Of a run, as fractions of the largest number."""

    gradient: float
    """By how much the samples, with the weights that were told, miss the gradient that the optimizer saw."""
    groups: float
    samples: float


@dataclass(frozen=True)
class Run:
    tracker: Any
    """A Tracker, where there was one."""
    witness: Witness
    sample_loss: Callable[[nn.Module, Any], Tensor]


def in_own_loop(family: Family, variant: Variant, directory: Path, tracked: bool = True, **options: Any) -> Run:
    """Two epochs of batches of two or one; options: more of the Tracker's."""
    model = variant.model(family)
    witness = Witness(family, variant, model)
    called = torch.compile(model, backend="aot_eager") if variant.compiled else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=DECAY)

    def sample_loss(model: nn.Module, batch: Any) -> Tensor:
        with variant.precision():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if logits.dtype is torch.bfloat16:
            logits = logits.float()
        return family.losses(logits, batch["labels"], variant.smoothing)

    options = {"queries": {"q": query(family)}, "groups": 3, "sample_loss": sample_loss, **options}
    tracker: Any = Tracker(called, optimizer, trajectory=directory, **options) if tracked else NoTracker(called)
    witness.watch_optimizer(optimizer)
    data = family.data()
    for _ in range(2):
        micro = list(data["index"].split(2))
        for first in range(0, len(micro), variant.accumulated):
            with tracker.step():
                optimizer.zero_grad()
                step = micro[first : first + variant.accumulated]
                items = sum(int((data["labels"][index] >= 0).sum()) for index in step)
                for index in step:
                    batch = {name: value[index] for name, value in data.items()}
                    tracker.batch(batch, index=index, weight=1.0 / items)
                    witness.note(index)
                    (sample_loss(called, batch).sum() / items).backward()
                optimizer.step()
    tracker.finish()
    return Run(tracker, witness, sample_loss)


def in_trainer(family: Family, variant: Variant, directory: Path, tracked: bool = True, **options: Any) -> Run:
    """The same in the Trainer, whose subclass takes the index out of a batch."""
    import transformers

    from explaind_track.callbacks.transformers import TrackerCallback, sample_losses

    class WithIndex(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *others: Any, **named: Any) -> Any:
            witness.note(inputs.pop("index"))
            return super().compute_loss(model, inputs, *others, **named)

        def create_optimizer(self, *others: Any, **named: Any) -> Any:
            first = self.optimizer is None
            made = super().create_optimizer(*others, **named)
            if first:
                witness.watch_optimizer(made)
            return made

    model = variant.model(family)
    witness = Witness(family, variant, model)
    callback = TrackerCallback(
        queries={"q": query(family)}, groups=3, sample_loss=sample_losses, index=lambda batch: batch["index"],
        trajectory=directory, **options,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(directory.with_name("out")), per_device_train_batch_size=2, num_train_epochs=2, report_to=[],
        gradient_accumulation_steps=variant.accumulated, max_grad_norm=0.05, learning_rate=RATE, adam_epsilon=EPSILON,
        weight_decay=DECAY, use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        bf16=variant.autocast, label_smoothing_factor=variant.smoothing, gradient_checkpointing=variant.checkpointing,
        torch_compile=variant.compiled, torch_compile_backend="aot_eager" if variant.compiled else None,
    )  # fmt: skip
    data = family.data()
    rows = [{name: value[k] for name, value in data.items()} for k in range(len(data["index"]))]
    WithIndex(model, arguments, train_dataset=rows, callbacks=[callback] if tracked else []).train()
    tracker = callback.tracker if tracked else None
    return Run(tracker, witness, partial(sample_losses, label_smoothing=variant.smoothing))


def measure(run: Run, directory: Path) -> Errors:
    """Compares what the record says with the oracle."""
    trajectory, family = Trajectory.open(directory), run.witness.family
    told = [list(trajectory.batches(number)) for number in range(len(trajectory))]
    assert [[batch.index.tolist() for batch in step] for step in told] == [  # type: ignore[union-attr]
        [micro.index.tolist() for micro in seen.batches] for seen in run.witness.steps
    ]
    weights = [[batch.weights(torch.zeros((), dtype=torch.float64)) for batch in step] for step in told]
    gradient = max(run.witness.missed(number, own) for number, own in enumerate(weights))

    question: dict[str, Any] = {"groups": 3, "quadrature": Quadrature.fixed(NODES), "progress": False}
    subject = trajectory, run.witness.model.train(), query(family)
    groups = explain(*subject, keep=("step", "group", "query", "output"), **question).data["influence"]
    samples = explain(
        *subject, keep=("group", "query", "output", "sample"), sample_loss=run.sample_loss,
        data=lambda index: {name: value[index] for name, value in family.data().items()}, **question,
    ).data["influence"]  # fmt: skip

    oracle = run.witness.reference(weights, lambda model: logits_of(model(**inputs(family))))
    by_part = oracle.parts()
    parts = ["kernel", "regularization"]
    wanted = [oracle.over(run.tracker.groups, oracle.influence(by_part[part])) for part in parts]
    by_sample = torch.einsum("sxod,sikd->sdixok", oracle.test, oracle.train)
    wanted_samples = oracle.over(run.tracker.groups, by_sample).sum((0, 2))
    return Errors(
        gradient, _off(groups.sel(part=parts).values, torch.stack(wanted)), _off(samples.values, wanted_samples)
    )


def _off(found: Any, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max())


LOOPS = {"own loop": in_own_loop, "trainer": in_trainer}
