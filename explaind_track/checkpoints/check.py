"""What a series of checkpoints holds, what is missing of it, and what explaining it will cost; before any work."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.optimizer_state import SavedOptimizer, build_optimizer
from explaind_track.checkpoints.state_match import SECOND_MOMENTS, StateMatch, match_states
from explaind_track.checkpoints.tokenizer import no_better_than_chance, tokens_beyond
from explaind_track.checkpoints.weights import fitted
from explaind_track.core.checks import first_few
from explaind_track.core.modules import parameters_of
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.tensors import size_in_bytes
from explaind_track.errors import CheckpointError

BatchLoss = Callable[[nn.Module, Any], Tensor]
"""`(model, batch)` → the losses of its samples (N,), or their mean."""
HEADER = ("step", "format", "parameters", "weights", "optimizer", "state", "rate", "loss", "correlation")
SIDES = "><><<<<<<"
BY_CHANCE = 0.01
"""The share of random orders up to which the states' own order is no matter of chance."""


@dataclass
class CheckpointFinding:
    """What is known of one checkpoint."""

    step: int
    path: str
    format: str
    parameters: int = 0
    """Numbers that training moves; tied weights once."""
    weights: list[str] = field(default_factory=list)
    """The types of the saved weights."""
    optimizer: str | None = None
    state: list[str] = field(default_factory=list)
    """The types of its state."""
    rate: list[float] = field(default_factory=list)
    """The next step's rate of each group."""
    decay: list[float] = field(default_factory=list)
    """The weight decay of each group."""
    loss: float | None = None
    """Of the batch."""
    correlation: float | None = None
    """See `StateMatch`."""
    undecided: int | None = None
    """See `StateMatch`."""
    problems: list[str] = field(default_factory=list)
    """Why it cannot be explained."""
    notes: list[str] = field(default_factory=list)
    """What limits what its numbers mean."""


