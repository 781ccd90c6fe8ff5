"""The kernel view, and rankings of steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from cases import Case
from helpers import cases, check, full, lasting, of_samples
from jobs import make_job
from torch import Tensor, nn

from explaind_track import Quadrature, Trajectory, explain
from explaind_track.analysis import accuracy_curve, kernel_machine, sparse_prediction, step_scores
from explaind_track.analysis.step_ranking import extrapolate_first_moment, top_steps


def view(case: Case, loss: Any, outputs: Any = None, **options: Any) -> xr.Dataset:
    options = {"data": case.sample_options()["data"], "quadrature": Quadrature.fixed(1), "progress": False, **options}
    return kernel_machine(
        lasting(case), case.make(9), case.query(), loss=loss, groups=case.resolved_groups(),
        outputs=outputs or (lambda model, batch: model(batch[0])), **options,
    )  # fmt: skip


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none")


@cases("adamw-weighted", "sgd-nesterov-maximize", "normalized-adamw", "attention-adamw")
def test_kernels_times_loss_gradients_are_the_influences(case: Case) -> None:
    """Where a changes over the steps, step by step: the gradients are those of the samples' own outputs."""
    wanted = of_samples(case, ("seen", "group", "query", "output", "sample"))["influence"]
    found = view(case, cross_entropy, keep=("seen", "group", "query", "output"))
    assert float(found["mismatch"].max()) < 1e-8
    assert "prediction_change" not in found
    assert float(found["spread"].max()) > 1e-3

    for step in lasting(case):
        for batch in step.batches:
            assert batch.index is not None
            data = case.sample_options()["data"](batch.index)
            model = case.make()
            model.load_state_dict({**step.before.parameters, **step.before.buffers}, strict=False)
            outputs = model(data[0]).detach().requires_grad_()
            a = torch.autograd.grad(cross_entropy(outputs, data).sum(), outputs)[0]
            kernel = found["kernel"].sel(seen=step.number, sample=batch.index.tolist())
            own = torch.einsum("gxjkc,kc->gxjk", torch.from_numpy(kernel.values), a)
            if len(set(batch.index.tolist())) == len(batch.index):
                check(own, wanted.sel(seen=step.number, sample=batch.index.tolist()), float(abs(wanted).max()))


@cases("adamw", "sgd-nesterov-decay")
def test_with_log_probabilities_it_is_a_kernel_machine(case: Case) -> None:
    found = view(
        case,
        lambda outputs, batch: F.nll_loss(outputs, batch[1], reduction="none"),
        lambda model, batch: model(batch[0]).log_softmax(-1),
    )
    _, y = case.sample_options()["data"](torch.arange(7))
    check(found["loss_gradient"], -F.one_hot(y, 3))
    influence = of_samples(case, ("query", "output", "sample"))["influence"]
    check(found["prediction_change"], -influence.sum("sample"))


@cases("adamw", "normalized-nesterov-loss")
def test_steps_are_ranked_and_all_of_them_give_the_prediction(case: Case) -> None:
    oracle, influence = case.reference(1), full(case, 1)
    steps, model, query = lasting(case), case.make(9), case.query()

    loss = step_scores(steps, model, query, by="loss")
    size = step_scores(steps, model, by="size")
    check(size, oracle.moved.norm(dim=1))
    check(loss, (oracle.after - oracle.before).sum((1, 2)).abs())
    shares = step_scores(steps, model, query, by="influence", progress=False)
    kernel, decay = (oracle.influence(oracle.parts()[part]).sum(1).abs() for part in ("kernel", "regularization"))
    check(shares, (kernel + decay).sum((1, 2)))

    check(sparse_prediction(influence, range(len(steps))), influence.prediction())
    check(sparse_prediction(influence, []), influence.data["initial"])

    best = top_steps(loss, 0.4)
    assert len(best) == round(0.4 * len(steps))
    rest = np.setdiff1d(loss["step"].values, best)
    assert loss.sel(step=best).min() >= loss.sel(step=rest).max()

    two = sparse_prediction(influence, [0, 2])
    terms = oracle.influence(oracle.moved).sum(1)[[0, 2]].sum(0)
    buffers = (oracle.after - oracle.between)[[0, 2]].sum(0)
    check(two, oracle.before[0] - terms + buffers)


def test_the_accuracy_curve_ends_at_the_whole_decomposition(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 12)
    tracker.finish()
    trajectory, query = Trajectory.open(tmp_path / "t"), job.queries["query"]
    influence = explain(trajectory, job.model, query, keep=("step", "query", "output"), progress=False)
    scores = step_scores(trajectory, job.model, job.queries["loss"], window=(0, 12))
    curve = accuracy_curve(influence, scores, [0.0, 0.5, 1.0])
    assert float(curve["kl"].sel(fraction=1.0)) == pytest.approx(influence.faithfulness()["kl"], abs=1e-12)
    assert float(curve["agreement"].sel(fraction=1.0)) == 1.0
    assert float(curve["kl"].sel(fraction=0.0)) > float(curve["kl"].sel(fraction=1.0))
    with pytest.raises(ValueError, match=r"keep=\('step', 'query', 'output'\)"):
        sparse_prediction(tracker.influence("query"), [0])
    with pytest.raises(ValueError, match=r"keep=\('step', 'query', 'output'\)"):
        accuracy_curve(tracker.influence("query"), scores, [0.5])
    with pytest.raises(ValueError, match="pass one"):
        step_scores(trajectory, job.model)
    with pytest.raises(ValueError, match="by= is one of 'loss', 'size', 'influence', not 'losses'"):
        step_scores(trajectory, job.model, by="losses")  # type: ignore[arg-type]


def test_the_first_moment_is_extrapolated_exactly_where_nothing_changes() -> None:
    """A loss that is linear in the parameters, momentum SGD, and a linear model: what a sample does later is its own
    step's influence, decayed."""
    torch.manual_seed(0)
    case = Case("linear", model=lambda: nn.Linear(3, 3), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.6),
                sample_loss=lambda model, x, y: model(x).gather(1, y[:, None])[:, 0])  # fmt: skip
    data = of_samples(case, ("step", "seen", "query", "output", "sample"))["influence"]
    count = data.sizes["step"]
    for seen in range(count):
        explicit = data.sel(step=seen, seen=seen)
        check(extrapolate_first_moment(explicit, 0.6, count - seen), data.sel(seen=seen).sum("step"))
    with pytest.raises(ValueError, match=r"beta is below 1, not 1\.0"):
        extrapolate_first_moment(data, 1.0, 3)
