"""Influences of single training samples against the oracle, which keeps a momentum buffer for each of them."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from cases import Case
from helpers import SAMPLE_AXES, cases, check, of_samples, wanted_samples
from jobs import OPTIMIZERS, Job, make_job, sample_loss
from models import Dropped
from reference import copies
from torch import Tensor, nn

from explaind_track import Batch, Influence, Quadrature, Query, Step, StepObserver, Tracker, Trajectory, explain
from explaind_track.core.rng import random_state
from explaind_track.engine import per_sample as products_module
from explaind_track.errors import ForwardModeFallbackWarning, SampleMismatchWarning


@cases()
def test_sample_sums_are_those_of_the_influence_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "FORWARD_DIRECTIONS", 10**6)
    data = of_samples(case, SAMPLE_AXES)
    expected = wanted_samples(case, data["sample"].values.tolist())[:, data["seen"].values.tolist()]
    check(data["influence"], expected)
    check(data["kernel"], expected.sum((1, -1)))
    assert float(data["mismatch"].max()) < 1e-8


@cases("adamw-weighted", "sgd-nesterov-maximize", "muon", "adamw-clipped", "relu-adamw", "scaled-adamw",
       "convolution-adamw",
       "tied-adamw", "frozen-adamw", "encoder-nesterov-loss", "attention-adamw", "target-mean-loss",
       "adamw-thawed", "late-activation")  # fmt: skip
def test_gradients_of_samples_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "FORWARD_DIRECTIONS", 0)
    data = of_samples(case, SAMPLE_AXES[2:])
    check(data["influence"], wanted_samples(case, data["sample"].values.tolist()).sum((0, 1)))
    assert float(data["mismatch"].max()) < 1e-8


@cases("sgd-nesterov-decay")
def test_every_choice_of_axes_is_a_sum_of_the_full_array(case: Case) -> None:
    whole = of_samples(case, SAMPLE_AXES)["influence"]
    for count in range(5):
        for keep in combinations(SAMPLE_AXES[:-1], count):
            found = of_samples(case, (*keep, "sample"), memory=3 * 8 * 31 * 4)["influence"]
            check(found, whole.sum([axis for axis in SAMPLE_AXES[:-1] if axis not in keep]), float(abs(whole).max()))


@cases("adamw-betas", "sgd-momentum-decay", "sgd-nesterov-decay")
def test_a_window_acts_through_all_that_was_seen_before_it(case: Case) -> None:
    data = of_samples(case, ("seen", "query", "output", "sample"), window=(2, 3))
    expected = wanted_samples(case, data["sample"].values.tolist())[2].sum(1)
    check(data["influence"], expected[data["seen"].values.tolist()])
    assert data["seen"].values.tolist() == [0, 1, 2]


@cases("adamw-weighted", "normalized-adamw", "attention-nesterov-loss", "encoder-nesterov-loss")
def test_parts_of_a_partition_are_sums_of_their_samples(case: Case) -> None:
    labels = ["b", "a", "a", "b", "c", "a", "b"]
    single = of_samples(case, ("group", "query", "output", "sample"))["influence"]
    for keep in (("group", "query", "output", "sample"), ("query", "sample"), ("sample",)):
        parts = of_samples(case, keep, partition=labels)["influence"]
        for label in "abc":
            members = [k for k in single["sample"].values.tolist() if labels[k] == label]
            expected = single.sel(sample=members).sum(["sample", *(a for a in SAMPLE_AXES[2:5] if a not in keep)])
            check(parts.sel(sample=label), expected, float(abs(single).max()))
    some = of_samples(case, ("query", "sample"), partition=labels, samples=[1, 4, 5])["influence"]
    wanted_ones = single.sum(["group", "output"])
    check(some.sel(sample="a"), wanted_ones.sel(sample=[1, 5]).sum("sample"), float(abs(single).max()))


@cases("adamw-weighted", "normalized-adamw")
def test_some_samples_are_pieces_of_all(case: Case) -> None:
    whole = of_samples(case, ("query", "sample"))["influence"]
    some = of_samples(case, ("query", "sample"), samples=[5, 1])["influence"]
    xr.testing.assert_allclose(some, whole.sel(sample=[5, 1]), rtol=1e-9)
    told = of_samples(case, ("query", "sample"), samples=[5, 1])["mismatch"].values
    assert np.isnan(told).any()
    assert np.nanmax(told) < 1e-12


@cases("sgd-full")
def test_a_loss_that_vmap_refuses_goes_forward_and_says_so(case: Case) -> None:
    with pytest.warns(ForwardModeFallbackWarning, match="one direction at a time"):
        found = of_samples(case, ("query", "output", "sample"))["influence"]
    check(found, wanted_samples(case, list(range(7))).sum((0, 1, 2)))


@pytest.mark.parametrize("rows", ["all", "sum"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_dropout_batch_norm_and_clipping_are_exact_as_they_ran(name: str, rows: str) -> None:
    """Against a momentum buffer for every sample, fed with the gradients of the very forward passes."""
    torch.manual_seed(3)
    model = Dropped().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 3, (9,))
    query = Query.outputs(torch.randn(2, 3, dtype=torch.float64))
    query = query.sum() if rows == "sum" else query
    observer, parameters = StepObserver(optimizer, dict(model.named_parameters())), dict(model.named_parameters())
    steps: list[Step] = []
    buffer = {name: torch.zeros(9, *value.shape, dtype=torch.float64) for name, value in parameters.items()}
    total = torch.zeros(len(query) * 3, 9, dtype=torch.float64)
    for number in range(5):
        index = torch.randperm(9)[: 4 + number % 2]
        state, before = random_state(x.device), copies(model.named_buffers())
        losses = F.cross_entropy(model(x[index]), y[index], reduction="none")
        optimizer.zero_grad()
        (losses / len(index)).sum().backward(retain_graph=True)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        factor = min(1.0, 0.3 / (float(norm) + 1e-6))
        own = {n: torch.zeros_like(values) for n, values in buffer.items()}
        for k, loss in zip(index.tolist(), losses, strict=True):
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for n, gradient in zip(parameters, found, strict=True):
                own[n][k] = gradient * factor / len(index)
        observer.before(before)
        optimizer.step()
        batch = Batch(len(index), factor / len(index), index, None, state)
        step = observer.lasting(observer.after(number, copies(model.named_buffers()), (batch,)))
        steps.append(step)
        model.eval()
        middle = {n: (step.before.parameters[n] + step.after.parameters[n]) / 2 for n in parameters}

        def outputs(moved: dict[str, Tensor], buffers: dict[str, Tensor] = before) -> Tensor:
            found = torch.func.functional_call(model, {**moved, **buffers}, (query.inputs,))
            return (found.sum(0) if rows == "sum" else found).flatten()

        phi = torch.func.jacrev(outputs)(middle)
        model.train()
        for n, update in step.updates.items():
            rule = update.rule
            buffer[n] = rule.beta * buffer[n] + rule.b * own[n]
            feature = update.precondition(
                torch.stack([rule.e * b + rule.d * o for b, o in zip(buffer[n], own[n], strict=True)])
            )
            total += phi[n].flatten(1) @ feature.flatten(1).T
        observer.settle()
    found = explain(
        steps, model, query, keep=("query", "output", "sample"), quadrature=Quadrature.fixed(1), progress=False,
        sample_loss=sample_loss, data=lambda index: (x[index], y[index]),
    ).data  # fmt: skip
    check(found["influence"].values.reshape(-1, 9), total)
    assert float(found["mismatch"].max()) < 1e-8


def recorded(job: Job, directory: Path, steps: int = 9, **options: Any) -> Trajectory:
    tracker = job.tracker(trajectory=directory, keyframe_every=4, **options)
    job.run(tracker, steps)
    tracker.finish()
    return Trajectory.open(directory)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trajectory_gives_what_its_steps_give(optimizer: str, tmp_path: Path) -> None:
    job = make_job(optimizer)
    trajectory = recorded(job, tmp_path / "t")
    options: dict[str, Any] = {
        "keep": ("seen", "group", "query", "sample"),
        "sample_loss": sample_loss,
        "data": lambda index: (job.x[index], job.y[index]),
        "quadrature": Quadrature.fixed(2),
        "progress": False,
    }

    query = job.queries["query"]
    steps = list(trajectory.steps(lasting=True))
    from_list = explain(steps, job.model, query, **options).data
    for memory in (2**28, 1):
        xr.testing.assert_allclose(
            explain(trajectory, job.model, query, memory=memory, **options).data.drop_vars("mismatch"),
            from_list.drop_vars("mismatch"),
            rtol=1e-10,
            atol=1e-13,
        )

    groups = explain(
        trajectory, job.model, query, keep=("group", "query"), quadrature=Quadrature.fixed(2), progress=False
    )
    check(from_list["influence"].sum(["seen", "sample"]), groups.data["influence"].sel(part="kernel").values)


def test_an_undeclared_factor_is_told_of(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", sample_loss=None)
    for _ in range(3):
        with tracker.step():
            job.optimizer.zero_grad()
            tracker.batch((job.x, job.y), index=torch.arange(24))
            sample_loss(job.model, (job.x, job.y)).mean().backward()
            for parameter in job.model.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad / 4
            job.optimizer.step()
    tracker.finish()
    for samples, count in ((None, 3), ([0, 4], 2)):
        with pytest.warns(SampleMismatchWarning, match=f"at {count} of 3 steps.*clipped"):
            explain(
                Trajectory.open(tmp_path / "t"), job.model, job.queries["loss"], keep=("sample",), progress=False,
                sample_loss=sample_loss, data=lambda index: (job.x[index], job.y[index]), samples=samples,
            )  # fmt: skip


def test_what_is_missing_is_said_before_work(tmp_path: Path) -> None:
    job = make_job()
    trajectory = recorded(job, tmp_path / "t")
    query = job.queries["query"]

    def data(index: Tensor) -> tuple[Tensor, Tensor]:
        return job.x[index], job.y[index]

    def ask(**options: Any) -> Influence:
        options = {"keep": ("sample",), "sample_loss": sample_loss, "data": data, "progress": False, **options}
        return explain(trajectory, job.model, query, **options)

    with pytest.raises(ValueError, match="sample_loss"):
        ask(sample_loss=None)
    with pytest.raises(ValueError, match="pass data="):
        ask(data=None)
    for window in ((3, 12), (3, 3), (-2, 3)):
        for axes in (("sample",), ("group",)):
            with pytest.raises(ValueError, match=r"window=\(.*the run has 9 steps, so that 0 ≤ first < last ≤ 9"):
                ask(window=window, keep=axes)
    with pytest.raises(ValueError, match=r"saw the samples \[77\]; those of 23 indices, 0 to 23, were seen"):
        ask(samples=[1, 77])
    with pytest.raises(ValueError, match=r"no label for the training sample 2, partition\[2\]"):
        ask(partition=[0, 1])
    with pytest.raises(ValueError, match=r"no group: 2\.weight, 2\.bias"):
        ask(groups={"a": "0.*"})
    other = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for axes in (("sample",), ("group",)):
        with pytest.raises(ValueError, match=r"0\.bias: recorded \[\[6\], 'float64'\], model \[\[7\], 'float64'\]"):
            explain(trajectory, other, query, keep=axes, sample_loss=sample_loss, data=data)
    with pytest.raises(ValueError, match="keep takes some of"):
        ask(keep=("sample", "layer"))
    with pytest.raises(ValueError, match=r"for [58] indices"):
        ask(data=lambda index: (job.x, job.y))
    with pytest.raises(ValueError, match="lasting"):
        explain(trajectory.steps(), job.model, query, keep=("sample",), sample_loss=sample_loss, data=data)
    with pytest.raises(ValueError, match="close"):
        ask(close=True)


def test_batches_without_names_are_refused(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    with tracker.step():
        tracker.batch((job.x, job.y))
        sample_loss(job.model, (job.x, job.y)).mean().backward()
        job.optimizer.step()
    tracker.finish()
    with pytest.raises(ValueError, match=r"step 0 has no index.*tracker\.batch"):
        explain(
            Trajectory.open(tmp_path / "t"), job.model, job.queries["loss"], keep=("sample",), sample_loss=sample_loss,
        )  # fmt: skip


def test_a_record_holds_what_dropout_and_clipping_need(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Dropped().double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 3, (9,))
    query = Query.outputs(torch.randn(2, 3, dtype=torch.float64))
    tracker = Tracker(model, optimizer, queries={"q": query}, groups=1, trajectory=tmp_path / "t", keyframe_every=3)
    for _ in range(7):
        index = torch.randperm(9)[:5]
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((x[index], y[index]), index=index)
            sample_loss(model, (x[index], y[index])).mean().backward()
            tracker.clip_grad_norm_(0.1)
            optimizer.step()
    tracker.finish()
    options: dict[str, Any] = {"quadrature": Quadrature.fixed(1), "progress": False}
    trajectory = Trajectory.open(tmp_path / "t")
    found = explain(
        trajectory, model, query, keep=("group", "query", "output", "sample"), sample_loss=sample_loss,
        data=lambda index: (x[index], y[index]), **options,
    ).data  # fmt: skip
    assert float(found["mismatch"].max()) < 1e-7
    groups = explain(trajectory, model, query, keep=("group", "query", "output"), **options).data["influence"]
    check(found["influence"].sum("sample"), groups.sel(part="kernel").values, tolerance=1e-7)
