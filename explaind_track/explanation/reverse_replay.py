"""The optimizer, gone back through: how the targets depend on each step's gradient, with all that momentum carried on.

The kernel part of step s is `P_s (e_s M_s + d_s G_s)` with `M_s = β_s M_{s−1} + b_s Q_s G_s` (see `rules`). Its adjoint
is

    μ_s = e_s P_s φ_s^test + β_{s+1} μ_{s+1}

and sample k acts through its gradient at step i by `w_{i,k} ⟨b_i Q_i μ_i + d_i P_i φ_i^test, ∇L_k(θ_i)⟩`: all that this
gradient does in step i and later, without a momentum buffer for the sample.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_track.core import distributed
from explaind_track.core.groups import Groups
from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import Tensors
from explaind_track.core.update import Update
from explaind_track.engine.features import Features
from explaind_track.engine.path_integral import Nodes
from explaind_track.engine.per_sample import PerSampleGradients
from explaind_track.errors import SampleMismatchWarning
from explaind_track.explanation.sample_axis import Array, SampleAxis, chosen_rows
from explaind_track.explanation.tiles import Tile


class Adjoint:
    """μ of R targets, for each of A acting steps (one for each step of a window, or one for all of them together).
    Takes A × R copies of the parameters."""

    def __init__(self, acting: int = 1) -> None:
        self._acting = acting
        self._mu: dict[str, Tensor] = {}
        self._decay: dict[str, float] = {}
        """By parameter: the share that is left of what μ was within the window."""

    def back(self, step: Step, features: dict[str, Tensor] | None, slot: int = 0) -> dict[str, Tensor]:
        """Goes back over a step. features: φ^test (R, *shape) by parameter (used up), None for a step outside of the
        window; slot: which of the A acting steps they belong to.

        Returns the directions whose product with `w_k ∇L_k` is the influence, (A·R, *shape) by parameter.
        """
        directions = {}
        for name, update in step.updates.items():
            # P φ^test
            preconditioned = None if features is None else update.precondition(features.pop(name))

            # b Q μ
            direction = self._through_buffer(name, update, preconditioned, slot)

            # b Q μ + d P φ^test
            if preconditioned is not None and update.rule.d:
                if direction is None:
                    direction = preconditioned.new_zeros(self._acting, *preconditioned.shape)
                direction[slot].add_(preconditioned, alpha=update.rule.d)
            if direction is not None and not update.frozen:
                directions[name] = direction.flatten(0, 1)
        return directions

    def _through_buffer(self, name: str, update: Update, preconditioned: Tensor | None, slot: int) -> Tensor | None:
        """Takes b Q μ (A, R, *shape), with μ moved on to the step before; None where the buffer carries nothing."""
        if update.rule.buffer is None:
            return None
        mu = self._mu.get(name)
        if mu is None:
            if preconditioned is None:
                return None
            mu = self._mu[name] = preconditioned.new_zeros(self._acting, *preconditioned.shape)

        # μ_s = e P φ^test + β_{s+1} μ_{s+1}, whose last term is there already
        if preconditioned is not None:
            mu[slot].add_(preconditioned, alpha=update.rule.e)
            self._decay[name] = 1.0
        direction = update.into_buffer(mu.clone())

        # β_s μ_s, for step s − 1
        mu.mul_(update.rule.beta)
        self._decay[name] *= abs(update.rule.beta)
        return direction

    @property
    def spent(self) -> bool:
        """Whether no parameter's μ can be told from 0 any more, next to what it was within the window."""
        return all(decay < torch.finfo(self._mu[name].dtype).eps for name, decay in self._decay.items())


def inner(directions: Tensors, gradient: Tensors) -> Tensor:
    """⟨direction, gradient⟩ over all parameters, (R,)."""
    products = [value.reshape(len(value), -1) @ gradient[name].flatten() for name, value in directions.items()]
    return torch.stack(products).sum(0)


LOSS_ROUNDING = 1e-5
"""The share of a gradient that rounding may have: models of float64 whose losses are computed in float32 are common."""


