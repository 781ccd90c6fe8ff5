"""The kernel view of training (Cor. F.1): predictions as sums over samples of O × O kernels times loss gradients.

    f_{θ_N}(x) = f_{θ_0}(x) − Σ_k Σ_i I_i(x, x_k) a_{i,k} − Σ_s φ_s^test(x) r_s,    a_{i,k} = ∂L(f_{θ_i}(x_k), y_k) / ∂f

where I_i is what step i's gradient of the sample's *outputs* does, then and later. If a_{i,k} = a_k at all steps, as
for log-probabilities and the negative log-likelihood, the model is the kernel machine Σ_k I(x, x_k) a_k with
I = Σ_i I_i.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from explaind_track.core.checks import require_int
from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.queries import Query, require_query
from explaind_track.core.step import Batch, Step
from explaind_track.engine.functional import Functional
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import Quadrature, require_quadrature
from explaind_track.engine.targets import fitted_query
from explaind_track.explanation.sample_axis import Array, Data, SampleAxis, batches_with_data, choose_indices, labels_of
from explaind_track.explanation.sample_plan import SamplePlan
from explaind_track.explanation.step_source import RepeatableSteps, StepSource, Window
from explaind_track.record.trajectory import Trajectory

Outputs = Callable[[nn.Module, Any], Tensor]
"""`outputs(model, batch)` → (N, O)."""

OutputLoss = Callable[[Tensor, Any], Tensor]
"""`loss(outputs, batch)` → unreduced losses (N,)."""


class LossGradients:
    """The samples' a_{i,k}, as the steps are gone back over: the last step's, and how far the others lie from it."""

    def __init__(self) -> None:
        self._last: dict[int, Tensor] = {}
        self._spread: dict[int, float] = {}

    def note(self, places: Tensor, gradients: Tensor) -> None:
        """One step's: the samples' places (N,), and a_{i,k} (N, O)."""
        for place, row in zip(places.tolist(), gradients, strict=True):
            last = self._last.setdefault(place, row)
            self._spread[place] = max(self._spread.get(place, 0.0), float((row - last).abs().max()))

    def last(self, samples: int, outputs: int) -> Array:
        """a_k of the last step that saw each sample, (samples, outputs); NaN where none did."""
        never = np.full(outputs, np.nan)
        return np.stack([self._last[k].cpu().numpy() if k in self._last else never for k in range(samples)])

    def spread(self, samples: int) -> Array:
        """The largest |a_{i,k} − a_k| of each sample, (samples,); NaN where no step saw it."""
        return np.array([self._spread.get(place, np.nan) for place in range(samples)])


@dataclass(frozen=True, kw_only=True)
class OutputAxis(SampleAxis):
    """The axis of samples and their outputs: each of a sample's O outputs takes a place, and is the sample's loss; the
    loss gradient a_{i,k} is what it counts in the step's gradient."""

    model: nn.Module
    output_loss: OutputLoss
    outputs: int
    gradients: LossGradients
    """Takes note of those that are met."""

    def batches(self, step: Step) -> Iterator[tuple[Batch, Tensor, Tensor | float]]:
        for batch, places, _ in super().batches(step):
            gradient = self._loss_gradient(step, batch)
            self.gradients.note(places, gradient)

            output_places = places[:, None] * self.outputs + torch.arange(self.outputs)
            expanded = torch.where(places[:, None] < 0, -1, output_places).flatten()
            weight = batch.weight
            if isinstance(weight, Tensor):
                weight = weight.repeat_interleave(self.outputs)
            yield replace(batch, size=len(expanded), weight=weight), expanded, gradient.flatten()

    def _loss_gradient(self, step: Step, batch: Batch) -> Tensor:
        """a_{i,k}, (N, O)."""
        found = _as_trained(self.model, step, batch, self.loss)
        leaf = found.reshape(-1, self.outputs).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.output_loss(leaf, batch.data).sum(), leaf)[0]


