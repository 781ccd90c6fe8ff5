"""The step: what one optimizer step did, the type that everything else passes through.

A `Step` holds the model before and after (`State`), the training samples that drove it (`Batch`), and for every
parameter an `Update`, which splits `θ_s − θ_{s+1}` into the parts of the paper's Theorem 3.1. Where something other
than the optimizer changed the model since the step before, that is an `OutsideChange`, which the step leads on from.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from explaind_track.core.alterations import Alterations
from explaind_track.core.tensors import Tensors, upcast_all
from explaind_track.core.update import Update

PARTS = ("kernel", "regularization", "past", "outside", "rounding")
"""The parts of a step; they add up to the way from the end of the step before to its own. Auxiliary losses are parts by
their own names beside them."""

SHARES = {"momentum": "kernel"}
"""Shares of a part that can be asked for beside it: a share's name, and the part it belongs to."""


@dataclass(frozen=True)
class State:
    """Parameters and buffers of the model, by name (tied parameters once, under their first name).

    Example:
        >>> import torch
        >>> from explaind_track import State
        >>> model = torch.nn.BatchNorm1d(2)
        >>> state = State(dict(model.named_parameters()), dict(model.named_buffers()))
        >>> list(state.parameters), list(state.buffers)
        (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """

    parameters: Tensors
    buffers: Tensors

    @property
    def is_empty(self) -> bool:
        """Whether it holds no tensor, as what has changed of a model may."""
        return not (self.parameters or self.buffers)

    def copy(self) -> "State":
        """The same numbers in tensors of their own."""
        parameters, buffers = (
            {name: value.detach().clone() for name, value in tensors.items()}
            for tensors in (self.parameters, self.buffers)
        )
        return State(parameters, buffers)

    def upcast(self) -> "State":
        """The same numbers with bfloat16 and float16 in float32; the state itself where there are none."""
        parameters, buffers = upcast_all(self.parameters), upcast_all(self.buffers)
        is_same = parameters is self.parameters and buffers is self.buffers
        return self if is_same else State(parameters, buffers)


@dataclass(frozen=True)
class Batch:
    """The samples of one (micro-)batch and how they entered the step's gradient `Σ_k w_k ∇L_k`.

    Example:
        >>> import torch
        >>> from explaind_track import Batch
        >>> batch = Batch(size=4, weight=1 / 4, index=torch.tensor([7, 0, 2, 5]))  # the loss is the batch's mean
        >>> batch.weights(like=torch.zeros(0))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    size: int
    weight: Tensor | float
    """`w_{i,k}`: one number for all samples or a tensor (N,)."""
    index: Tensor | None = None
    """Which training samples these are, (N,) int64; None if the loop did not say."""
    data: Any = None
    """The batch itself; None where a trajectory has only its index."""
    random_state: Mapping[str, Tensor] = field(default_factory=dict)
    """The random state before the batch's forward pass, by device; empty where nothing random was drawn."""
    clipped: bool = False
    """Whether the step's gradient was clipped by value: what is left of it is no sum over samples."""
    ids: tuple[str, ...] | None = None
    """The samples' names, where the loop has named them by words; `index` then holds the `number_of_id` of each."""
    altered: Alterations | None = None
    """How the loop has altered the step's gradient since its backward passes; `weight` has the factors in it."""

    def weights(self, like: Tensor) -> Tensor:
        """`w_{i,k}` for every sample, (N,), of the type and on the device of `like`."""
        if isinstance(self.weight, Tensor):
            return self.weight.to(like)
        return torch.full((self.size,), self.weight, dtype=like.dtype, device=like.device)


def number_of_id(name: str) -> int:
    """The number that stands for a sample's name: the same in every process and run, and no other name's."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def ids_of(batches: Iterable[Batch]) -> dict[int, str]:
    """The names of samples that are named by words, by the numbers that stand for them."""
    return {
        number: name
        for batch in batches
        if batch.ids is not None and batch.index is not None
        for number, name in zip(batch.index.tolist(), batch.ids, strict=True)
    }


Move = TypeVar("Move")


class Part(Mapping[str, Tensor], Generic[Move]):
    """One part of a change by parameter, computed when asked for and not kept."""

    def __init__(self, moves: Mapping[str, Move], compute: Callable[[Move], Tensor]) -> None:
        """compute: the part, from what moved the parameter."""
        self._moves, self._compute = moves, compute

    def __getitem__(self, parameter: str) -> Tensor:
        return self._compute(self._moves[parameter])

    def __iter__(self) -> Iterator[str]:
        return iter(self._moves)

    def __len__(self) -> int:
        return len(self._moves)


@dataclass
class Validity:
    """Whether a step's tensors still hold its numbers: whoever made the step says so when they are written over."""

    over: bool = False


