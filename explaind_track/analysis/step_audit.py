"""The audit of a run: one of its steps, recomputed the slow and plain way (`plain_step`), beside what the engine says.

It runs on the user's own model, which no list of ours contains, and tells where the two differ and by how much.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from explaind_track.analysis import plain_step
from explaind_track.analysis.parameter_scores import parameter_scores
from explaind_track.core.checks import require_int
from explaind_track.core.groups import Groups, GroupSpec, resolve_groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Batch, Change, Step, ids_of
from explaind_track.core.tensors import tree_map
from explaind_track.engine.batch_losses import SampleLoss, upcast_batch
from explaind_track.engine.path_integral import Quadrature, gauss_legendre
from explaind_track.engine.targets import fitted_query
from explaind_track.explanation.explain import explain
from explaind_track.explanation.explainer import Explainer
from explaind_track.explanation.sample_axis import Data
from explaind_track.record.trajectory import Trajectory

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""By how much the two may differ, relative to the largest number of their kind. Float32's rounding is a few 1e-5 of a
sum whose terms do not cancel; the faults that an audit looks for are of a percent and more."""

NOISE = 100.0
"""So many times its rounding may be in an entry of a sample's gradient: where terms cancel (a bias in front of a batch
norm), it is that alone."""


@runtime_checkable
class Recorded(Protocol):
    """Whatever records a trajectory while it trains, as a Tracker does."""

    def recorded(self) -> Trajectory: ...


@dataclass(frozen=True)
class Finding:
    """One kind of number, computed twice."""

    what: str
    ours: float
    """The engine's, where the two differ most."""
    plain: float
    """The plain one there."""
    difference: float
    """|ours − plain|, relative to the largest number of this kind."""
    allowed: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Audit:
    """The findings of one step; `str()` is a table.

    Example:
        >>> from explaind_track.analysis import Audit
        >>> from explaind_track.analysis.step_audit import Finding
        >>> audit = Audit(7, (Finding("kernel through head", 0.5, 0.4, 0.25, 2e-3),), 1.2)
        >>> audit.ok, [finding.what for finding in audit.wrong]
        (False, ['kernel through head'])
        >>> print(audit)
        step 7, recomputed in 1.2 s: 1 of 1 are wrong
        WRONG kernel through head  ours +5.000000e-01  plain +4.000000e-01  differ by 2.5e-01 (allowed 2e-03)
    """

    step: int
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every number differs by no more than is allowed."""
        return all(finding.ok for finding in self.findings)

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that differ by more."""
        return tuple(finding for finding in self.findings if not finding.ok)

    def __str__(self) -> str:
        width = max(len(finding.what) for finding in self.findings)
        lines = [
            f"{'ok' if f.ok else 'WRONG':5} {f.what:{width}}  ours {f.ours:+.6e}  plain {f.plain:+.6e}  "
            f"differ by {f.difference:.1e} (allowed {f.allowed:.0e})"
            for f in self.findings
        ]
        verdict = "all as it should be" if self.ok else f"{len(self.wrong)} of {len(self.findings)} are wrong"
        return "\n".join([f"step {self.step}, recomputed in {self.seconds:.1f} s: {verdict}", *lines])


def audit_step(
    step: Step,
    model: nn.Module,
    query: Query,
    *,
    groups: GroupSpec = None,
    sample_loss: SampleLoss | None = None,
    data: Data | None = None,
    samples: int = 4,
    targets: int = 4,
    nodes: int = 8,
) -> Audit:
    """Recomputes a step that is at hand, in tensors of its own, and compares; arguments as in `audit`."""
    started = perf_counter()
    counts = (("samples=", samples, 0), ("targets=", targets, 1), ("nodes=", nodes, 1))
    samples, targets, nodes = (require_int(name, value, least) for name, value, least in counts)
    query, resolved = fitted_query(model, query), resolve_groups(groups, model)
    findings = [*_of_groups(step, model, query, resolved, targets, nodes)]
    findings += _of_parameters(step, model, query, nodes)
    if sample_loss is not None and step.batches:
        findings += _of_samples(step, model, query, sample_loss, data, samples, nodes)
    return Audit(step.number, tuple(findings), perf_counter() - started)