class Mismatch:
    """By how much the samples' influences miss that of the gradient which the optimizer saw, step by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}
        """Relative to its size; NaN where nobody looked."""
        self.wrong: list[int] = []
        """The steps at which it is more than rounding."""
        self.lost = 0.0
        """The share of the kernel part that no sample has, though each step's samples make up its gradient."""
        self._size = self._allowed = 0.0
        self._left_over = torch.zeros(())

    def note(self, number: int, off: float, size: float, eps: float, floor: float = 0.0) -> None:
        """Notes that at step `number`, what is of this size in arithmetic of this precision is missed by `off`.
        floor: so much may be off however small it is."""
        allowed = max(eps**0.4, LOSS_ROUNDING) * size + floor
        if not off <= allowed:  # NaN too
            self.wrong.append(number)
        self.by_step[number] = off / size if size else off
        self._size, self._allowed = self._size + size, self._allowed + allowed

    def leave(self, kernel: Tensor | float, samples: Tensor | float) -> None:
        """Takes what a step's kernel part and what its samples are to all targets, (R,), in that step and later."""
        self._left_over = self._left_over + kernel - samples

    def look_at_sum(self) -> None:
        """Once all is in: compares what all samples did with what the optimizer's own state says of them."""
        off = float(self._left_over.double().norm())
        if not self.wrong and not off <= self._allowed:
            self.lost = off / self._size if self._size else off

    def warn(self) -> None:
        """Warns of the steps that are wrong, or of a sum that is."""
        if not self.wrong:
            warnings.warn(
                f"the influences of samples miss {self.lost:.2g} of what the optimizer's own state says of them all, "
                "though each step's samples make up its gradient: something other than its steps has changed that "
                "state (moments that were reset or replaced), and what momentum carries on from before then is wrong. "
                "Those of groups are not; for samples, explain a window= before that, or one so long after it that "
                "momentum has forgotten it",
                SampleMismatchWarning,
                stacklevel=5,
            )
            return

        worst = max(self.wrong, key=self.by_step.__getitem__)
        warnings.warn(
            f"at {len(self.wrong)} of {len(self.by_step)} steps, the samples' influences do not add up to that of the "
            f"gradient which the optimizer saw (at step {worst} they miss it by {self.by_step[worst]:.2g} of its "
            "size), and are wrong there. Tell tracker.batch of every batch with the weights of its samples (a clipped "
            "gradient's factor among them), put the model into the mode that it was trained in, and see that "
            "data(index) gives what it gave then, and that the loop changed no weights by itself between a forward "
            "pass and optimizer.step(). Of losses that were computed under autocast, small misses are its rounding",
            SampleMismatchWarning,
            stacklevel=5,
        )


