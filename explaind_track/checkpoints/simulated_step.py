"""A step that the real optimizer takes from a checkpoint, in the memory of training: 4 copies of the parameters.

    the model's parameters    θ_s, all the time but for the one parameter that the optimizer is moving
    the gradients' storage    the part `kernel`, of the batch
    the momentum buffers'     the part `past`, of the first moment
    the second moments'       θ_s(t), written anew for each node

Weight decay is θ_s times a number; where it is coupled (Adam's and SGD's `weight_decay`), it takes a copy of its own.
The path ends where the parts lead, θ_s − kernel − past − regularization in the parameters' own arithmetic: where the
optimizer has ended up to float rounding, which the proof of its rule shows.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.proof import require_explained
from explaind_track.core.rules import update_rule
from explaind_track.core.step import Change, Part, State
from explaind_track.core.tensors import cuts
from explaind_track.core.update import Contribution, Update

BLOCK = 2**20
"""Entries that are worked on at a time."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Move:
    """How the optimizer moved one parameter; all of the parameter's shape."""

    before: Tensor
    """θ_s, the model's own."""
    kernel: Tensor
    past: Tensor | None
    """None where the optimizer held nothing yet."""
    decay: Tensor | float
    """The part `regularization`, or the number that θ_s is multiplied by to be it."""
    scratch: Tensor
    """θ_s(t)."""
    beta: float
    """How much of the momentum buffer stays from step to step; 0 without one."""

    def rows(self, place: slice) -> dict[str, Tensor]:
        """The parts at some of the parameter's entries."""
        before, kernel = self.before.reshape(-1)[place], self.kernel.reshape(-1)[place]
        past = torch.zeros_like(before) if self.past is None else self.past.reshape(-1)[place]
        decay = before * self.decay if isinstance(self.decay, float) else self.decay.reshape(-1)[place]
        return {"kernel": kernel, "past": past, "regularization": decay}

    def end(self, place: slice, time: float = 1.0) -> Tensor:
        """θ_s(t) = θ_s − t Σ parts, at some of the entries."""
        return self.before.reshape(-1)[place].sub(sum(self.rows(place).values()), alpha=time)

    def whole(self, part: str) -> Tensor:
        """One of the parts."""
        return self.rows(slice(None))[part].reshape(self.before.shape)

    @property
    def blocks(self) -> list[slice]:
        """The entries, cut so that no whole copy is made of any tensor."""
        return cuts(0, self.before.numel(), BLOCK)


@dataclass(frozen=True)
class SimulatedStep(Change):
    """What the optimizer would do next, from a checkpoint."""

    moves: Mapping[str, Move] = field(kw_only=True)
    """By parameter."""

    @classmethod
    def of(cls, number: int, model: nn.Module, moves: Mapping[str, Move]) -> "SimulatedStep":
        """The step from the model's parameters on."""
        before = State({name: value.detach() for name, value in parameters_of(model).items()}, buffers_of(model))
        still = {name: value for name, value in before.parameters.items() if name not in moves}
        ends = Part(moves, lambda move: move.end(slice(None)).reshape(move.before.shape))
        return cls(number, before, State(_Joined(ends, still), before.buffers), moves=moves)

    @property
    def moved(self) -> Collection[str]:
        return self.moves.keys()

    @cached_property
    def parts(self) -> Mapping[str, Part[Move]]:
        """`past` is there where the optimizer has one."""
        has_past = any(move.past is not None for move in self.moves.values())
        names = ("kernel", "past", "regularization") if has_past else ("kernel", "regularization")
        parts = {name: Part(self.moves, partial(Move.whole, part=name)) for name in names}
        return {**parts, "rounding": Part(self.moves, _rounding)}

    def point(self, time: float) -> State:
        """θ_s(t), in the storage that the step has for it."""
        for move in self.moves.values():
            for place in move.blocks:
                move.scratch.view(-1)[place] = move.end(place, time)
        moved = {name: move.scratch for name, move in self.moves.items()}
        return State({**self.before.parameters, **moved}, self.before.buffers)

    def pieces(self, parameter: str, parts: Sequence[str], rest: bool) -> Iterator[tuple[slice, list[Tensor]]]:
        move = self.moves[parameter]
        for place in move.blocks:
            rows = move.rows(place)
            found = [rows[part] for part in parts]
            if rest:
                left = move.before.reshape(-1)[place] - move.end(place)
                for row in found:
                    left -= row
                found.append(left)
            yield place, found