def _of_groups(
    step: Step, model: nn.Module, query: Query, groups: Groups, targets: int, nodes: int
) -> Iterator[Finding]:
    """The predictions at both ends, and Ψ of every part and group for some targets."""
    keep = ("group", "query", "output")
    explainer = Explainer(model, query, groups, [keep], quadrature=Quadrature.fixed(nodes))
    explainer.add(step)
    ours = explainer.results()[0].data
    target = _plain_target(query, step)

    for what, state in (("prediction before", step.start), ("prediction after", step.after)):
        plain = plain_step.predictions(model, state.parameters, state.buffers, target).cpu()
        name = "initial" if what.endswith("before") else "final"
        yield _finding(what, torch.from_numpy(ours[name].values), plain, step)

    shape = ours["initial"].shape
    cells = [divmod(place, shape[1]) for place in _spread(int(np.prod(shape)), targets)]
    names = [str(part) for part in ours["part"].values]
    if not names:
        return  # nothing was moved but the model's buffers

    def plain_sums(change: Change) -> Tensor:
        own = [change.parts[part] for part in names if part in change.parts]
        before, after, buffers = change.before.parameters, change.after.parameters, change.before.buffers
        return plain_step.group_sums(model, before, after, buffers, own, groups, target, cells, gauss_legendre(nodes))

    # the part from outside, which comes last, has a way of its own
    plain = plain_sums(step) if step.outside is None else torch.cat([plain_sums(step), plain_sums(step.outside)])
    found = torch.from_numpy(ours["influence"].transpose("part", "group", "query", "output").values).double()
    found = torch.stack([found[..., x, j] for x, j in cells], -1)

    largest = plain.abs().max()
    for part, name in enumerate(names):
        for group, label in enumerate(groups):
            yield _finding(f"{name} through {label}", found[part, group], plain[part, group], step, largest)


def _of_parameters(step: Step, model: nn.Module, query: Query, nodes: int) -> Iterator[Finding]:
    """φ_θ u_θ of every single parameter θ, on the sum of the targets."""
    phi = _plain_features(step, model, query, nodes)
    plain = {name: phi[name] * step.parts["kernel"][name].to(phi[name]) for name in step.updates}
    ours = parameter_scores([step], model, query, quadrature=Quadrature.fixed(nodes), progress=False)
    if plain:
        yield _finding("influence of parameters", _flat({name: ours[name] for name in plain}), _flat(plain), step)


def _plain_features(step: Step, model: nn.Module, query: Query, nodes: int) -> dict[str, Tensor]:
    """φ_s^test of the sum of the targets, by parameter, float64."""
    target = _plain_target(query, step)
    before, after, buffers = step.before.parameters, step.after.parameters, step.before.buffers
    return plain_step.target_gradient(model, before, after, buffers, target, gauss_legendre(nodes))


def _of_samples(
    step: Step, model: nn.Module, query: Query, loss: SampleLoss, data: Data | None, samples: int, nodes: int
) -> Iterator[Finding]:
    """The batches' gradient against the one that the optimizer saw; some samples' influences through this step."""
    batches = [_with_data(batch, step, data) for batch in step.batches]
    whole = {name: torch.zeros_like(update.gradient, dtype=torch.float64) for name, update in step.updates.items()}
    for batch in batches:
        weight = _weights(batch)
        slope, _ = plain_step.sample_gradient(
            model, step.before.parameters, step.before.buffers, loss, batch.data, weight, batch.random_state
        )
        for name, total in whole.items():
            if not step.updates[name].frozen:
                total += slope[name].to(total) * step.updates[name].sign

    seen = {name: update.kernel_gradient().double() for name, update in step.updates.items()}
    rounded = 0.0 if step.precision is None else torch.finfo(step.precision).eps ** 0.4  # by training, of its gradient
    yield _finding("gradient of the batches", _flat(seen), _flat(whole), step, rounded=rounded)

    named = all(batch.index is not None for batch in batches)
    if named and not any(batch.clipped for batch in batches):
        yield from _of_single_samples(step, model, query, loss, data, batches, samples, nodes)