class ReverseSweep:
    """Goes back over a run's steps once, with the targets of one tile."""

    def __init__(
        self,
        tile: Tile,
        features: Features,
        gradients: PerSampleGradients,
        samples: SampleAxis,
        groups: Groups,
        nodes: Callable[[Step], Nodes],
        shared: bool,
    ) -> None:
        """features: of the tile's targets. shared: whether all processes do this sweep together, each for its share of
        every batch's samples."""
        self._tile, self._groups, self._samples, self._shared = tile, groups, samples, shared
        self._features, self._gradients, self._nodes = features, gradients, nodes
        self._adjoint = Adjoint(tile.slots)
        self._complete = True
        """Whether every sample of the steps so far is asked for."""
        self._begun = False
        """Whether the run's first step was reached."""
        self.mismatch = Mismatch()

    def run(self, steps: Iterable[Step], target: Array, kernel: Array, bar: Any) -> None:
        """Adds to `target` (step, seen, group, query, output, sample), where what is not kept has length 1 and `seen`
        counts from step 0, until nothing is left to add; to `kernel` (step, group, query, output) what the optimizer's
        own state says of all samples together. steps: those before the tile's last, the last one first."""
        first, last = self._tile.steps.start, self._tile.steps.stop
        for step in steps:
            acts = first <= step.number < last
            if not acts and self._adjoint.spent:
                break

            slot = step.number - first if acts and self._tile.slots > 1 else 0
            features = self._features.of(step, self._nodes(step)) if acts and step.updates else None
            if features and not (self._shared and distributed.rank()):
                found = self._kernel(step, features)
                kernel[slot] += found.reshape(kernel.shape[1:]).numpy()
                self.mismatch.leave(found.sum(0), 0.0)

            directions = self._adjoint.back(step, features, slot)
            if directions:
                seen = step.number if target.shape[1] > 1 else 0
                self._add(step, directions, torch.from_numpy(target[:, seen]))
            self._begun = step.number == 0
            bar.update()

        # of steps that do not go back to the first, momentum carries more than their samples' gradients
        if self._complete and (self._begun or self._adjoint.spent) and not (self._shared and distributed.rank()):
            self.mismatch.look_at_sum()

    def _kernel(self, step: Step, features: Mapping[str, Tensor]) -> Tensor:
        """⟨φ^test, u_s⟩ by group, (G, R)."""
        some = next(iter(features.values()))
        result = some.new_zeros(len(self._groups), len(some))
        for group, names in enumerate(self._groups.values()):
            for name in names:
                if name in features:
                    rows = features[name].reshape(len(some), -1)
                    result[group] += rows @ step.updates[name].kernel().flatten()
        return result.cpu()

    def _add(self, step: Step, directions: dict[str, Tensor], target: Tensor) -> None:
        """Adds this step's samples to (step, group, query, output, sample), and notes by how much they miss it."""
        # what all of them have to come to: the product with the gradient that the optimizer saw
        gradient = {name: step.updates[name].kernel_gradient() for name in directions}
        expected = inner(directions, gradient)
        norms = torch.stack([value.square().sum() for value in directions.values()]).sum()
        squares = sum(float(value.square().sum()) for value in gradient.values())
        eps = torch.finfo(step.precision or expected.dtype).eps
        units = 8 if step.precision is None else 1  # a quarter of an eps is what is seen in bfloat16
        floor = units * eps * (float(norms) * squares) ** 0.5

        for name, direction in directions.items():
            if step.updates[name].sign < 0:
                direction.neg_()

        total = torch.zeros_like(expected)
        complete = True
        for batch, places, share in self._samples.batches(step):
            complete &= bool((places >= 0).all())
            if self._shared:
                places = _own_share(places)
            chosen = places >= 0
            if not bool(chosen.any()):
                continue
            if not bool(chosen.all()) and self._gradients.stands_alone(step.before, batch):
                batch, places = chosen_rows(batch, chosen), places[chosen]
            total += self._add_batch(step, batch, places, share, directions, target)

        self._complete &= complete
        if complete:
            if self._shared:
                distributed.add_up(total)
            off, norm = float((total - expected).norm()), float(expected.norm())
            self.mismatch.note(step.number, off, norm, eps, floor)
            self.mismatch.leave(0.0, total.unflatten(0, (self._tile.slots, -1)).sum(0).cpu())
        elif not self.mismatch.by_step or step.number % CHECK_EVERY == 0:
            self._compare_gradients(step, gradient)
        else:
            self.mismatch.by_step[step.number] = float("nan")

    def _add_batch(
        self,
        step: Step,
        batch: Batch,
        places: Tensor,
        share: Tensor | float,
        directions: dict[str, Tensor],
        target: Tensor,
    ) -> Tensor:
        """Returns what the batch's samples and all groups make of the gradient's influence together, (A·R,)."""
        count = target.shape[-1]
        chosen = places >= 0
        if self._samples.partition:
            parts = torch.where(chosen, places, count)
            values = self._gradients.products_by_part(step.before, batch, directions, self._groups, parts, count + 1)
        else:
            values = self._gradients.products(step.before, batch, directions, self._groups)

        # A: acting steps, G: groups, x: queries, o: outputs, N: samples, or parts and behind them the rest
        found = values.unflatten(1, (self._tile.slots, *target.shape[2:4])).movedim(1, 0).to(target)  # (A, G, x, o, N)
        if self._samples.partition:
            target += found[..., :count]
        else:
            target.index_add_(4, places[chosen], found if bool(chosen.all()) else found[..., chosen])
        return (values * share).sum((0, 2))

    def _compare_gradients(self, step: Step, gradient: Mapping[str, Tensor]) -> None:
        """Where only some samples are asked for: whether all of them add up to the gradient, without influences."""
        rest = {name: value * step.updates[name].sign for name, value in gradient.items()}
        size = sum(float(value.square().sum()) for value in rest.values()) ** 0.5
        for batch, _, share in self._samples.batches(step):
            for name, value in self._gradients.gradient(step.before, batch, share, rest).items():
                rest[name] = rest[name] - value
        off = sum(float(value.square().sum()) for value in rest.values()) ** 0.5
        eps = torch.finfo(step.precision or next(iter(rest.values())).dtype).eps
        self.mismatch.note(step.number, off, size, eps)


CHECK_EVERY = 50
"""Where only some samples are asked for, their sum tells nothing, and whole gradients are compared so often."""


def _own_share(places: Tensor) -> Tensor:
    """The places of the samples that this process does; −1 for all others."""
    mine = (places >= 0).nonzero()[distributed.rank() :: distributed.processes(), 0]
    return torch.full_like(places, -1).index_copy(0, mine, places[mine])
