"""The step: what one optimizer step did, the type that everything else passes through."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from explaind_track.rules import Rule, require_rule, update_rule

Tensors = Mapping[str, Tensor]

PARTS = ("kernel", "regularization", "past", "rounding")
"""The parts of a step in their order; they add up to `θ_s − θ_{s+1}`."""

SHARES = {"momentum": "kernel"}
"""Shares of a part that can be asked for beside it: a share's name, and the part it belongs to."""


@dataclass(frozen=True)
class State:
    """Parameters and buffers of the model, by name (tied parameters once, under their first name)."""

    parameters: Tensors
    buffers: Tensors


@dataclass(frozen=True)
class Batch:
    """The samples of one (micro-)batch and how they entered the step's gradient `Σ_k w_k ∇L_k`."""

    size: int
    weight: Tensor | float
    """`w_{i,k}`: one number for all samples or a tensor (N,)."""
    index: Tensor | None = None
    """Which training samples these are, (N,) int64; None if the loop did not say."""
    data: Any = None
    """The batch itself; None where a trajectory has only its index."""
    random_state: Mapping[str, Tensor] = field(default_factory=dict)
    """The random state before the batch's forward pass, by device."""


@dataclass(frozen=True)
class Update:
    """One parameter's update `θ_s − θ_{s+1}`, and the parts it is made of; the equations are those of `rules`.

    The buffer is split along with it, `B_s = M_s + R_s + Z_s`: of gradients, of coupled decay, and of what the
    optimizer had gathered before it was watched. All tensors have the parameter's shape.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    """`G_s`, with the sign that the optimizer gives it (`maximize` turns it around)."""
    rule: Rule
    decay_buffer: Tensor | None = None
    past_buffer: Tensor | None = None

    def precondition(self, direction: Tensor) -> Tensor:
        """`P · direction`, in place where `direction` is ours: callers pass fresh tensors."""
        return direction if self.rule.preconditioner is None else direction.mul_(self.rule.preconditioner())

    def _gradient_buffer(self) -> Tensor | None:
        """`M_s`, a fresh tensor."""
        if self.rule.buffer is None:
            return None
        buffer = self.rule.buffer.clone()
        for other in (self.decay_buffer, self.past_buffer):
            if other is not None:
                buffer -= other
        return buffer

    def kernel(self) -> Tensor:
        """`u_s = P (e M_s + d G_s)`: what the training samples did (Thm. 3.1, summed over the samples)."""
        buffer, rule = self._gradient_buffer(), self.rule
        if buffer is None:
            return self.precondition(self.gradient * rule.d)
        buffer.mul_(rule.e)
        return self.precondition(buffer.add_(self.gradient, alpha=rule.d) if rule.d else buffer)

    def momentum(self) -> Tensor:
        """`P e β M_{s−1}`: the share of the kernel part that comes from earlier steps' gradients."""
        buffer, rule = self._gradient_buffer(), self.rule
        if buffer is None:
            return torch.zeros_like(self.before)
        return self.precondition(buffer.sub_(self.gradient, alpha=rule.b).mul_(rule.e))

    def regularization(self) -> Tensor:
        """`r_s = P (e R_s + d λ θ_s) + γ θ_s`: what weight decay did."""
        rule = self.rule
        result = self.before * rule.decoupled
        if rule.coupled or self.decay_buffer is not None:
            coupled = self.before * (rule.d * rule.coupled)
            if self.decay_buffer is not None:
                coupled.add_(self.decay_buffer, alpha=rule.e)
            result += self.precondition(coupled)
        return result

    def past(self) -> Tensor:
        """`P e Z_s`: what arrives from gradients (and decay) older than the record, on a warm start."""
        if self.past_buffer is None:
            return torch.zeros_like(self.before)
        return self.precondition(self.past_buffer * self.rule.e)

    def rounding(self) -> Tensor:
        """`(θ_s − θ_{s+1}) − u_s − r_s − past`: what float arithmetic did."""
        return (self.before - self.after) - self.kernel() - self.regularization() - self.past()

    def adjoint(self, direction: Tensor) -> Tensor:
        """`P (e b + d) · direction`: its product with `w_k ∇L_k` is the sample's influence through its own step."""
        return self.precondition(direction * (self.rule.e * self.rule.b + self.rule.d))


class Part(Mapping[str, Tensor]):
    """One part of a step by parameter, computed when asked for and not kept."""

    def __init__(self, updates: Mapping[str, Update], compute: Callable[[Update], Tensor]) -> None:
        self._updates, self._compute = updates, compute

    def __getitem__(self, parameter: str) -> Tensor:
        return self._compute(self._updates[parameter])

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)