@dataclass(frozen=True)
class Change(ABC):
    """The model's way from one state to another, in a straight line, and the parts it is made of.

    Its tensors belong to whoever made it (the training loop, or a trajectory's replay) and hold until that goes on to
    its next step.
    """

    number: int
    """The step's; of a change from outside, that of the step it leads to."""
    before: State
    after: State
    mark: object = field(default_factory=object, kw_only=True)
    """Stands for this very change, also in its copies; compared by identity."""
    follows: object = field(default=None, kw_only=True)
    """The mark of the change whose `after` is, bit for bit, this one's `before`; None where there is none."""
    validity: Validity = field(default_factory=Validity, kw_only=True)

    @property
    @abstractmethod
    def moved(self) -> Collection[str]:
        """The names of the parameters along whose change it is integrated."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Its parts by name, each by parameter; they add up to `before − after`."""

    def point(self, time: float) -> State:
        """`θ_s(t) = θ_s + t (θ_{s+1} − θ_s)`, with the buffers of step s; valid until the next point is asked for."""
        before, after = self.before.parameters, self.after.parameters
        if time == 0:
            return self.before
        if time == 1:
            return State(after, self.before.buffers)
        moved = {name: torch.lerp(before[name], after[name], time) for name in self.moved}
        return State({**before, **moved}, self.before.buffers)

    def pieces(self, parameter: str, parts: Sequence[str], rest: bool) -> Iterator[tuple[slice, list[Tensor]]]:
        """The named parts of one parameter's change, piece by piece of its entries.

        Yields, of each piece, its place among the parameter's entries, and the parts there (n,); with `rest`, last what
        they leave over of the change.
        """
        rows = [self.parts[part][parameter] for part in parts]
        if rest:
            left = self.before.parameters[parameter] - self.after.parameters[parameter]
            for part, row in zip(parts, rows, strict=True):
                if part not in SHARES:
                    left -= row
            rows.append(left)
        yield slice(None), [row.reshape(-1) for row in rows]

    def require_valid(self) -> None:
        """Refuses a change whose tensors hold the numbers of a later step by now.

        Raises:
            ValueError: They do.
        """
        if self.validity.over:
            raise ValueError(
                f"step {self.number} is not valid any more: its tensors were written over when the run went on. Steps "
                "that are held have to last: take them from trajectory.steps(lasting=True), or from "
                "StepObserver.lasting in a loop of your own, or pass the trajectory itself"
            )


@dataclass(frozen=True)
class OutsideChange(Change):
    """What something other than the optimizer did to the model since its last step.

    Weights that are clamped, masked, averaged or copied in, those that another optimizer moves, and buffers that are
    written between steps.
    """

    changed: State
    """Those parameters and buffers of `after` that are not, bit for bit, what they are in `before`; in training's own
    types."""

    @cached_property
    def moved(self) -> Collection[str]:
        """The changed parameters; what is no real number is not integrated, and left to the remainder."""
        return [name for name, value in self.changed.parameters.items() if value.is_floating_point()]

    @cached_property
    def parts(self) -> Mapping[str, Part[tuple[Tensor, Tensor]]]:
        """The part `outside`; none where only buffers changed."""
        ends = {name: (self.before.parameters[name], self.after.parameters[name]) for name in self.moved}
        return {"outside": Part(ends, lambda pair: pair[0] - pair[1])} if ends else {}


@dataclass(frozen=True)
class Step(Change):
    """What training step `number` did: `θ_s` → `θ_{s+1}`.

    Example:
        >>> import torch
        >>> from explaind_track import StepObserver
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        >>> observer = StepObserver(optimizer, dict(model.named_parameters()))
        >>> model(torch.ones(5, 3)).mean().backward()
        >>> observer.before(buffers={})
        >>> optimizer.step()
        >>> step = observer.after(number=0, buffers={})
        >>> list(step.parts)
        ['kernel', 'momentum', 'regularization', 'rounding']
        >>> total = sum(step.parts[part]["weight"] for part in ("kernel", "regularization", "rounding"))
        >>> moved = step.before.parameters["weight"] - step.after.parameters["weight"]
        >>> torch.allclose(total, moved)
        True
    """

    updates: Mapping[str, Update]
    """By parameter; a parameter that the step did not touch (frozen, or without a gradient) has none."""
    batches: tuple[Batch, ...] = ()
    warm: bool = False
    """Whether the optimizer had a past before it was watched, so that there is a part `past`."""
    auxiliary: tuple[str, ...] = ()
    """The auxiliary losses, each a part of its own: terms of the loss that belong to no training sample."""
    precision: torch.dtype | None = None
    """The coarsest type of the model's parameters in training, if that is bfloat16 or float16: what is of these types
    then is in float32 here."""
    outside: OutsideChange | None = None
    """What else changed the model between the end of the step before and `before`; None if nothing did."""
    closing: bool = False
    """Whether it is no step of the optimizer, but only brings what changed the model behind the run's last one."""

    @property
    def start(self) -> State:
        """Where the step before ended: `before`, unless something changed the model in between."""
        return self.before if self.outside is None else self.outside.before

    @property
    def moved(self) -> Collection[str]:
        """The parameters that the optimizer touched."""
        return self.updates.keys()

    @cached_property
    def parts(self) -> Mapping[str, Part[Update]]:
        """The parts that add up to `θ_s − θ_{s+1}`, and `SHARES` of them. `past` is there only on a warm start."""
        if self.closing:
            return {}
        compute: dict[str, Callable[[Update], Tensor]] = {
            "kernel": Update.kernel,
            "momentum": Update.momentum,
            "regularization": Update.regularization,
        }
        for name in (*self.auxiliary, *(["past"] if self.warm else [])):
            compute[name] = partial(Update.contribution, name=name)
        compute["rounding"] = Update.rounding
        return {name: Part(self.updates, function) for name, function in compute.items()}