@dataclass(frozen=True)
class SeriesCheck:
    """What `CheckpointSeries.check` has found; `print` gives the table, `as_dict` what JSON takes.

    Example:
        >>> from explaind_track.checkpoints.check import CheckpointFinding, SeriesCheck
        >>> finding = CheckpointFinding(100, "run/step100", "weights alone", 44, ["float32"])
        >>> print(SeriesCheck([finding], memory_mb=1.0))
        step  format         parameters  weights  optimizer  state  rate  loss  correlation
         100  weights alone          44  float32  -          -      -     -     -
        memory at most 1 MB beside the activations of a batch
    """

    findings: list[CheckpointFinding]
    memory_mb: float
    """Of parameters, gradient and optimizer state, which explaining a checkpoint holds; in 10⁶ bytes."""
    seconds: float | None = None
    """Of one gradient of the batch, the slowest."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return asdict(self)

    def require(self) -> None:
        """Refuses a series that cannot be explained.

        Raises:
            CheckpointError: A checkpoint has problems; all are told.
        """
        problems = [f"step {found.step}: {problem}" for found in self.findings for problem in found.problems]
        if problems:
            raise CheckpointError("\n".join(problems))

    def __str__(self) -> str:
        rows = [HEADER, *map(_row, self.findings)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        shapes = [f"{side}{width}" for side, width in zip(SIDES, widths, strict=True)]
        lines = ["  ".join(map(format, row, shapes)).rstrip() for row in rows]

        lines.append(f"memory at most {self.memory_mb:,.0f} MB beside the activations of a batch")
        if self.seconds is not None:
            each = "a checkpoint takes that once, and for each node of the unseen batch"
            lines.append(f"a gradient of the batch takes {self.seconds:.2g} s: {each}")
        lines += [f"REFUSED at step {found.step}: {problem}" for found in self.findings for problem in found.problems]
        return "\n".join([*lines, *_shared_notes(self.findings)])


def _row(found: CheckpointFinding) -> tuple[str, ...]:
    rates = "/".join(dict.fromkeys(f"{rate:.4g}" for rate in found.rate))
    loss, correlation = (f"{value:.3f}" if value is not None else "-" for value in (found.loss, found.correlation))
    return (
        str(found.step), found.format, f"{found.parameters:,}", "/".join(found.weights) or "-", found.optimizer or "-",
        "/".join(found.state) or "-", rates or "-", loss, correlation,
    )  # fmt: skip


def _shared_notes(findings: Sequence[CheckpointFinding]) -> Iterator[str]:
    """Each note once, with the steps that it is of."""
    steps: dict[str, list[str]] = {}
    for found in findings:
        for note in found.notes:
            steps.setdefault(note, []).append(str(found.step))
    for note, where in steps.items():
        which = "all steps" if len(where) == len(findings) > 1 else f"step {first_few(where)}"
        yield f"{which}: {note}"


def check_series(
    checkpoints: Sequence[Checkpoint], model: nn.Module, batch: Any = None, loss: BatchLoss | None = None
) -> SeriesCheck:
    """See `CheckpointSeries.check`."""
    if (batch is None) != (loss is None):
        raise ValueError("batch= and loss= belong together: a batch of the training mixture, and loss(model, batch)")
    findings = []
    seconds: float | None = None
    with _weights_kept(model):
        for checkpoint in checkpoints:
            found = CheckpointFinding(checkpoint.step, str(checkpoint.path), checkpoint.format)
            findings.append(found)
            try:
                optimizer = _examine(checkpoint, model, found)
                if loss is not None:
                    seconds = max(_compare(checkpoint, model, optimizer, batch, loss, found), seconds or 0.0)
            except CheckpointError as error:
                found.problems.append(str(error))

    _note_changes(findings)
    return SeriesCheck(findings, _memory(model, findings) / 1e6, seconds)


def _examine(checkpoint: Checkpoint, model: nn.Module, found: CheckpointFinding) -> torch.optim.Optimizer | None:
    """Notes what the files hold and whether it fits the model; the optimizer, if there is one."""
    parameters = parameters_of(model)
    found.parameters = sum(value.numel() for value in parameters.values() if value.requires_grad)
    pairs = dict(fitted(model, checkpoint.weights_for(model), checkpoint.path))
    found.weights = _types(source for name, (_, source) in pairs.items() if name in parameters)
    found.notes += tokens_beyond(checkpoint.path, model)

    saved = checkpoint.complete_optimizer(model)
    if saved is None:
        found.notes.append(
            "there is no optimizer state: no part of the past (first moment), and the batch's part is an estimate"
        )
        return None

    found.optimizer, found.notes = saved.kind.__name__, [*found.notes, *saved.warnings]
    found.rate = [float(group["lr"]) for group in saved.groups]
    found.decay = [float(group.get("weight_decay", 0)) for group in saved.groups]
    if not any(found.rate):
        found.notes.append("the next step's rate is 0, as behind the end of a schedule: it moves nothing")
    optimizer = build_optimizer(saved, model, checkpoint.path)
    _note_states(saved, optimizer, found)
    return optimizer


def _note_states(saved: SavedOptimizer, optimizer: torch.optim.Optimizer, found: CheckpointFinding) -> None:
    tensors = [value for state in saved.state.values() for value in state.values() if isinstance(value, Tensor)]
    found.state = _types(value for value in tensors if value.ndim)
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    if counts and counts != {found.step}:
        found.notes.append(
            f"its optimizer has taken {first_few(list(map(str, sorted(counts))))} steps and not {found.step}: some "
            "were skipped (as loss scaling does), or the state is another checkpoint's"
        )


def _compare(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Any, loss: BatchLoss,
    found: CheckpointFinding,
) -> float:  # fmt: skip
    """Compares the states with the gradient of a batch. Returns how long that gradient took, in seconds."""
    checkpoint.load(model)
    trained = {name: value for name, value in parameters_of(model).items() if value.requires_grad}

    start = time.perf_counter()
    device = next(iter(trained.values())).device
    with torch.enable_grad(), replayed_random_state(random_state(device)):
        value = loss(model, batch).mean()
        given = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    seconds = time.perf_counter() - start

    found.loss = float(value.detach())
    if not math.isfinite(found.loss):
        raise CheckpointError(f"{checkpoint.path}: the batch's loss is {found.loss}, so nothing can be explained")
    found.notes += no_better_than_chance(found.loss, model)
    if optimizer is None:
        return seconds

    gradients = {name: gradient for name, gradient in zip(trained, given, strict=True) if gradient is not None}
    states = {name: optimizer.state[trained[name]] for name in gradients if trained[name] in optimizer.state}
    second = {name: state[key] for name, state in states.items() for key in SECOND_MOMENTS if key in state}
    second = {name: value for name, value in second.items() if value.shape == trained[name].shape}
    if second:
        _judge(match_states(second, gradients), checkpoint, found)
    return seconds


def _judge(match: StateMatch, checkpoint: Checkpoint, found: CheckpointFinding) -> None:
    found.correlation = None if math.isnan(match.correlation) else match.correlation
    found.undecided = match.undecided
    if match.misplaced:
        pairs = [f"{holder} has the state of {owner}" for owner, holder in match.misplaced.items()]
        raise CheckpointError(
            f"{checkpoint.path}: states are permuted among parameters of equal shape, as the batch's gradient tells: "
            f"{first_few(pairs)}. The order of the parameters is another than when it was saved: make the model as it "
            "was made then"
        )
    if match.chance > BY_CHANCE:
        found.notes.append(
            "the second moments resemble the batch's squared gradients no better than in a random order among "
            f"parameters of equal shape (as well in {match.chance:.0%} of these): a larger batch of the training "
            "mixture decides whether the states are these parameters'"
        )
    if match.suspected:
        found.notes.append(
            f"the states of {first_few(match.suspected)} fit the batch's gradient better exchanged, though not for "
            "certain: a larger batch of the training mixture decides"
        )


def _note_changes(findings: Sequence[CheckpointFinding]) -> None:
    """Notes where decay or optimizer are others than at the checkpoint before."""
    told = [found for found in findings if found.optimizer is not None]
    for before, found in pairwise(told):
        if (found.optimizer, found.decay) != (before.optimizer, before.decay):
            found.notes.append(f"optimizer or weight decay are others than at step {before.step}")


def _memory(model: nn.Module, findings: Sequence[CheckpointFinding]) -> float:
    """θ, gradient and state as training holds them, in bytes."""
    parameters = parameters_of(model)
    held = {"AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2}
    states = max((held.get(found.optimizer, 1) for found in findings if found.optimizer), default=0)
    return size_in_bytes(parameters) * (2 + states)


def _types(tensors: Any) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


@contextmanager
def _weights_kept(model: nn.Module) -> Iterator[None]:
    """Puts the model's weights and buffers back as they were."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