@dataclass(frozen=True)
class Step:
    """What training step `number` did: `θ_s` → `θ_{s+1}`.

    Its tensors belong to whoever made the step (the training loop, or a trajectory's replay) and hold until that
    goes on to its next step.
    """

    number: int
    before: State
    after: State
    updates: Mapping[str, Update]
    """By parameter; a parameter that the step did not touch (frozen, or without a gradient) has none."""
    batches: tuple[Batch, ...] = ()
    warm: bool = False
    """Whether the optimizer had a past before it was watched, so that there is a part `past`."""
    mark: object = field(default_factory=object)
    """Stands for this very step."""
    follows: object = None
    """The mark of the step whose `after` is, bit for bit, this one's `before`; None where there is none."""

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """The parts that add up to `θ_s − θ_{s+1}` (`PARTS`), and `SHARES` of them.

        `past` is there only on a warm start.
        """
        compute = {name: getattr(Update, name) for name in (*PARTS, *SHARES) if name != "past" or self.warm}
        return {name: Part(self.updates, function) for name, function in compute.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are the same, bit for bit (NaN included)."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
    return tensor.contiguous().reshape(-1).view(whole)


class UnexplainedUpdate(RuntimeError):
    """A parameter moved by more than the optimizer's rule and float rounding explain."""


class Stepper:
    """Watches an optimizer's steps and tells of each as a `Step`.

    Call `before()` right before `optimizer.step()` and `after()` right behind it; `settle()`, once the step it told of
    has served, lets it see whether the next one starts from the same numbers. It keeps what the optimizer does not:
    the coupled decay's share of the momentum buffers, and on a warm start that of the unseen past.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Tensors) -> None:
        """parameters: the model's, by name; the optimizer's have to be among them (ValueError)."""
        require_rule(optimizer)
        names = {id(parameter): name for name, parameter in parameters.items()}
        shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
        if shapes:
            raise ValueError(
                f"the optimizer holds {len(shapes)} parameter(s) that the model does not have, of shapes {shapes[:5]}; "
                "make the optimizer from the parameters of the model that is tracked (after moving it to its device)"
            )
        self.optimizer = optimizer
        self.parameters = parameters
        self.decay_buffers: dict[str, Tensor] = {}
        self.past_buffers: dict[str, Tensor] = {}
        self._names = names
        self._before = State({}, {})
        self._buffers: Tensors = {}
        self._fresh: set[str] = set()
        self._last: object = None
        self._settled: State | None = None
        self._adopt_past()

    def _members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield self._names[id(parameter)], parameter, group

    def _adopt_past(self) -> None:
        for name, parameter, settings in self._members():
            state = self.optimizer.state.get(parameter)
            if state:
                buffer = update_rule(self.optimizer, settings, state, False).buffer
                if buffer is not None and buffer.any():
                    self.past_buffers[name] = buffer.clone()

    def settle(self) -> None:
        """Keeps `θ_{s+1}` in the place of `θ_s`: the step just told of is not valid any more."""
        for name, parameter in self.parameters.items():
            self._before.parameters[name].copy_(parameter.detach())
        self._settled = State(self._before.parameters, {n: value.clone() for n, value in self._buffers.items()})

    def untouched(self, buffers: Tensors) -> bool:
        """Whether parameters and buffers are, bit for bit, what they were when the last step was settled."""
        kept = self._settled
        return kept is not None and (
            all(same_bits(kept.parameters[name], parameter.detach()) for name, parameter in self.parameters.items())
            and all(same_bits(kept.buffers[name], buffer.detach()) for name, buffer in buffers.items())
        )

    def before(self, buffers: Tensors) -> None:
        """buffers: the model's as the step began, before its forward pass; they have to last as long as the step."""
        if self.untouched(buffers):
            self._before = State(self._before.parameters, buffers)
        else:
            self._before = State({name: p.detach().clone() for name, p in self.parameters.items()}, buffers)
            self._last = None
        self._fresh = {name for name, p, _ in self._members() if not self.optimizer.state.get(p)}
        self._settled = None

    def after(self, number: int, buffers: Tensors, batches: tuple[Batch, ...] = ()) -> Step:
        """The step just taken. buffers: the model's now. Raises UnexplainedUpdate."""
        self._buffers = buffers
        after = State({name: p.detach() for name, p in self.parameters.items()}, buffers)
        updates = {
            name: self._update(name, parameter, settings)
            for name, parameter, settings in self._members()
            if parameter.grad is not None
        }
        self._prove(updates)
        step = Step(number, self._before, after, updates, batches, bool(self.past_buffers), follows=self._last)
        self._last = step.mark
        return step

    def _update(self, name: str, parameter: Tensor, settings: dict[str, Any]) -> Update:
        state = self.optimizer.state[parameter]
        rule = update_rule(self.optimizer, settings, state, name in self._fresh)
        before = self._before.parameters[name]
        gradient = cast(Tensor, parameter.grad).detach()
        if settings.get("maximize"):
            gradient = -gradient
        if rule.buffer is not None:
            if rule.coupled and name not in self.decay_buffers:
                self.decay_buffers[name] = torch.zeros_like(before)
            if name in self.decay_buffers:
                self.decay_buffers[name].mul_(rule.beta).add_(before, alpha=rule.b * rule.coupled)
            if name in self.past_buffers:
                self.past_buffers[name].mul_(rule.beta)
        return Update(
            before, parameter.detach(), gradient, rule, self.decay_buffers.get(name), self.past_buffers.get(name)
        )

    def _prove(self, updates: Mapping[str, Update]) -> None:
        """The rule is only believed where it explains the step to within float rounding."""
        failed = [_excess(update).gt(1).any() for update in updates.values()]
        if not failed or not bool(torch.stack([flag.to(failed[0].device) for flag in failed]).any()):
            return
        excess = {name: float(_excess(update).nan_to_num().max()) for name, update in updates.items()}
        name = max(excess, key=excess.__getitem__)
        optimizer = type(self.optimizer).__name__
        raise UnexplainedUpdate(
            f"the rule for {optimizer} does not explain how it changed '{name}': "
            f"{excess[name]:.0f} times what float rounding allows. Either something else "
            f"changed the parameter between {optimizer}.step()'s start and end, or this class needs a rule of its "
            "own: register one with @explaind_track.update_rule.register"
        )


def _excess(update: Update) -> Tensor:
    """|θ_s − θ_{s+1} − parts| in units of what float rounding allows, elementwise; NaN where nothing can be told."""
    kernel, regularization = update.kernel(), update.regularization()
    rest = (update.before - update.after).sub_(kernel).sub_(regularization)
    if update.past_buffer is not None:
        rest.sub_(update.past())
    size = update.before.abs().add_(kernel.abs_()).add_(regularization.abs_())
    return rest.abs_().div_(size.mul_(64 * torch.finfo(size.dtype).eps))
