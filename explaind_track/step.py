"""The step: what one optimizer step did, the type that everything else passes through."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
        return self.precondition(buffer.mul_(rule.e).add_(self.gradient, alpha=rule.d))

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

    @property
    def parts(self) -> Mapping[str, Part]:
        """The parts that add up to `θ_s − θ_{s+1}` (`PARTS`), and `SHARES` of them.

        `past` is there only on a warm start.
        """
        compute = {name: getattr(Update, name) for name in (*PARTS, *SHARES) if name != "past" or self.warm}
        return {name: Part(self.updates, function) for name, function in compute.items()}


class UnexplainedUpdate(RuntimeError):
    """A parameter moved by more than the optimizer's rule and float rounding explain."""


class Stepper:
    """Watches an optimizer's steps and tells of each as a `Step`.

    Call `before()` right before `optimizer.step()` and `after()` right behind it. It keeps what the optimizer does
    not: the coupled decay's share of the momentum buffers, and on a warm start that of the unseen past.
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
        self._before: dict[str, Tensor] = {}
        self._fresh: set[str] = set()
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

    def before(self) -> None:
        self._before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fresh = {name for name, p, _ in self._members() if not self.optimizer.state.get(p)}

    def after(self, number: int, buffers: tuple[Tensors, Tensors], batches: tuple[Batch, ...] = ()) -> Step:
        """The step just taken. buffers: the model's, before and after it. Raises UnexplainedUpdate."""
        after = {name: p.detach() for name, p in self.parameters.items()}
        updates = {
            name: self._update(name, parameter, settings)
            for name, parameter, settings in self._members()
            if parameter.grad is not None
        }
        return Step(
            number, State(self._before, buffers[0]), State(after, buffers[1]), updates, batches, bool(self.past_buffers)
        )

    def _update(self, name: str, parameter: Tensor, settings: dict[str, Any]) -> Update:
        state = self.optimizer.state[parameter]
        rule = update_rule(self.optimizer, settings, state, name in self._fresh)
        before = self._before[name]
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
        update = Update(
            before, parameter.detach(), gradient, rule, self.decay_buffers.get(name), self.past_buffers.get(name)
        )
        self._prove(name, update)
        return update

    def _prove(self, name: str, update: Update) -> None:
        """The rule is only believed where it explains the step to within float rounding."""
        kernel, regularization = update.kernel(), update.regularization()
        size = update.before.abs() + update.after.abs() + kernel.abs() + regularization.abs()
        unexplained = (update.before - update.after).sub_(kernel).sub_(regularization).sub_(update.past()).abs_()
        allowed = size.mul_(64 * torch.finfo(size.dtype).eps)
        if bool((unexplained > allowed).any()):
            optimizer = type(self.optimizer).__name__
            raise UnexplainedUpdate(
                f"the rule for {optimizer} does not explain how it changed '{name}': "
                f"{float((unexplained / allowed).max()):.0f} times what float rounding allows. Either something else "
                f"changed the parameter between {optimizer}.step()'s start and end, or this class needs a rule of its "
                "own: register one with @explaind_track.update_rule.register"
            )