class _Joined(Mapping[str, Tensor]):
    """Tensors that are computed when they are asked for, and others that lie there."""

    def __init__(self, computed: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        self._computed, self._others = computed, others

    def __getitem__(self, name: str) -> Tensor:
        return self._computed[name] if name in self._computed else self._others[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._computed
        yield from self._others

    def __len__(self) -> int:
        return len(self._computed) + len(self._others)


def _rounding(move: Move) -> Tensor:
    """(θ_s − θ_{s+1}) − Σ parts."""
    everything = slice(None)
    left = move.before.reshape(-1) - move.end(everything)
    for row in move.rows(everything).values():
        left -= row
    return left.reshape(move.before.shape)


def moves_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Move]:
    """What the optimizer does with the gradients that the model's parameters hold, in the storage of these gradients
    and of its state, which are gone afterwards. The model's parameters stay as they are.

    Raises UnexplainedUpdateError if the optimizer's rule does not explain how it moves a parameter.
    """
    parameters, moves = parameters_of(model), dict[str, Move]()

    def move(name: str, update: Update) -> None:
        parameter, rule = parameters[name], update.rule
        kernel, past = update.kernel(), update.contribution("past") if "past" in update.contributions else None
        decay = update.regularization() if rule.coupled else float(rule.decoupled)

        # only now, since all of these are computed from what lies there
        state = optimizer.state.pop(parameter, {})
        free = [value for value in state.values() if _is_like(value, parameter) and value is not rule.buffer]
        kernel = update.gradient.copy_(kernel) if _is_like(update.gradient, parameter) else kernel
        past = past if past is None or rule.buffer is None else rule.buffer.copy_(past)
        scratch = free[0] if free else torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        moves[name] = Move(parameter.detach(), kernel, past, decay, scratch, 0.0 if rule.buffer is None else rule.beta)

    take_step(optimizer, parameters, move)
    return moves


def guess_second_moment(optimizer: torch.optim.Adam, steps: int) -> None:
    """Makes a new Adam one that has taken so many steps, as far as the gradients in place tell: nothing in the first
    moment, and their squares in the second. Its own first step would be ten times as long, and in units of 1."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                square = parameter.grad.square()
                state = {"step": torch.tensor(float(steps)), "exp_avg": torch.zeros_like(square), "exp_avg_sq": square}
                optimizer.state[parameter] = {**state, "max_exp_avg_sq": square.clone()} if group["amsgrad"] else state


def adjoints_of(optimizer: torch.optim.Optimizer, model: nn.Module, feature: dict[str, Tensor]) -> dict[str, Tensor]:
    """`(b Q e + d) P φ` by parameter, whose product with a share of the gradient is that share's influence through this
    step (Cor. F.2); in the place of φ, which is used up. The model's parameters stay as they are."""
    adjoints = dict[str, Tensor]()

    def adjoint(name: str, update: Update) -> None:
        if name in feature:
            adjoints[name] = update.adjoint(feature.pop(name)) * update.sign

    take_step(optimizer, parameters_of(model), adjoint)
    return adjoints


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether it can hold numbers of the parameter: contiguous and of its shape and type."""
    is_tensor = isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype is parameter.dtype
    return is_tensor and value.is_contiguous()


def take_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], use: Callable[[str, Update], None]
) -> None:
    """Lets the real optimizer take its step, and hands what it did to each parameter to `use(name, update)`. Each
    parameter gets its numbers back, bit for bit, whatever happens.

    torch's own optimizers move every parameter by itself, and so are asked for one after the other, that one copy at a
    time is enough; others, which may look at all of them, move them together.
    """
    names = {id(value): name for name, value in parameters.items()}
    members = [
        (names[id(parameter)], parameter, group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    gradients = {name: parameter.grad for name, parameter, _ in members}
    for parameter in parameters.values():
        parameter.grad = None

    one_by_one = type(optimizer).__module__.startswith("torch.optim.")
    for some in ([member] for member in members) if one_by_one else [members]:
        _move(optimizer, some, {name: gradients.pop(name) for name, _, _ in some}, use)


def _move(
    optimizer: torch.optim.Optimizer,
    members: Sequence[tuple[str, Tensor, Settings]],
    gradients: Mapping[str, Tensor],
    use: Callable[[str, Update], None],
) -> None:
    """The optimizer's step with some of its parameters."""
    before = {name: parameter.detach().clone() for name, parameter, _ in members}
    first = {name: not optimizer.state.get(parameter) for name, parameter, _ in members}
    past = {name: _momentum(optimizer, settings, parameter) for name, parameter, settings in members}
    try:
        for name, parameter, _ in members:
            parameter.grad = gradients[name]
        optimizer.step()
        for name, parameter, settings in members:
            rule = update_rule(optimizer, settings, optimizer.state[parameter], first[name])
            sign = -1.0 if settings.get("maximize") else 1.0
            turned = gradients[name] if sign > 0 else gradients[name].neg_()

            # B_s = β B_{s−1} + b Q (G_s + λ θ_s): what was there, and what the decay puts in
            contributions: dict[str, Contribution] = {}
            update = Update(before[name], parameter.detach(), turned, rule, contributions, sign)
            if (held := past[name]) is not None:
                contributions["past"] = Contribution(held.mul_(rule.beta))
            if rule.coupled and rule.buffer is not None:
                contributions["regularization"] = Contribution(update.into_buffer(before[name] * rule.coupled))

            require_explained(type(optimizer).__name__, {name: update}, {name: parameter.dtype})
            use(name, update)
    finally:
        with torch.no_grad():
            for name, parameter, _ in members:
                parameter.copy_(before[name])
                parameter.grad = None


def _momentum(optimizer: torch.optim.Optimizer, settings: Settings, parameter: Tensor) -> Tensor | None:
    """A copy of the momentum buffer before the step; None where nothing is in it."""
    state = optimizer.state.get(parameter)
    if not state or float(state.get("step", 1)) == 0:  # a state that was made, and never used
        return None
    buffer = update_rule(optimizer, settings, state, False).buffer
    return buffer.clone() if buffer is not None and bool(buffer.any()) else None
