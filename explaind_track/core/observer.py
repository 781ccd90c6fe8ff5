"""The StepObserver: watches a live optimizer, and tells of each of its steps as a `Step`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from explaind_track.core.rules import Rule, require_rule, update_rule
from explaind_track.core.step import Batch, Contribution, State, Step, Update, Validity
from explaind_track.core.tensors import Tensors, same_bits
from explaind_track.errors import UnexplainedUpdateError


class StepObserver:
    """Watches an optimizer's steps and tells of each as a `Step`.

    Call `before()` right before `optimizer.step()` and `after()` right behind it; `settle()`, once the step it told of
    has served, lets it see whether the next one starts from the same numbers. It keeps what the optimizer does not:
    how much of the momentum buffers is due to coupled decay, to auxiliary losses, and to a past that nobody watched.

    Example:
        >>> import torch
        >>> from explaind_track import StepObserver
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> observer = StepObserver(optimizer, dict(model.named_parameters()))
        >>> for number in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(5, 3)).mean().backward()
        ...     observer.before(buffers={})
        ...     optimizer.step()
        ...     step = observer.after(number, buffers={})
        ...     print(step.number, list(step.parts), bool(step.follows))
        ...     observer.settle()
        0 ['kernel', 'momentum', 'regularization', 'rounding'] False
        1 ['kernel', 'momentum', 'regularization', 'rounding'] True
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Tensors) -> None:
        """Starts to watch; what the optimizer holds at its next step is the past.

        Args:
            optimizer: Any that a rule is registered for, see `update_rule`.
            parameters: The model's, by name; the optimizer's have to be among them.

        Raises:
            ValueError: The optimizer's parameters are not among the model's, or are not of real numbers.
            TypeError: No rule is registered for the optimizer.
        """
        require_rule(optimizer)
        self.optimizer = optimizer
        self.parameters = parameters
        self.momentum_shares: dict[str, dict[str, Tensor]] = {}
        """By part other than the kernel and by parameter: its share of the momentum buffer."""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._refuse_foreign_parameters()

        # From `before()` to `after()`
        self._before = State({}, {})
        """`θ_s` (a copy) and the model's buffers, where the step began."""
        self._auxiliary: Mapping[str, Tensors] = {}
        """The gradients of the auxiliary losses."""
        self._without_state: set[str] = set()
        """The parameters for which the optimizer held no state."""

        # From one step to the next
        self._last_mark: object = None
        """The mark of the last step; None once it is known that the next one does not start where that ended."""
        self._last_buffers: Tensors = {}
        """The model's buffers after the last step."""
        self._settled: State | None = None
        """What the last step left behind, kept from `settle()` to the next `before()`."""
        self._last_validity = Validity()
        """Whether the last step may still be looked at."""
        self._last_lasting: Step | None = None
        """The step that `lasting()` gave last."""

        self.compiled = False
        """Whether the optimizer's step runs compiled; then its scalars are tensors, as with `capturable=True`."""
        self._past_known = False
        """Whether the optimizer's past was taken down already: from the first step on."""
        self._state_loaded = False
        """Whether a state was loaded into the optimizer, after which the momentum shares do not fit it any more."""
        optimizer.register_load_state_dict_post_hook(lambda _: self._note_loading())

    # ------------------------------------------------------------ around a step

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the optimizer is about to use, by parameter.

        Raises:
            ValueError: One of them is sparse.
        """
        found = {name: p.grad.detach() for name, p, _ in self._members() if p.grad is not None}
        sparse = [name for name, gradient in found.items() if gradient.is_sparse]
        if sparse:
            raise ValueError(f"the gradient of '{sparse[0]}' is sparse; use sparse=False in its module")
        return found

    def before(self, buffers: Tensors, auxiliary: Mapping[str, Tensors] | None = None) -> None:
        """Takes down where a step begins, right before `optimizer.step()`.

        Args:
            buffers: The model's as the step began, before its forward pass; they have to last as long as the step.
            auxiliary: The gradient of every auxiliary loss, by its name and by parameter.

        Raises:
            RuntimeError: A state was loaded into the optimizer after the first step.
        """
        self._take_down_past()
        self._last_validity.over = True

        if self.untouched(buffers):
            self._before = State(self._before.parameters, buffers)
        else:
            self._before = State({name: p.detach().clone() for name, p in self.parameters.items()}, buffers)
            self._last_mark = None

        self._without_state = {name for name, p, _ in self._members() if not self.optimizer.state.get(p)}
        self._auxiliary, self._settled = auxiliary or {}, None

    @property
    def continues(self) -> bool:
        """After `before()`: whether the step starts, bit for bit, where the one before it ended."""
        return self._last_mark is not None

    def after(self, number: int, buffers: Tensors, batches: tuple[Batch, ...] = ()) -> Step:
        """Tells of the step just taken, right after `optimizer.step()`; valid until `settle()` or the next step.

        Args:
            number: The step's number, s.
            buffers: The model's now.
            batches: The samples that went into its gradient.

        Raises:
            UnexplainedUpdateError: The optimizer's rule does not explain how a parameter moved.
        """
        self._last_buffers = buffers
        after = State({name: p.detach() for name, p in self.parameters.items()}, buffers)
        updates = {
            name: self._update(name, parameter, settings)
            for name, parameter, settings in self._members()
            if parameter.grad is not None
        }
        self._prove(updates)

        warm = bool(self.momentum_shares.get("past"))
        auxiliary = tuple(self._auxiliary)
        step = Step(number, self._before, after, updates, batches, warm, auxiliary, follows=self._last_mark)
        self._last_mark, self._last_validity = step.mark, step.validity
        return step

    def settle(self) -> None:
        """Keeps `θ_{s+1}` in the place of `θ_s`: the step just told of is not valid any more."""
        self._last_validity.over = True
        for name, parameter in self.parameters.items():
            self._before.parameters[name].copy_(parameter.detach())
        self._settled = State(self._before.parameters, _copied_tensors(self._last_buffers))

    def untouched(self, buffers: Tensors) -> bool:
        """Whether parameters and buffers are, bit for bit, what they were when the last step was settled."""
        kept = self._settled
        return kept is not None and (
            all(same_bits(kept.parameters[name], parameter.detach()) for name, parameter in self.parameters.items())
            and all(same_bits(kept.buffers[name], buffer.detach()) for name, buffer in buffers.items())
        )

    def lasting(self, step: Step) -> Step:
        """The step just told of, in tensors of its own, which outlast the next one. It shares θ with the lasting step
        that it follows."""
        step.require_valid()
        last = self._last_lasting
        follows = last is not None and step.follows is last.mark
        before = last.after if last is not None and follows else _copied_state(step.before)
        after = _copied_state(step.after)

        updates = {}
        for name, parameter, settings in self._members():
            if name not in step.updates:
                continue
            update = step.updates[name]
            # The rule holds tensors of the optimizer's state: it is made anew, of copies.
            state = {key: _copied(value) for key, value in self.optimizer.state[parameter].items()}
            updates[name] = replace(
                update,
                before=before.parameters[name],
                after=after.parameters[name],
                gradient=update.gradient.clone(),
                rule=self._rule(name, dict(settings), state),
                contributions={
                    part: Contribution(_copied(given.buffer), _copied(given.gradient))
                    for part, given in update.contributions.items()
                },
            )

        self._last_lasting = replace(step, before=before, after=after, updates=updates, validity=Validity())
        return self._last_lasting

    # --------------------------------------------------------------- its past

    def adopt(self, momentum_shares: Mapping[str, Tensors]) -> None:
        """Goes on where a record left off: the shares of the momentum buffers as they were then, and no other past."""
        self.momentum_shares = {part: dict(values) for part, values in momentum_shares.items()}
        self._past_known = True

    def go_on(self, momentum_shares: Mapping[str, Tensors], buffers: Tensors) -> None:
        """Goes on where another StepObserver has left off, at the parameters of now.

        Args:
            momentum_shares: The other's; copied.
            buffers: The model's now; copied.
        """
        self.adopt({part: _copied_tensors(shares) for part, shares in momentum_shares.items()})
        self._before = State(_copied_tensors(self.parameters), {})
        self._settled = State(self._before.parameters, _copied_tensors(buffers))
        self._last_mark = object()  # of the other's last step, which nobody holds any more

    def _note_loading(self) -> None:
        self._state_loaded = True

    def _take_down_past(self) -> None:
        """At the first step: what the optimizer holds already is the past."""
        if self._past_known:
            if self._state_loaded:
                raise RuntimeError(
                    "the optimizer's state was loaded after its first step was watched, so what its momentum holds is "
                    "not known any more; load first, then make the Tracker"
                )
            return

        self._past_known, self._state_loaded = True, False
        past = self.momentum_shares.setdefault("past", {})
        for name, parameter, settings in self._members():
            state = self.optimizer.state.get(parameter)
            if state:
                buffer = update_rule(self.optimizer, settings, state, False).buffer
                if buffer is not None and buffer.any():
                    past[name] = buffer.clone()

    # ----------------------------------------------------------- its parameters

    def _members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """The optimizer's parameters: name, parameter, and the settings of its group."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield self._names[id(parameter)], parameter, group

    def _refuse_foreign_parameters(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        shapes = [tuple(p.shape) for p in parameters if id(p) not in self._names]
        if shapes:
            raise ValueError(
                f"the optimizer holds {len(shapes)} parameter(s) that the model does not have, of shapes {shapes[:5]}; "
                "make the optimizer from the parameters of the model that is tracked (after moving it to its device)"
            )

        bad = [f"{self._names[id(p)]} ({p.dtype})" for p in parameters if not p.is_floating_point()]
        if bad:
            raise ValueError(f"only parameters of real numbers can be explained, not {', '.join(bad)}")

    # ------------------------------------------------------------- their updates

    def _update(self, name: str, parameter: Tensor, settings: dict[str, Any]) -> Update:
        gradient = cast(Tensor, parameter.grad).detach()
        sign = -1.0 if settings.get("maximize") else 1.0
        rule = self._rule(name, settings, self.optimizer.state[parameter])
        before = self._before.parameters[name]

        # The contributions are put in below, since the way of each into the buffer is the update's to say.
        contributions: dict[str, Contribution] = {}
        update = Update(before, parameter.detach(), gradient if sign > 0 else -gradient, rule, contributions, sign)

        for part in dict.fromkeys(("regularization", *self._auxiliary, *self.momentum_shares)):
            auxiliary = self._auxiliary.get(part, {}).get(name)
            signed = None if auxiliary is None else auxiliary * sign
            entering = before * rule.coupled if part == "regularization" and rule.coupled else signed
            buffer = self._advance(part, name, update, entering)
            if signed is not None or buffer is not None:
                contributions[part] = Contribution(buffer, signed)
        return update

    def _rule(self, name: str, settings: dict[str, Any], state: Mapping[str, Any]) -> Rule:
        if self.compiled:
            settings = {**settings, "capturable": True}
        return update_rule(self.optimizer, settings, state, name in self._without_state)

    def _advance(self, part: str, name: str, update: Update, gradient: Tensor | None) -> Tensor | None:
        """A part's share of the momentum buffer after the step, `R_s = β R_{s−1} + b Q · gradient`."""
        shares = self.momentum_shares.setdefault(part, {})
        if update.rule.buffer is not None:
            if name in shares:
                shares[name].mul_(update.rule.beta)
            if gradient is not None:
                entered = update.into_buffer(gradient.clone())
                shares[name] = shares[name].add_(entered) if name in shares else entered
        return shares.get(name)

    def _prove(self, updates: Mapping[str, Update]) -> None:
        """The rule is only believed where it explains the step to within float rounding."""
        kept = [torch.le(*_rest_and_limit(update)).all() for update in updates.values()]
        if not kept or bool(torch.stack([flag.to(kept[0].device) for flag in kept]).all()):
            return

        excess = {name: _excess(update) for name, update in updates.items()}
        name = max(excess, key=excess.__getitem__)
        if excess[name] <= 1:
            return  # whatever is not finite was so before the step
        optimizer = type(self.optimizer).__name__
        raise UnexplainedUpdateError(
            f"the rule for {optimizer} does not explain how it changed '{name}': "
            f"{excess[name]:.0f} times what float rounding allows. Either something else "
            f"changed the parameter between {optimizer}.step()'s start and end, or this class needs a rule of its "
            "own: register one with @explaind_track.update_rule.register"
        )


def _excess(update: Update) -> float:
    """The largest |θ_s − θ_{s+1} − parts| in units of what float rounding allows, infinite where finite numbers became
    others; numbers that were not finite before the step tell nothing."""
    rest, limit = _rest_and_limit(update)
    excess = torch.where(rest <= limit, 0.0, (rest / limit).nan_to_num(nan=torch.inf))
    told = update.before.isfinite() & update.gradient.isfinite()
    return float(torch.where(told, excess, 0.0).max()) if excess.numel() else 0.0


def _rest_and_limit(update: Update) -> tuple[Tensor, Tensor]:
    """|θ_s − θ_{s+1} − parts|, and what float rounding allows of it, elementwise."""
    rest, size = update.before - update.after, update.before.abs()
    parts = [update.kernel(), update.regularization()]
    parts += [update.contribution(name) for name in update.contributions if name != "regularization"]
    for part in parts:
        rest -= part
        size += part.abs_()
    return rest.abs_(), size.mul_(64 * torch.finfo(update.rule.precision or size.dtype).eps)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _copied_tensors(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _copied_state(state: State) -> State:
    return State(_copied_tensors(state.parameters), _copied_tensors(state.buffers))
