"""The StepObserver: watches a live optimizer, and tells of each of its steps as a `Step`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.kept_state import KeptState
from explaind_track.core.lasting import lasting_copy
from explaind_track.core.proof import Proof
from explaind_track.core.rules import Rule, require_rule, update_rule
from explaind_track.core.shards import Pieces, local, local_gradient
from explaind_track.core.step import Batch, OutsideChange, State, Step, Validity
from explaind_track.core.tensors import Tensors, low_precision, upcast
from explaind_track.core.update import Contribution, Update


class StepObserver:
    """Watches an optimizer's steps and tells of each as a `Step`.

    Call `before()` right before `optimizer.step()` and `after()` right behind it; `settle()`, once the step it told of
    has served, lets it see whether the next one starts from the same numbers, and if it does not, tell what changed
    them (`Step.outside`). It keeps what the optimizer does not: how much of the momentum buffers is due to coupled
    decay, to auxiliary losses, and to a past that nobody watched.

    What training holds in bfloat16 or float16, a step tells in float32: parameters, gradients, the optimizer's state
    and buffers, the same numbers all of them. What the coarse arithmetic did to the parameters is the part `rounding`.

    Of parameters in pieces (`fully_shard`, tensor parallelism), a step tells the pieces that this process holds.

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
        """As the optimizer has them: in pieces, they are whole to it."""
        self.precision = low_precision(parameters)
        """See `Step.precision`."""
        self.proof = Proof(optimizer, parameters)
        self.momentum_shares: dict[str, dict[str, Tensor]] = {}
        """By part other than the kernel and by parameter: its share of the momentum buffer; in float32 where the buffer
        is of a lower precision."""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._refuse_foreign_parameters()

        # From `before()` to `after()`
        self._auxiliary: Mapping[str, Tensors] = {}
        """The gradients of the auxiliary losses."""
        self._without_state: set[str] = set()
        """The parameters for which the optimizer held no state."""

        # From one step to the next
        self.kept = KeptState(Pieces(parameters))
        """The model as the last step has left it."""
        self._state_versions: list[tuple[int, int]] = []
        """Of the optimizer's state after the last step."""
        self._last_mark: object = None
        """The mark of the last step; None where nobody holds one."""
        self._last_buffers: Tensors = {}
        """The model's buffers after the last step."""
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
        found = {name: local_gradient(p) for name, p, _ in self._members() if p.grad is not None}
        sparse = [name for name, gradient in found.items() if gradient.is_sparse]
        if sparse:
            raise ValueError(f"the gradient of '{sparse[0]}' is sparse; use sparse=False in its module")
        return found

    def spare(self) -> None:
        """Spares memory and time, as large models need: between steps, no copies of the parameters are kept (see
        `KeptState`), and most steps are proven in part (see `Proof`)."""
        self.proof.in_part, self.kept.keeps_copies = True, False

    def begin(self, buffers: Tensors) -> None:
        """Takes the model as it is for where the run begins, unless it has begun already.

        Where nobody calls this, it begins at the first `before()`, and what changes the weights in the first forward
        pass is not seen.
        """
        if not self.kept.is_known:
            self.restart(buffers)

    def restart(self, buffers: Tensors) -> None:
        """Takes the model as it is for what the last step left behind: the next one does not follow from that."""
        self._last_mark, self._state_versions = None, self._versions_of_state()
        self.kept.restart(buffers)

    def pass_over(self) -> None:
        """Leaves out a step that the optimizer has taken, or begun, between `before()` and the end of `after()`, where
        something interrupted it: what it did to the model is a change from outside, and what it left in the momentum
        buffers, with what was there, is the past."""
        self._last_validity.over = True
        self.momentum_shares, self._past_known = {}, False
        self._take_down_past()
        self._state_versions = self._versions_of_state()
        self.kept.forget_step()

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
        if not self.kept.is_known:
            self.restart(buffers)
        self.kept.begin_step(buffers, [name for name, p, _ in self._members() if p.grad is not None])
        self._without_state = {name for name, p, _ in self._members() if not self.optimizer.state.get(p)}
        self._auxiliary = auxiliary or {}

    def continues(self, changed: State) -> bool:
        """Whether what the last step left behind, and the optimizer's state of now, follow from the steps before: who
        changed weights between steps may have changed that state too."""
        return self._last_mark is not None and self.keeps_state(changed)

    def keeps_state(self, changed: State) -> bool:
        """Whether the optimizer's state is as the last step has left it, as far as one can know."""
        return changed.is_empty or self._versions_of_state() == self._state_versions

    def after(self, number: int, buffers: Tensors, batches: tuple[Batch, ...] = ()) -> Step:
        """Tells of the step just taken, right after `optimizer.step()`; valid until `settle()` or the next step.

        Args:
            number: The step's number, s.
            buffers: The model's now.
            batches: The samples that went into its gradient.

        Raises:
            UnexplainedUpdateError: The optimizer's rule does not explain how a parameter moved.
        """
        self.kept.pass_step()
        self._last_buffers = buffers
        before = self.kept.start.upcast()
        after = State(self.kept.now(), buffers).upcast()
        updates = {
            name: self._update(name, parameter, settings, before.parameters[name], after.parameters[name])
            for name, parameter, settings in self._members()
            if parameter.grad is not None
        }
        self.proof.prove(number, updates)

        outside = self._outside(number, before, self.kept.changed)
        follows = None if self.kept.is_lost else self._last_mark
        step = Step(
            number,
            before,
            after,
            updates,
            batches,
            warm=bool(self.momentum_shares.get("past")),
            auxiliary=tuple(self._auxiliary),
            precision=self.precision,
            outside=outside,
            follows=follows if outside is None else outside.mark,
            validity=Validity() if outside is None else outside.validity,
        )
        self._last_mark, self._last_validity = step.mark, step.validity
        return step

    def settle(self) -> None:
        """Keeps `θ_{s+1}` in the place of `θ_s`: the step just told of is not valid any more."""
        self._last_validity.over = True
        self.kept.end_step(self._last_buffers)
        self._state_versions = self._versions_of_state()

    def closing(self, number: int, buffers: Tensors) -> Step | None:
        """Behind the run's last step: what has changed the model since, as a step in which the optimizer does nothing.

        Args:
            number: That of the step which would come next.
            buffers: The model's now.

        Returns:
            The step, valid until the next; None where the model is as the last step has left it.
        """
        after = State({name: p.detach() for name, p in Pieces(self.parameters).items()}, buffers).upcast()
        changes = self.kept.changes(buffers)
        self.kept.note_loss(changes)
        outside = self._outside(number, after, changes)
        if outside is None:
            return None
        return Step(
            number,
            after,
            after,
            updates={},
            precision=self.precision,
            outside=outside,
            closing=True,
            follows=outside.mark,
            validity=outside.validity,
        )

    def _outside(self, number: int, after: State, changed: State) -> OutsideChange | None:
        """What has led from the end of the last step to the state `after`, where the next begins."""
        if changed.is_empty or self.kept.is_lost:
            return None
        return OutsideChange(number, self.kept.left.upcast(), after, changed, follows=self._last_mark)

    def lasting(self, step: Step) -> Step:
        """The step just told of, in tensors of its own, which outlast the next one. It shares θ with the lasting step
        that it follows."""
        step.require_valid()
        rules = {}
        for name, parameter, settings in self._members():
            if name in step.updates:
                # a rule holds tensors of the optimizer's state: it is made anew, of copies
                state = {key: _copied(value) for key, value in self.optimizer.state[parameter].items()}
                rules[name] = self._rule(name, dict(settings), state)
        self._last_lasting = lasting_copy(step, self._last_lasting, rules)
        return self._last_lasting

    # --------------------------------------------------------------- its past

    def adopt(self, momentum_shares: Mapping[str, Tensors]) -> None:
        """Goes on where a record left off: the shares of the momentum buffers as they were then, and no other past."""
        self.momentum_shares = {part: dict(values) for part, values in momentum_shares.items()}
        self._past_known = True

    def go_on(self, other: "StepObserver", buffers: Tensors) -> None:
        """Goes on where another StepObserver of the run has left off.

        What has changed the model since then is seen, as if this one had watched all the time.

        Args:
            other: The one that has watched, or replayed, the steps so far.
            buffers: The model's now.
        """
        self.adopt(
            {
                part: {name: share.to(self.parameters[name].device, copy=True) for name, share in shares.items()}
                for part, shares in other.momentum_shares.items()
            }
        )
        self.kept.go_on(other.kept.left, buffers)
        self._last_mark, self._state_versions = other._last_mark, self._versions_of_state()

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

        past = {}
        for name, parameter, settings in self._members():
            state = self.optimizer.state.get(parameter)
            if state:
                buffer = update_rule(self.optimizer, settings, _upcast_state(state), False).buffer
                if buffer is not None and buffer.any():
                    past[name] = buffer.clone()
        self.momentum_shares["past"] = past
        self._past_known, self._state_loaded = True, False

    def _versions_of_state(self) -> list[tuple[int, int]]:
        """Of every tensor in the optimizer's state: which it is, and how often it was written to."""
        states = (self.optimizer.state.get(parameter, {}) for _, parameter, _ in self._members())
        values = (value for state in states for value in state.values())
        return [(id(value), local(value)._version) for value in values if isinstance(value, Tensor)]

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

    def _update(self, name: str, parameter: Tensor, settings: dict[str, Any], before: Tensor, after: Tensor) -> Update:
        gradient = upcast(local_gradient(parameter))
        sign = -1.0 if settings.get("maximize") else 1.0
        rule = self._rule(name, settings, self.optimizer.state[parameter])

        # The contributions are put in below, since the way of each into the buffer is the update's to say.
        contributions: dict[str, Contribution] = {}
        frozen = not parameter.requires_grad and not bool(gradient.any())
        turned = gradient if sign > 0 else -gradient
        update = Update(before, after, turned, rule, contributions, sign, frozen)

        for part in dict.fromkeys(("regularization", *self._auxiliary, *self.momentum_shares)):
            auxiliary = self._auxiliary.get(part, {}).get(name)
            signed = None if auxiliary is None else upcast(auxiliary) * sign
            entering = before * rule.coupled if part == "regularization" and rule.coupled else signed
            buffer = self._advance(part, name, update, entering)
            if signed is not None or buffer is not None:
                contributions[part] = Contribution(buffer, signed)
        return update

    def _rule(self, name: str, settings: dict[str, Any], state: Mapping[str, Any]) -> Rule:
        if self.compiled:
            settings = {**settings, "capturable": True}
        return update_rule(self.optimizer, settings, _upcast_state(state), name in self._without_state)

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


def _upcast_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """An optimizer's state of one parameter, as its rule reads it."""
    return {key: upcast(local(value)) if isinstance(value, Tensor) else value for key, value in state.items()}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
