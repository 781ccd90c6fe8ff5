"""The kernel view of training (Cor. F.1): predictions as sums over samples of O × O kernels times loss gradients.

    f_{θ_N}(x) = f_{θ_0}(x) − Σ_k Σ_i I_i(x, x_k) a_{i,k} − Σ_s φ_s^test(x) r_s,    a_{i,k} = ∂L(f_{θ_i}(x_k), y_k) / ∂f

where I_i is what step i's gradient of the sample's *outputs* does, then and later. If a_{i,k} = a_k at all steps, as
for log-probabilities and the negative log-likelihood, the model is the kernel machine Σ_k I(x, x_k) a_k with
I = Σ_i I_i.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.queries import Query
from explaind_track.core.rng import replayed_random_state
from explaind_track.core.step import Batch, State, Step
from explaind_track.engine.functional import Functional
from explaind_track.engine.integrator import MEMORY
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.targets import check_query
from explaind_track.explanation.sample_axis import Data, SampleAxis
from explaind_track.explanation.sample_plan import SamplePlan
from explaind_track.explanation.step_source import choose_samples, source_of
from explaind_track.record.trajectory import Trajectory

Outputs = Callable[[nn.Module, Any], Tensor]
"""`outputs(model, batch)` → (N, O)."""

OutputLoss = Callable[[Tensor, Any], Tensor]
"""`loss(outputs, batch)` → unreduced losses (N,)."""


@dataclass(frozen=True)
class OutputSamples(SampleAxis):
    """Every output of every sample takes a sample's place; the loss gradient a_{i,k} is what each counts."""

    model: nn.Module | None = None
    output_loss: OutputLoss | None = None
    outputs: int = 0
    first: dict[int, Tensor] = field(default_factory=dict)
    """a_k (O,) by place, as it was when it was first met."""
    spread: dict[int, float] = field(default_factory=dict)
    """By place: the largest |a_{i,k} − a_k|."""

    def batches(self, step: Step) -> Iterator[tuple[Batch, Tensor, Tensor | float]]:
        for batch, places, _ in super().batches(step):
            gradient = self._loss_gradient(step, batch)
            for place, row in zip(places.tolist(), gradient, strict=True):
                known = self.first.setdefault(place, row)
                self.spread[place] = max(self.spread.get(place, 0.0), float((row - known).abs().max()))
            own = places[:, None] * self.outputs + torch.arange(self.outputs)
            expanded = torch.where(places[:, None] < 0, -1, own).flatten()
            weight = batch.weight
            if isinstance(weight, Tensor):
                weight = weight.repeat_interleave(self.outputs)
            yield replace(batch, size=len(expanded), weight=weight), expanded, gradient.flatten()

    def _loss_gradient(self, step: Step, batch: Batch) -> Tensor:
        """a_{i,k}, (N, O)."""
        assert self.model is not None  # set where these are made
        assert self.output_loss is not None
        buffers = {name: value.clone() for name, value in step.before.buffers.items()}
        with replayed_random_state(batch.random_state), torch.no_grad():
            found: Tensor = Functional(self.model)(
                State(step.before.parameters, buffers), lambda model: self.loss(model, batch.data)
            )
        leaf = found.reshape(-1, self.outputs).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.output_loss(leaf, batch.data).sum(), leaf)[0]


def kernel_machine(
    steps: "Trajectory | Iterable[Step]",
    model: nn.Module,
    query: Query,
    *,
    outputs: Outputs,
    loss: OutputLoss,
    data: Data | None = None,
    groups: GroupSpec = None,
    keep: Sequence[str] = ("query", "output"),
    window: tuple[int, int] | None = None,
    samples: Iterable[int] | None = None,
    quadrature: Quadrature | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> xr.Dataset:
    """The kernels and the loss gradients of a run, or of a window of its steps.

    outputs, loss: the sample's loss in two pieces, `loss(outputs(model, batch), batch)` → (N,).
    keep:          some of "step", "seen", "group", "query", "output" (see `explain`).

    Returns `kernel` I (kept axes, sample, train_output); `loss_gradient` a_k (sample, train_output), from the last step
    that saw the sample; `spread` (sample), the largest difference of a_{i,k} from it over the steps. If that is 0,
    `prediction_change` (kept axes without seen), −Σ_k I(x, x_k) a_k, is all that the samples did. Costs one
    forward-mode derivative for each target and group. Raises ValueError as `explain` does.
    """
    source = source_of(steps, model, window)
    check_query(model, query)
    chosen = choose_samples(
        source, window[1] if window else len(source), lambda *_: torch.empty(0), data, samples, None
    )
    step, batch = _first(source, chosen)
    with torch.no_grad(), replayed_random_state(batch.random_state):
        buffers = {name: value.clone() for name, value in step.before.buffers.items()}
        shape = Functional(model)(State(step.before.parameters, buffers), lambda own: outputs(own, batch.data)).shape
    if len(shape) != 2 or shape[0] != batch.size:
        raise ValueError(f"outputs must return (N, O) for the batch's {batch.size} samples, not {tuple(shape)}")
    places = {index: place for place, index in enumerate(chosen.labels)}
    expanded = OutputSamples(
        lambda own, data: outputs(own, data).reshape(-1), data, range(len(places) * shape[1]), places, False, False,
        model, loss, shape[1],
    )  # fmt: skip
    resolved = resolve_groups(groups, dict(model.named_parameters()))
    axes = (*keep, "sample")
    plan = SamplePlan(source, model, query, resolved, axes, window, expanded, quadrature, memory, progress)
    return _together(plan.run().data, chosen.labels, expanded)


def _first(source: Any, samples: SampleAxis) -> tuple[Step, Batch]:
    for step in source.steps(0, len(source)):
        for batch, *_ in samples.batches(step):
            return step, batch
    raise ValueError("the run has no record of its batches")  # choose_samples has found some


def _together(data: xr.Dataset, labels: Sequence[Any], samples: OutputSamples) -> xr.Dataset:
    found = data["influence"]
    axes = [axis for axis in found.dims if axis != "sample"]
    values = found.transpose(*axes, "sample").values.reshape(*(found.sizes[a] for a in axes), len(labels), -1)
    gradient = np.stack([_row(samples.first, place, samples.outputs) for place in range(len(labels))])
    variables: Mapping[str, Any] = {
        "kernel": ((*axes, "sample", "train_output"), values),
        "loss_gradient": (("sample", "train_output"), gradient),
        "spread": (("sample",), np.array([samples.spread.get(place, np.nan) for place in range(len(labels))])),
        "mismatch": data["mismatch"],
    }
    coordinates = {str(axis): data[axis].values for axis in axes if axis in data.coords}
    result = xr.Dataset(variables, {**coordinates, "sample": np.array(labels)}, data.attrs)
    scale = np.nanmax(np.abs(gradient), initial=0.0)
    if float(result["spread"].max()) <= 1e-6 * scale:
        change = -(result["kernel"] * result["loss_gradient"]).sum(["sample", "train_output"])
        result["prediction_change"] = change.sum("seen") if "seen" in change.dims else change
    return result


def _row(rows: Mapping[int, Tensor], place: int, outputs: int) -> np.ndarray[Any, Any]:
    return rows[place].cpu().numpy() if place in rows else np.full(outputs, np.nan)
