"""Steps in tensors of their own, which last when the run goes on."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from explaind_track.core.rules import Rule
from explaind_track.core.step import Change, OutsideChange, State, Step, Validity
from explaind_track.core.update import Contribution, Update


def lasting_copy(step: Step, last: Step | None, rules: Mapping[str, Rule]) -> Step:
    """The step in tensors of its own. It shares θ with the last one that was copied, if it follows that.

    rules: those of the step's updates by parameter, made of copies of the optimizer's state, whose tensors they hold.
    """
    validity = Validity()
    outside = None if step.outside is None else _copied_change(step.outside, last, validity)
    before = _start(step, last) if outside is None else outside.after
    after = before if step.closing else step.after.copy()

    updates = {
        name: _copied_update(update, before.parameters[name], after.parameters[name], rules[name])
        for name, update in step.updates.items()
    }
    return replace(step, before=before, after=after, updates=updates, outside=outside, validity=validity)


def _start(change: Change, last: Step | None) -> State:
    """The change's beginning."""
    return last.after if last is not None and change.follows is last.mark else change.before.copy()


def _copied_change(change: OutsideChange, last: Step | None, validity: Validity) -> OutsideChange:
    """What it did not change, its end shares with its beginning."""
    before, changed = _start(change, last), change.changed.copy()
    new = changed.upcast()
    after = State({**before.parameters, **new.parameters}, {**before.buffers, **new.buffers})
    return replace(change, before=before, after=after, changed=changed, validity=validity)


def _copied_update(update: Update, before: Tensor, after: Tensor, rule: Rule) -> Update:
    contributions = {
        part: Contribution(_copied(given.buffer), _copied(given.gradient))
        for part, given in update.contributions.items()
    }
    gradient = update.gradient.clone()
    return replace(update, before=before, after=after, gradient=gradient, rule=rule, contributions=contributions)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
