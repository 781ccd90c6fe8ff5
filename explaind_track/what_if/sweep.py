"""One sweep back over a run with some targets: the metagradient, step by step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind_track.core.step import Batch, Change, Part, State
from explaind_track.explanation.reverse_replay import Mismatch
from explaind_track.explanation.sample_axis import Array, SampleAxis
from explaind_track.explanation.step_source import Window
from explaind_track.what_if.adjoint import Adjoint, through_alterations
from explaind_track.what_if.curvature import Curvature, loss_weights
from explaind_track.what_if.running_statistics import Settling
from explaind_track.what_if.snapshots import Snapshot
from explaind_track.what_if.step_gradients import alter


@dataclass(frozen=True)
class Standstill(Change):
    """The model at one point, at which features are gradients."""

    names: tuple[str, ...]

    @property
    def moved(self) -> Sequence[str]:
        return self.names

    @property
    def parts(self) -> Mapping[str, Part[Any]]:
        return {}


@dataclass(frozen=True)
class Cells:
    """Where a sweep's numbers go; each is added to."""

    effect: Array
    """(seen, query, output, sample)."""
    rate: Array
    """(step, settings, query, output)."""
    decay: Array
    """The same."""


class Sweep:
    """Goes back over a run once, with R targets in flight."""

    def __init__(self, adjoint: Adjoint, curvature: Curvature, samples: SampleAxis, window: Window) -> None:
        """adjoint: the targets' gradients where the run ended. window: the steps whose samples are told apart."""
        self.adjoint, self._curvature, self._samples = adjoint, curvature, samples
        self._window = window
        self.mismatch = Mismatch()

    def run(self, snapshots: Iterable[Snapshot], cells: Cells, advance: Callable[[], object]) -> None:
        """Takes the steps, the last one first; `cells` have the steps of the window."""
        first, last = self._window
        for snapshot in snapshots:
            number = snapshot.step.number
            directions, settings = self.adjoint.through_optimizer(snapshot)
            if first <= number < last:
                for place, found in settings.items():
                    for cell, value in zip((cells.rate, cells.decay), found, strict=True):
                        cell[number - first, place] += value.reshape(cell.shape[2:]).cpu().numpy()

            if directions:
                seen = number - first if cells.effect.shape[0] > 1 else 0
                self._through_gradient(snapshot, directions, cells.effect[seen] if first <= number < last else None)
            advance()

    def _through_gradient(self, snapshot: Snapshot, directions: dict[str, Tensor], effect: Array | None) -> None:
        """Goes back from λ_G to the samples' weights and to θ_s; effect: (query, output, sample), to be added to."""
        state = snapshot.step.before
        names, running = (
            [n for n in self.adjoint.parameters if (n in state.buffers) == held] for held in (False, True)
        )
        batches = list(self._samples.batches(snapshot.step))
        altered = batches[0][0].altered if batches else None
        changes = () if altered is None else altered.changes
        if changes:
            whole = self._whole_gradient(snapshot, state, [batch for batch, *_ in batches], list(directions))
            directions = through_alterations(changes, whole, directions)

        settling = Settling()
        total = {name: torch.zeros_like(snapshot.record.gradients[name]) for name in directions}
        for before, (batch, places, _) in reversed(list(enumerate(batches))):
            behind = {name: self.adjoint.parameters[name] for name in running}
            products, curved, gradient, settled = self._curvature.along(state, batch, directions, names, behind, before)
            self._add(curved, gradient, total)
            settling.add(settled)
            for name in running:
                self.adjoint.parameters[name] = behind[name] * settled[name][0]
            if effect is not None:
                cell, chosen = torch.from_numpy(effect), places >= 0
                weighted = (products * loss_weights(batch, products[0])).reshape(*cell.shape[:2], -1).to(cell)
                cell.index_add_(2, places[chosen], weighted[..., chosen])
        for loss in snapshot.record.auxiliary:
            curved, gradient = self._curvature.along_auxiliary(state, loss, directions, names)
            self._add(curved, gradient, total)
        _refuse_moving_buffers(snapshot, settling)

        # the samples have to make up the gradient that the optimizer saw
        for change in changes:
            alter(change, total)
        wanted = {name: snapshot.record.gradients[name] for name in total}
        off, size = _norm({name: total[name] - value for name, value in wanted.items()}), _norm(wanted)
        self.mismatch.note(snapshot.step.number, off, size, torch.finfo(next(iter(total.values())).dtype).eps)

    def _add(self, curved: Mapping[str, Tensor], gradient: Mapping[str, Tensor], total: dict[str, Tensor]) -> None:
        for name, value in curved.items():
            self.adjoint.parameters[name] = self.adjoint.parameters[name] + value
        for name, value in gradient.items():
            total[name] += value

    def _whole_gradient(
        self, snapshot: Snapshot, state: State, batches: Sequence[Batch], names: list[str]
    ) -> dict[str, Tensor]:
        """The step's gradient before the loop altered it."""
        total = {name: torch.zeros_like(state.parameters[name]) for name in names}
        for batch in batches:
            for name, value in self._curvature.gradient(state, batch, names).items():
                total[name] += value
        for loss in snapshot.record.auxiliary:
            for name, value in self._curvature.auxiliary_gradient(state, loss, names).items():
                total[name] += value
        return total


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum(float(value.square().sum()) for value in tensors.values()) ** 0.5)


def _refuse_moving_buffers(snapshot: Snapshot, settling: Settling) -> None:
    wrong = settling.unexplained(snapshot.step.before.buffers, snapshot.record.buffers)
    if wrong:
        raise ValueError(
            f"step {snapshot.step.number} moved the buffers {', '.join(wrong[:5])} in another way than "
            "the running statistics of batch norm do, and through them the targets may depend on samples in ways that "
            "are not differentiated here; or the model is in another mode than it was trained in"
        )
