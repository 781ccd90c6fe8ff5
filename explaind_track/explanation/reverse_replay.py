"""The optimizer, walked backwards: how the targets depend on each step's gradient, with all that momentum carried on.

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
from torch import Tensor, nn

from explaind_track.core import distributed
from explaind_track.core.groups import Groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Batch, Step
from explaind_track.core.tensors import Tensors, tree_map
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.per_sample import SampleProducts
from explaind_track.errors import SampleMismatchWarning
from explaind_track.explanation.sample_axis import Array, SampleAxis
from explaind_track.explanation.tiles import Tile


class Adjoint:
    """μ of R targets, for each of A acting steps (one for each step of a window, or one for all of them together).
    Takes A × R copies of the parameters."""

    def __init__(self, acting: int = 1) -> None:
        self._acting = acting
        self._mu: dict[str, Tensor] = {}
        self._decay: dict[str, float] = {}

    def back(self, step: Step, features: Mapping[str, Tensor] | None, slot: int = 0) -> dict[str, Tensor]:
        """Goes back over a step. features: φ^test (R, *shape) by parameter (written over), None for a step outside of
        the window; slot: which of the A acting steps they belong to.

        Returns the directions whose product with `w_k ∇L_k` is the influence, (A·R, *shape) by parameter.
        """
        directions = {}
        for name, update in step.updates.items():
            own = None if features is None else update.precondition(features.pop(name))  # type: ignore[attr-defined]
            direction = self._through_buffer(name, step, own, slot)
            if own is not None and update.rule.d:
                if direction is None:
                    direction = own.new_zeros(self._acting, *own.shape)
                direction[slot].add_(own, alpha=update.rule.d)
            if direction is not None:
                directions[name] = direction.flatten(0, 1)
        return directions

    def _through_buffer(self, name: str, step: Step, own: Tensor | None, slot: int) -> Tensor | None:
        update = step.updates[name]
        if update.rule.buffer is None:
            return None
        mu = self._mu.get(name)
        if mu is None:
            if own is None:
                return None
            mu = self._mu[name] = own.new_zeros(self._acting, *own.shape)
        if own is not None:
            mu[slot].add_(own, alpha=update.rule.e)
            self._decay[name] = 1.0
        direction = update.into_buffer(mu.clone())
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


class ReverseSweep:
    """Walks back over a trajectory's steps, with some targets and acting steps first ≤ s < last."""

    def __init__(
        self,
        model: nn.Module,
        query: Query,
        groups: Groups,
        samples: SampleAxis,
        products: SampleProducts,
        walk: Tile,
        nodes: Callable[[Step], int],
        memory: int,
        shared: bool,
    ) -> None:
        """query: the walk's, reduced to the targets that are kept. shared: whether all processes do this walk together,
        each for its share of every batch's samples."""
        self._groups, self._samples, self._nodes, self._shared = groups, samples, nodes, shared
        self._first, self._last = walk.steps.start, walk.steps.stop
        self._acting = walk.acting if walk.apart else 1
        self._adjoint = Adjoint(self._acting)
        self._features = Features(Functional(model), query, memory)
        self._products = products
        self.mismatch: dict[int, float] = {}
        """By step: by how much the samples' influences miss the gradient's, relative to it."""
        self.wrong: list[int] = []
        """The steps at which they miss it by more than rounding."""

    def walk(self, steps: Iterable[Step], target: Array, kernel: Array, bar: Any) -> None:
        """Adds to `target` (step, seen, group, query, output, sample), where what is not kept has length 1 and `seen`
        counts from step 0, until nothing is left to add; to `kernel` (step, group, query, output) what the optimizer's
        own state says of all samples together. steps: those before `last`, the last one first."""
        for step in steps:
            inside = self._first <= step.number < self._last
            if not inside and self._adjoint.spent:
                break
            slot = step.number - self._first if inside and self._acting > 1 else 0
            features = self._features.of(step, self._nodes(step)) if inside and step.updates else None
            if features and not (self._shared and distributed.rank()):
                kernel[slot] += self._kernel(step, features).reshape(kernel.shape[1:]).numpy()
            directions = self._adjoint.back(step, features, slot)
            if directions:
                place = step.number if target.shape[1] > 1 else 0
                self.mismatch[step.number] = self._add(step, directions, torch.from_numpy(target[:, place]))
            bar.update()

    def tell_of_mismatch(self) -> None:
        """Warns of the steps that are wrong."""
        worst = max(self.wrong, key=self.mismatch.__getitem__)
        warnings.warn(
            f"at {len(self.wrong)} of {len(self.mismatch)} steps, the samples' influences do not add up to that of the "
            f"gradient which the optimizer saw (at step {worst} they miss it by {self.mismatch[worst]:.2g} of its "
            "size), and are wrong there. Tell tracker.batch of every batch with the weights of its samples (a clipped "
            "gradient's factor among them), put the model into the mode that it was trained in, and see that "
            "data(index) gives what it gave then",
            SampleMismatchWarning,
            stacklevel=5,
        )

    def _kernel(self, step: Step, features: Mapping[str, Tensor]) -> Tensor:
        """⟨φ^test, u_s⟩ by group, (G, R)."""
        some = next(iter(features.values()))
        result = some.new_zeros(len(self._groups), len(some))
        for group, names in enumerate(self._groups.values()):
            for name in names:
                if name in features:
                    own = features[name].reshape(len(some), -1)
                    result[group] += own @ step.updates[name].kernel().flatten()
        return result.cpu()

    def _add(self, step: Step, directions: dict[str, Tensor], target: Tensor) -> float:
        """Adds this step's samples to (step, group, query, output, sample); returns their mismatch."""
        gradient = {name: step.updates[name].kernel_gradient() for name in directions}
        expected = inner(directions, gradient)
        norms = torch.stack([value.square().sum() for value in directions.values()]).sum()
        size = sum(float(value.square().sum()) for value in gradient.values())
        floor = 8 * torch.finfo(expected.dtype).eps * (float(norms) * size) ** 0.5
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
            if not bool(chosen.all()) and self._products.stands_alone(step, batch):
                batch, places = _rows(batch, chosen), places[chosen]
            total += self._add_batch(step, batch, places, share, directions, target)
        if complete and self._shared:
            distributed.add_up(total)
        if complete:
            return self._miss(step.number, total, expected, floor)
        due = not self.mismatch or step.number % CHECK_EVERY == 0
        return self._gradient_miss(step, gradient) if due else float("nan")

    def _gradient_miss(self, step: Step, gradient: Mapping[str, Tensor]) -> float:
        """Where only some samples are asked for: the same of all of them, without influences."""
        rest = {name: value * step.updates[name].sign for name, value in gradient.items()}
        size = sum(float(value.square().sum()) for value in rest.values()) ** 0.5
        for batch, _, share in self._samples.batches(step):
            for name, value in self._products.gradient(step, batch, share, rest).items():
                rest[name] = rest[name] - value
        off = sum(float(value.square().sum()) for value in rest.values()) ** 0.5
        if off > torch.finfo(next(iter(rest.values())).dtype).eps ** 0.4 * size:
            self.wrong.append(step.number)
        return float(off / size if size else off)

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
        parts = (torch.where(chosen, places, count), count + 1) if self._samples.partition else None
        values = self._products.of(step, batch, directions, parts)
        found = values.unflatten(1, (self._acting, *target.shape[2:4])).movedim(1, 0).to(target)  # (A, G, x, o, N)
        if parts is not None:
            target += found[..., :count]
        else:
            target.index_add_(4, places[chosen], found if bool(chosen.all()) else found[..., chosen])
        return (values * share).sum((0, 2))

    def _miss(self, number: int, total: Tensor, expected: Tensor, floor: float) -> float:
        off, size = float((total - expected).norm()), float(expected.norm())
        if off > torch.finfo(expected.dtype).eps ** 0.4 * size + floor:
            self.wrong.append(number)
        return off / size if size else off


CHECK_EVERY = 50
"""Where only some samples are asked for, their sum tells nothing, and whole gradients are compared so often."""


def _own_share(places: Tensor) -> Tensor:
    """The places of the samples that this process does; −1 for all others."""
    own = (places >= 0).nonzero()[distributed.rank() :: distributed.processes(), 0]
    return torch.full_like(places, -1).index_copy(0, own, places[own])


def _rows(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen samples of a batch."""
    where = chosen.nonzero()[:, 0]
    assert batch.index is not None  # looked at before work started
    weight = batch.weight[where.to(batch.weight.device)] if isinstance(batch.weight, Tensor) else batch.weight
    data = tree_map(lambda tensor: tensor[where.to(tensor.device)], batch.data)
    return Batch(len(where), weight, batch.index[where.to(batch.index.device)], data, batch.random_state)