def _of_single_samples(
    step: Step,
    model: nn.Module,
    query: Query,
    loss: SampleLoss,
    data: Data | None,
    batches: Sequence[Batch],
    samples: int,
    nodes: int,
) -> Iterator[Finding]:
    """`Σ_i w_k ⟨(b Q e + d) P φ, ∇L_k(θ_s)⟩` over the places i where the step has sample k."""
    phi = _plain_features(step, model, query, nodes)
    direction = {
        name: update.adjoint(phi[name].to(update.before)).double() * update.sign
        for name, update in step.updates.items()
        if not update.frozen
    }

    indices = torch.cat([batch.index for batch in batches if batch.index is not None])
    chosen = [int(indices[place]) for place in _spread(len(indices), samples)]
    chosen = list(dict.fromkeys(chosen))
    window = (step.number, step.number + 1)
    ours = explain(
        [step], model, query, keep=("seen", "sample"), window=window, sample_loss=loss, data=data, samples=chosen,
        quadrature=Quadrature.fixed(nodes), progress=False,
    ).data["influence"].sel(seen=step.number)  # fmt: skip

    # an optimizer that divides by the size of gradients may make much of those that are rounding alone
    eps = max(torch.finfo(update.before.dtype).eps for update in step.updates.values())
    reach = sum(float(d.norm()) for d in direction.values())
    plain, noise = torch.zeros(len(chosen), dtype=torch.float64), torch.zeros(len(chosen))
    for place, index in enumerate(chosen):
        for batch in batches:
            weight = _weights(batch) * (torch.as_tensor(batch.index) == index)
            if bool(weight.any()):
                slope, _ = plain_step.sample_gradient(
                    model, step.before.parameters, step.before.buffers, loss, batch.data, weight, batch.random_state
                )
                plain[place] += sum((slope[n] * d.to(slope[n])).sum().cpu() for n, d in direction.items())
                noise[place] += NOISE * eps * reach * max(float(slope[n].norm()) for n in direction)

    found, largest = torch.from_numpy(ours.values).double(), plain.abs().max()
    names = ids_of(batches)
    for place, index in enumerate(chosen):
        rounded = float(noise[place] / largest.clamp(min=1e-300))
        yield _finding(f"sample {names.get(index, index)}", found[place], plain[place], step, largest, rounded)


def _finding(
    what: str, ours: Tensor, plain: Tensor, step: Step, largest: Tensor | None = None, rounded: float = 0.0
) -> Finding:
    """largest: the number that the difference is relative to; None: the largest of `plain`. rounded: so much is allowed
    in any case."""
    ours, plain = ours.reshape(-1).double().cpu(), plain.reshape(-1).double().cpu()
    allowed = max(TOLERANCE.get(update.before.dtype, 2e-3) for update in step.updates.values()) if step.updates else 0.0
    allowed = max(allowed, rounded)

    size = max(float(plain.abs().max() if largest is None else largest), 1e-300)
    place = int((ours - plain).abs().argmax())
    difference = float((ours - plain).abs()[place]) / size
    return Finding(what, float(ours[place]), float(plain[place]), difference, allowed)


def _plain_target(query: Query, step: Step) -> plain_step.Target:
    """The query's targets (X, O) as a function of the model, without the engine's chunks."""
    some = next(iter(step.before.parameters.values()))
    everything = query.rows(0, query.size, some.device)

    def target(model: nn.Module) -> Tensor:
        values = everything(model)
        if query.reduction is None:
            return values
        total = values.sum(0, keepdim=True)
        return total if query.reduction == "sum" else total / query.size

    return target


