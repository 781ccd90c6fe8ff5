"""The StepObserver: watches a live optimizer, and tells of each of its steps as a `Step`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from explaind_track.core.rules import require_rule, update_rule
from explaind_track.core.step import Batch, Contribution, State, Step, Update
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.errors import UnexplainedUpdateError


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _copied_state(state: State) -> State:
    return State(
        {name: value.detach().clone() for name, value in state.parameters.items()},
        {name: value.detach().clone() for name, value in state.buffers.items()},
    )


class StepObserver:
    """Watches an optimizer's steps and tells of each as a `Step`.

    Call `before()` right before `optimizer.step()` and `after()` right behind it; `settle()`, once the step it told of
    has served, lets it see whether the next one starts from the same numbers. It keeps what the optimizer does not:
    how much of the momentum buffers is due to coupled decay, to auxiliary losses, and to a past that nobody watched.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Tensors) -> None:
        """parameters: the model's, by name; the optimizer's have to be among them.

        Raises ValueError if they are not, or are not of real numbers; TypeError for an optimizer without a rule.
        """
        require_rule(optimizer)
        self.optimizer = optimizer
        self.parameters = parameters
        self.buffers: dict[str, dict[str, Tensor]] = {}
        """By part other than the kernel and by parameter: its share of the momentum buffer."""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._refuse_foreign_parameters()
        self._before = State({}, {})
        self._after_buffers: Tensors = {}
        self._auxiliary: Mapping[str, Tensors] = {}
        self._fresh: set[str] = set()
        self._last: object = None
        self._settled: State | None = None
        self._lasting: Step | None = None
        self._watching = self._loaded = False
        optimizer.register_load_state_dict_post_hook(lambda _: self._note_loading())

    def _refuse_foreign_parameters(self) -> None:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        shapes = [tuple(p.shape) for p in held if id(p) not in self._names]
        if shapes:
            raise ValueError(
                f"the optimizer holds {len(shapes)} parameter(s) that the model does not have, of shapes {shapes[:5]}; "
                "make the optimizer from the parameters of the model that is tracked (after moving it to its device)"
            )
        bad = [f"{self._names[id(p)]} ({p.dtype})" for p in held if not p.is_floating_point()]
        if bad:
            raise ValueError(f"only parameters of real numbers can be explained, not {', '.join(bad)}")

    def _members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield self._names[id(parameter)], parameter, group

    def _note_loading(self) -> None:
        self._loaded = True

    def _begin(self) -> None:
        """At the first step: what the optimizer holds already is the past."""
        if self._watching:
            if self._loaded:
                raise RuntimeError(
                    "the optimizer's state was loaded after its first step was watched, so what its momentum holds is "
                    "not known any more; load first, then make the Tracker"
                )
            return
        self._watching, self._loaded = True, False
        past = self.buffers.setdefault("past", {})
        for name, parameter, settings in self._members():
            state = self.optimizer.state.get(parameter)
            if state:
                buffer = update_rule(self.optimizer, settings, state, False).buffer
                if buffer is not None and buffer.any():
                    past[name] = buffer.clone()

    def adopt(self, buffers: Mapping[str, Tensors]) -> None:
        """Goes on where a record left off: `buffers` as they were then; there is no other past."""
        self.buffers = {part: dict(values) for part, values in buffers.items()}
        self._watching = True

    def settle(self) -> None:
        """Keeps `θ_{s+1}` in the place of `θ_s`: the step just told of is not valid any more."""
        for name, parameter in self.parameters.items():
            self._before.parameters[name].copy_(parameter.detach())
        self._settled = State(self._before.parameters, {n: value.clone() for n, value in self._after_buffers.items()})

    def untouched(self, buffers: Tensors) -> bool:
        """Whether parameters and buffers are, bit for bit, what they were when the last step was settled."""
        kept = self._settled
        return kept is not None and (
            all(same_bits(kept.parameters[name], parameter.detach()) for name, parameter in self.parameters.items())
            and all(same_bits(kept.buffers[name], buffer.detach()) for name, buffer in buffers.items())
        )

    def go_on(self, buffers: Mapping[str, Tensors], model_buffers: Tensors) -> None:
        """Goes on where another StepObserver has left off: with its shares of the momentum buffers (as copies), at the
        parameters and with the model's buffers of now."""
        self.adopt({part: {name: value.clone() for name, value in held.items()} for part, held in buffers.items()})
        self._before = State({name: p.detach().clone() for name, p in self.parameters.items()}, {})
        self._settled = State(self._before.parameters, {n: value.clone() for n, value in model_buffers.items()})
        self._last = object()

    @property
    def continues(self) -> bool:
        """After `before()`: whether the step starts, bit for bit, where the one before it ended."""
        return self._last is not None

    def gradients(self) -> dict[str, Tensor]:
        """Those that the optimizer is about to use, by parameter. Raises ValueError if one is sparse."""
        found = {name: p.grad.detach() for name, p, _ in self._members() if p.grad is not None}
        sparse = [name for name, gradient in found.items() if gradient.is_sparse]
        if sparse:
            raise ValueError(f"the gradient of '{sparse[0]}' is sparse; use sparse=False in its module")
        return found

    def before(self, buffers: Tensors, auxiliary: Mapping[str, Tensors] | None = None) -> None:
        """buffers: the model's as the step began, before its forward pass; they have to last as long as the step.
        auxiliary: the gradient of every auxiliary loss, by its name and by parameter."""
        self._begin()
        if self.untouched(buffers):
            self._before = State(self._before.parameters, buffers)
        else:
            self._before = State({name: p.detach().clone() for name, p in self.parameters.items()}, buffers)
            self._last = None
        self._fresh = {name for name, p, _ in self._members() if not self.optimizer.state.get(p)}
        self._auxiliary, self._settled = auxiliary or {}, None

    def after(self, number: int, buffers: Tensors, batches: tuple[Batch, ...] = ()) -> Step:
        """The step just taken. buffers: the model's now. Raises UnexplainedUpdateError."""
        self._after_buffers = buffers
        after = State({name: p.detach() for name, p in self.parameters.items()}, buffers)
        updates = {
            name: self._update(name, parameter, settings)
            for name, parameter, settings in self._members()
            if parameter.grad is not None
        }
        self._prove(updates)
        warm = bool(self.buffers.get("past"))
        step = Step(
            number, self._before, after, updates, batches, warm, tuple(self._auxiliary), follows=self._last
        )  # fmt: skip
        self._last = step.mark
        return step

    def lasting(self, step: Step) -> Step:
        """The step just told of, in tensors of its own, which outlast the next one. It shares θ with the lasting step
        that it follows."""
        last = self._lasting
        follows = last is not None and step.follows is last.mark
        before = last.after if last is not None and follows else _copied_state(step.before)
        after = _copied_state(step.after)
        updates = {}
        for name, parameter, settings in self._members():
            if name not in step.updates:
                continue
            update = step.updates[name]
            state = {key: _copied(value) for key, value in self.optimizer.state[parameter].items()}
            updates[name] = replace(
                update,
                before=before.parameters[name],
                after=after.parameters[name],
                gradient=update.gradient.clone(),
                rule=update_rule(self.optimizer, dict(settings), state, name in self._fresh),
                sources={p: Contribution(_copied(s.buffer), _copied(s.gradient)) for p, s in update.sources.items()},
            )
        self._lasting = replace(step, before=before, after=after, updates=updates)
        return self._lasting

    def _update(self, name: str, parameter: Tensor, settings: dict[str, Any]) -> Update:
        gradient = cast(Tensor, parameter.grad).detach()
        sign = -1.0 if settings.get("maximize") else 1.0
        rule = update_rule(self.optimizer, settings, self.optimizer.state[parameter], name in self._fresh)
        before = self._before.parameters[name]
        sources: dict[str, Contribution] = {}
        update = Update(before, parameter.detach(), gradient if sign > 0 else -gradient, rule, sources, sign)
        for part in dict.fromkeys(("regularization", *self._auxiliary, *self.buffers)):
            own = self._auxiliary.get(part, {}).get(name)
            signed = None if own is None else own * sign
            entering = before * rule.coupled if part == "regularization" and rule.coupled else signed
            buffer = self._advance(part, name, update, entering)
            if signed is not None or buffer is not None:
                sources[part] = Contribution(buffer, signed)
        return update

    def _advance(self, part: str, name: str, update: Update, gradient: Tensor | None) -> Tensor | None:
        """A part's share of the momentum buffer after the step, `β R_{s−1} + b Q · gradient`."""
        held = self.buffers.setdefault(part, {})
        if update.rule.buffer is not None:
            if name in held:
                held[name].mul_(update.rule.beta)
            if gradient is not None:
                entered = update.into_buffer(gradient.clone())
                held[name] = held[name].add_(entered) if name in held else entered
        return held.get(name)

    def _prove(self, updates: Mapping[str, Update]) -> None:
        """The rule is only believed where it explains the step to within float rounding."""
        failed = [_excess(update).gt(1).any() for update in updates.values()]
        if not failed or not bool(torch.stack([flag.to(failed[0].device) for flag in failed]).any()):
            return
        excess = {name: float(_excess(update).nan_to_num().max()) for name, update in updates.items()}
        name = max(excess, key=excess.__getitem__)
        optimizer = type(self.optimizer).__name__
        raise UnexplainedUpdateError(
            f"the rule for {optimizer} does not explain how it changed '{name}': "
            f"{excess[name]:.0f} times what float rounding allows. Either something else "
            f"changed the parameter between {optimizer}.step()'s start and end, or this class needs a rule of its "
            "own: register one with @explaind_track.update_rule.register"
        )


def _excess(update: Update) -> Tensor:
    """|θ_s − θ_{s+1} − parts| in units of what float rounding allows, elementwise; NaN where nothing can be told."""
    rest, size = update.before - update.after, update.before.abs()
    parts = [update.kernel(), update.regularization()]
    parts += [update.source(name) for name in update.sources if name != "regularization"]
    for part in parts:
        rest -= part
        size += part.abs_()
    return rest.abs_().div_(size.mul_(64 * torch.finfo(update.rule.precision or size.dtype).eps))
