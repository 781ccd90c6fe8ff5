"""The Tracker in a training loop: what it changes (nothing), what it tells, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import make_job, sample_loss
from torch import nn

from explaind_track import Quadrature, Query, Tracker
from explaind_track.errors import MissingStepWarning, NonFiniteError, SampleMismatchWarning


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]


def test_training_is_not_changed_by_being_watched() -> None:
    watched, alone = make_job(), make_job()
    tracker = watched.tracker()
    watched.run(tracker, 7)
    generator = torch.Generator().manual_seed(0)
    for number in range(7):
        index = torch.randperm(24, generator=generator)[: 5 if number % 3 == 2 else 8]
        alone.optimizer.zero_grad()
        sample_loss(alone.model, (alone.x[index], alone.y[index])).mean().backward()
        alone.optimizer.step()
        alone.schedule.step()
    for one, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weight", ["mean", "sum", 0.3, torch.linspace(-1, 1, 9, dtype=torch.float64)])
def test_per_sample_gradients_serve_as_the_step_gradient(weight: Any) -> None:
    job = make_job()
    tracker = job.tracker()
    batch = (job.x[:9], job.y[:9])
    losses = sample_loss(job.model, batch)
    expected = losses.mean() if weight == "mean" else losses.sum() if weight == "sum" else (losses * weight).sum()
    gradients = torch.autograd.grad(expected, list(job.model.parameters()))
    with tracker.step():
        tracker.batch(batch, weight=weight)
        loss = tracker.backward()
        job.optimizer.step()
    assert torch.allclose(loss, expected.detach(), rtol=1e-12)
    for parameter, gradient in zip(job.model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_per_sample_gradients_add_up_over_micro_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explaind_track.engine.per_sample.CHUNK_BYTES", 1000)  # two samples at a time
    job = make_job()
    tracker = job.tracker()
    expected = torch.autograd.grad(sample_loss(job.model, (job.x[:9], job.y[:9])).sum(), [*job.model.parameters()])
    with tracker.step():
        for part in (slice(0, 4), slice(4, 9)):
            tracker.batch((job.x[part], job.y[part]), weight="sum")
            tracker.backward()
        job.optimizer.step()
    for parameter, gradient in zip(job.model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "plain"])
def test_samples_and_momentum_add_up_to_the_kernel(optimizer: str, per_sample: bool, tmp_path: Path) -> None:
    job = make_job(optimizer)
    tracker = job.tracker(samples_every=1, trajectory=tmp_path / "t")
    job.run(tracker, 6, per_sample)
    for row in rows(tmp_path / "t"):
        assert row["loss/kernel/total"] == pytest.approx(
            row["samples/own_step"] + row["loss/momentum/total"], rel=1e-9, abs=1e-12
        )


def test_the_first_query_owns_the_plain_panels(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(groups={"first": "0.*", "last": "2.*"}, trajectory=tmp_path / "t")
    tracker.log({"note": 3.0})
    job.run(tracker, 4)

    found = rows(tmp_path / "t")
    influence = tracker.influence("query")
    assert [row["train/step"] for row in found] == [0, 1, 2, 3]

    for number, row in enumerate(found):
        importance = influence.importance().sel(step=number)
        assert row["kernel/first"] == pytest.approx(float(importance.sel(part="kernel", group="first")))
        assert row["reg/last"] == pytest.approx(float(importance.sel(part="regularization", group="last")))
        assert row["D/first"] == pytest.approx(
            float(influence.relative_regularization().sel(step=number, group="first"))
        )
        assert row["kernel/total"] <= row["kernel/first"] + row["kernel/last"]
        assert row["residual/query"] == pytest.approx(float(influence.residual.sel(step=number)))
        parts = sum(row[f"loss/{part}/total"] for part in ("kernel", "reg"))
        assert parts == pytest.approx(row["loss/change"], rel=0.05)

    assert found[0]["note"] == 3.0
    assert "note" not in found[1]
    assert found[-1]["query/accuracy"] in {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}
    logits = job.model(job.x[:5])
    assert found[-1]["query/loss"] == pytest.approx(float(F.cross_entropy(logits, job.y[:5]).detach()))


def test_live_influences_sum_to_the_prediction() -> None:
    job = make_job()
    before = job.model(job.x[:5]).detach()
    tracker = job.tracker(quadrature=Quadrature(tolerance=1e-9, max_nodes=16))
    job.run(tracker, 8)
    influence = tracker.influence("query", ("query", "output"))
    assert torch.allclose(torch.from_numpy(influence.data["initial"].values), before)
    after = job.model(job.x[:5]).detach()
    assert torch.allclose(torch.from_numpy(influence.prediction().values), after, atol=1e-9)
    assert influence.faithfulness() == {"agreement": 1.0, "kl": pytest.approx(0.0, abs=1e-12)}


def test_what_is_logged_behind_the_last_step_is_kept(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 2)
    tracker.log({"test/accuracy": 1.0})
    tracker.finish()
    assert rows(tmp_path / "t")[-1] == {"train/step": 2, "test/accuracy": 1.0}


def test_only_every_nth_step_is_explained(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(every=3, trajectory=tmp_path / "t")
    job.run(tracker, 7)
    assert tracker.influence("query").data["step"].values.tolist() == [0, 3, 6]
    assert ["kernel/total" in row for row in rows(tmp_path / "t")] == [True, False, False, True, False, False, True]


def test_per_sample_losses_that_miss_the_gradient_are_told_of() -> None:
    job = make_job()
    tracker = job.tracker()
    with pytest.warns(SampleMismatchWarning, match="do not add up"), tracker.step():
        tracker.batch((job.x[:8], job.y[:8]), weight="sum")
        sample_loss(job.model, (job.x[:8], job.y[:8])).mean().backward()
        job.optimizer.step()


def test_dropout_is_drawn_again_for_the_check() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(x)}, sample_loss=sample_loss)
    with tracker.step():
        tracker.batch((x, y))
        sample_loss(model, (x, y)).mean().backward()
        state = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_in_training_has_no_gradient_of_one_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(x)}, sample_loss=sample_loss)
    with tracker.step():
        tracker.batch((x, y))
        with pytest.raises(ValueError, match="'1' normalises with the statistics of its batch"):
            tracker.backward()


def test_what_buffers_did_is_a_part_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(8, 4, dtype=torch.float64)
    rule = Quadrature.fixed(8)
    tracker = Tracker(model, optimizer, queries={"q": Query.outputs(x[:3])}, quadrature=rule)
    for _ in range(4):
        with tracker.step():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    influence = tracker.influence("q", ("query", "output"))
    assert float(abs(influence.data["buffers"]).min()) > 0
    expected = model.eval()(x[:3]).detach()
    assert torch.allclose(torch.from_numpy(influence.prediction().values), expected, atol=1e-9)
    assert all(module.training is False for module in model.modules())


def test_nonfinite_gradients_stop_the_run_before_the_step() -> None:
    job = make_job()
    tracker = job.tracker()
    before = [p.detach().clone() for p in job.model.parameters()]
    with pytest.raises(NonFiniteError, match=r"gradient of step 0 is not finite in 0\.weight"), tracker.step():
        (sample_loss(job.model, (job.x, job.y)).mean() * float("nan")).backward()
        job.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


def test_nonfinite_steps_are_marked_and_never_logged_as_numbers(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(on_nonfinite="mark", trajectory=tmp_path / "t")
    job.run(tracker, 2)
    with tracker.step():
        job.optimizer.zero_grad()
        loss = sample_loss(job.model, (job.x, job.y)).mean() * float("inf")
        loss.backward()
        tracker.log({"train/loss": float(loss.detach())})
        job.optimizer.step()
    text = (tmp_path / "t" / "history.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert rows(tmp_path / "t")[2]["residual/nonfinite"] >= 1
    assert "kernel/total" not in rows(tmp_path / "t")[2]


def refused(action: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        action()


def test_bad_input_is_refused_before_any_work(tmp_path: Path) -> None:
    job = make_job()
    twice = {"all": "*", "last": "2.*"}
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(7, 2))], lr=0.1)
    decision = Query.function(job.x, lambda output: output.argmax(-1, keepdim=True))
    new = tmp_path / "t"

    for action, error, message in (
        (lambda: job.tracker(groups={"last": "2.*"}, trajectory=new), ValueError, r"no group: 0\.weight, 0\.bias"),
        (
            lambda: job.tracker(groups=twice, trajectory=new),
            ValueError,
            r"more than one group: 2\.weight \(all, last\)",
        ),
        (
            lambda: Tracker(job.model, stranger, queries=job.queries),
            ValueError,
            r"does not have, of shapes \[\(7, 2\)\]",
        ),
        (lambda: job.tracker(queries={"q": decision}, trajectory=new), ValueError, "only real numbers"),
        (lambda: job.tracker(queries={}), ValueError, "at least one query"),
        (lambda: job.tracker(samples_every=5, sample_loss=None), ValueError, "samples_every needs sample_loss"),
        (lambda: job.tracker(samples_every=5, queries={"q": Query.outputs(job.x)}), ValueError, "needs sample_loss"),
        (
            lambda: Tracker(job.model, torch.optim.LBFGS(job.model.parameters()), queries=job.queries),
            TypeError,
            "LBFGS",
        ),
    ):
        refused(action, error, message)
    assert not new.exists()


def test_batches_need_an_index_where_samples_are_asked_for() -> None:
    job = make_job()
    tracker = job.tracker(samples_every=5)
    with tracker.step():
        refused(lambda: tracker.batch((job.x, job.y)), ValueError, "needs its index=")
        refused(lambda: tracker.batch((job.x, job.y), index=torch.arange(3)), ValueError, "24 samples")
        refused(lambda: tracker.batch((job.x, job.y[:3]), index=torch.arange(3)), ValueError, r"found \[3, 24\]")
        refused(lambda: tracker.batch((job.x,), torch.arange(24), "median"), ValueError, "'median'")


def test_the_loop_is_told_of_its_mistakes() -> None:
    job = make_job()
    tracker = job.tracker()
    refused(job.optimizer.step, RuntimeError, "outside of `with tracker.step")
    refused(lambda: tracker.batch((job.x, job.y)), RuntimeError, "belongs inside")
    sample_loss(job.model, (job.x, job.y)).mean().backward()
    with tracker.step():
        refused(tracker.backward, ValueError, "tracker.batch")
        job.optimizer.step()
        refused(job.optimizer.step, RuntimeError, "two steps")
    with tracker.step():
        pass
    assert tracker.number == 1
    tracker.finish()
    job.optimizer.step()


def test_losses_that_are_not_one_per_sample_are_refused() -> None:
    job = make_job()
    tracker = job.tracker(sample_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    with pytest.raises(ValueError, match=r"unreduced losses of its 24 samples"), tracker.step():
        tracker.batch((job.x, job.y))
        sample_loss(job.model, (job.x, job.y)).mean().backward()
        job.optimizer.step()


def interrupted_while_explaining(tracker: Tracker, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("explaind_track.engine.integrator.Integrator.terms", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job.run(tracker, 1)


def test_a_step_that_was_interrupted_while_it_was_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a record it is explained from there; without, it is said to be missing, and sums are refused."""
    for trajectory in (tmp_path / "t", None):
        job = make_job()
        tracker = job.tracker(trajectory=trajectory)
        job.run(tracker, 2)
        interrupted_while_explaining(tracker, job, monkeypatch)
        assert tracker.number == 3
        job.run(tracker, 2)
        if trajectory is not None:
            assert tracker.influence("query").data["step"].values.tolist() == [0, 1, 2, 3, 4]
            assert tracker.influence("query", ("query", "output")).data.attrs["steps"] == 5
            continue

        with pytest.warns(MissingStepWarning, match="it is missing among the steps"):
            assert tracker.influence("query").data["step"].values.tolist() == [0, 1, 3, 4]
        with pytest.raises(RuntimeError, match="hold an unknown part of it"):
            tracker.influence("query", ("query", "output"))