def kernel_machine(
    steps: Trajectory | Iterable[Step],
    model: nn.Module,
    query: Query,
    *,
    outputs: Outputs,
    loss: OutputLoss,
    data: Data | None = None,
    groups: GroupSpec = None,
    keep: Sequence[str] = ("query", "output"),
    window: Window | None = None,
    samples: Iterable[int | str] | None = None,
    quadrature: Quadrature | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> xr.Dataset:
    """Computes the kernels and the loss gradients of a run, or of a window of its steps (Cor. F.1).

    Costs one forward-mode derivative for each target and group.

    Args:
        steps: As in `explain`, but that a stream's steps have to last.
        model: The module that was trained.
        query: X inputs (or one reduction of them) with O outputs each, whose predictions are taken apart.
        outputs: `(model, batch)` → (N, O); with `loss`, the sample's loss in two pieces.
        loss: `(outputs, batch)` → unreduced losses (N,).
        data: From an index tensor (N,) to the batch that both take; not needed where the trajectory holds the batches
            themselves.
        groups: As in `explain`.
        keep: Some of "step", "seen", "group", "query", "output" (see `explain`).
        window: `(first, last)`, steps first ≤ s < last; None: all.
        samples: The training indices asked for; None: all.
        quadrature: As in `explain`.
        memory: Bytes one pass may take.
        progress: Show a bar.

    Returns:
        `kernel` I (kept axes, sample, train_output); `loss_gradient` a_k (sample, train_output), from the last step
        that saw the sample; `spread` (sample), the largest difference of a_{i,k} from it over the steps; `mismatch`
        (walked) as in `explain`. If the spread is 0, `prediction_change` (kept axes without seen), −Σ_k I(x, x_k) a_k,
        is all that the samples did.

    Raises:
        ValueError: As `explain` does, and for `outputs` that are not (N, O).

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory
        >>> from explaind_track.analysis import kernel_machine
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LogSoftmax(-1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(3):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x, y), index=torch.arange(8))
        ...             torch.nn.functional.nll_loss(model(x), y).backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     found = kernel_machine(
        ...         Trajectory.open(directory), model, Query.outputs(x[:4]), data=lambda index: (x[index], y[index]),
        ...         outputs=lambda model, batch: model(batch[0]), progress=False,
        ...         loss=lambda outputs, batch: torch.nn.functional.nll_loss(outputs, batch[1], reduction="none"),
        ...     )
        >>> dict(found["kernel"].sizes)
        {'query': 4, 'output': 2, 'sample': 8, 'train_output': 2}
        >>> float(found["spread"].max())  # log-probabilities: the same at every step
        0.0
        >>> found["prediction_change"].shape
        (4, 2)
    """
    require_query(query)
    require_quadrature(quadrature)
    memory = require_int("memory= (bytes)", memory, 1)
    source = StepSource.of(steps, model, window).repeatable()
    query = fitted_query(model, query)
    indices = choose_indices(source, data, samples)
    count = _output_count(source, model, outputs, data)

    gradients = LossGradients()
    axis = OutputAxis(
        loss=lambda module, batch: outputs(module, batch).reshape(-1),
        data=data,
        labels=range(len(indices) * count),
        place={index: place for place, index in enumerate(indices)},
        alone=False,
        model=model,
        output_loss=loss,
        outputs=count,
        gradients=gradients,
    )
    resolved = resolve_groups(groups, model)
    plan = SamplePlan(source, model, query, resolved, (*keep, "sample"), axis, quadrature, memory, progress)
    influence = plan.run().data
    return _labelled(
        influence, list(indices.values()), gradients.last(len(indices), count), gradients.spread(len(indices))
    )


def _output_count(source: RepeatableSteps, model: nn.Module, outputs: Outputs, data: Data | None) -> int:
    """O, found on the run's first batch. Raises ValueError for outputs that are not (N, O)."""
    step = next(step for step in source.forwards(source.start, source.last) if step.batches)
    batch = next(batches_with_data(step, data))
    shape = _as_trained(model, step, batch, outputs).shape
    if len(shape) != 2 or shape[0] != batch.size:
        raise ValueError(f"outputs must return (N, O) for the batch's {batch.size} samples, not {tuple(shape)}")
    return shape[1]


def _as_trained(model: nn.Module, step: Step, batch: Batch, outputs: Outputs) -> Tensor:
    """The outputs of the batch as they were in training: with its parameters, buffers and random numbers."""
    with torch.no_grad():
        found: Tensor = Functional(model).replay(
            step.before, batch.random_state, lambda module: outputs(module, batch.data)
        )
    return found


def _labelled(influence: xr.Dataset, names: Sequence[int | str], gradient: Array, spread: Array) -> xr.Dataset:
    """The kernels beside the loss gradients (sample, train_output) and their spread (sample)."""
    values = influence["influence"]
    axes = [axis for axis in values.dims if axis != "sample"]
    kernel = values.transpose(*axes, "sample").values
    variables: dict[str, Any] = {
        "kernel": ((*axes, "sample", "train_output"), kernel.reshape(*kernel.shape[:-1], len(names), -1)),
        "loss_gradient": (("sample", "train_output"), gradient),
        "spread": (("sample",), spread),
        "mismatch": influence["mismatch"],
    }
    labels = {str(axis): influence[axis].values for axis in axes if axis in influence.coords}
    result = xr.Dataset(variables, {**labels, "sample": labels_of(names)}, influence.attrs)

    # Σ_k I a_k is all that the samples did if a_k is the same at all steps
    scale = np.nanmax(np.abs(gradient), initial=0.0)
    if float(result["spread"].max()) <= 1e-6 * scale:
        change = -(result["kernel"] * result["loss_gradient"]).sum(["sample", "train_output"])
        result["prediction_change"] = change.sum("seen") if "seen" in change.dims else change
    return result