def _with_data(batch: Batch, step: Step, data: Data | None) -> Batch:
    device = next(iter(step.before.parameters.values())).device
    if batch.data is None:
        if batch.index is None or data is None:
            raise ValueError(
                f"the record holds the indices of step {step.number}'s samples but not the samples; pass data=, a "
                "function from an index tensor (N,) to the batch of sample_loss"
            )
        batch = replace(batch, data=data(batch.index if batch.ids is None else list(batch.ids)))
    batch = replace(batch, data=tree_map(lambda tensor: tensor.to(device), batch.data))
    return batch if step.precision is None else upcast_batch(batch)


def _weights(batch: Batch) -> Tensor:
    """`w_k`, (N,), float64."""
    if isinstance(batch.weight, Tensor):
        return batch.weight.detach().cpu().double()
    return torch.full((batch.size,), float(batch.weight), dtype=torch.float64)


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().cpu() for value in tensors.values()])


def _spread(count: int, wanted: int) -> list[int]:
    """So many places, evenly spread over `count` of them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted))})


def audit(
    run: Trajectory | Recorded,
    model: nn.Module,
    query: Query,
    *,
    step: int | None = None,
    groups: GroupSpec = None,
    sample_loss: SampleLoss | None = None,
    data: Data | None = None,
    samples: int = 4,
    targets: int = 4,
    nodes: int = 8,
) -> Audit:
    """Recomputes one step of a run the slow and plain way, on the user's own model, and compares.

    Deep copies of the model, ordinary autograd, a backward pass for each number; nothing that the engine uses. What is
    compared: the predictions at both ends of the step; Ψ of every part and group (§4), integrated over the same nodes;
    the influence of every parameter; the gradient of the step's batches with the one that the optimizer saw; and the
    influences of some training samples through this step.

    Args:
        run: A `Trajectory`, or a Tracker that records one.
        model: The module that was trained, in the mode that it was trained in; it is copied, and not touched.
        query: The targets; some of them are recomputed.
        step: The step's number; None: the last one.
        groups: See `resolve_groups`.
        sample_loss: `(model, batch)` → unreduced losses (N,); None: single samples are not recomputed.
        data: From an index tensor (N,) to the batch that `sample_loss` takes, where the record holds indices alone.
        samples: The number of samples that are recomputed, spread over the step's batches.
        targets: The number of targets that are, each by a backward pass at each node.
        nodes: Gauss–Legendre nodes in the step.

    Returns:
        An `Audit`: its `ok`, its `findings`, and as a string the table of them.

    Raises:
        ValueError: For a step outside of the run, a model that is not the one trained, and samples that nobody has.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, audit
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(4, 3).double(), torch.randn(8, 4).double()
        >>> optimizer, directory = torch.optim.AdamW(model.parameters()), tempfile.TemporaryDirectory()
        >>> tracker = Tracker(model, optimizer, queries={"test": Query.outputs(x)}, trajectory=directory.name)
        >>> for _ in range(2):
        ...     with tracker.step():
        ...         model(x).square().mean().backward()
        ...         optimizer.step()
        >>> tracker.finish()
        >>> audit(tracker, model, Query.outputs(x), step=1).ok
        True
    """
    trajectory = run.recorded() if isinstance(run, Recorded) else run
    trajectory.check_model(model)
    number = len(trajectory) - 1 if step is None else require_int("step=", step)
    if not 0 <= number < len(trajectory):
        raise ValueError(f"step={step} is not within the run, which has the steps 0 to {len(trajectory) - 1}")

    chosen = next(trajectory.steps(number, number + 1, lasting=True))
    return audit_step(
        chosen, model, query, groups=groups, sample_loss=sample_loss, data=data, samples=samples, targets=targets,
        nodes=nodes,
    )  # fmt: skip
