"""Clipping by torch, Accelerate and Fabric is seen: the samples' weights are those of a loop that tells of it."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import make_job, sample_loss
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from explaind_track import Tracker, Trajectory
from explaind_track.core.step import Batch
from explaind_track.errors import SampleMismatchWarning

LIMIT = 0.01
Clip = Callable[[nn.Module, Tracker], Any]


def batches_of(clip: Clip, directory: Path, micro: int = 1, micro_clip: bool = False) -> tuple[Batch, ...]:
    """Those of the second of two steps whose gradients are clipped; warnings are errors."""
    job = make_job()
    with job.tracker(trajectory=directory) as tracker:
        for index in torch.arange(12).split(6):
            with tracker.step():
                job.optimizer.zero_grad()
                for part in index.chunk(micro):
                    batch = job.x[part], job.y[part]
                    tracker.batch(batch, index=part, weight=1 / 6)
                    (sample_loss(job.model, batch).sum() / 6).backward()
                    if micro_clip:
                        clip(job.model, tracker)
                if not micro_clip:
                    clip(job.model, tracker)
                job.optimizer.step()
    return tuple(Trajectory.open(directory).batches(1))


def with_torchs_parts(model: nn.Module, _: Tracker) -> None:
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    clip_grads_with_norm_(model.parameters(), LIMIT, norm)


def told_besides(model: nn.Module, tracker: Tracker) -> None:
    norm = float(clip_grad_norm_(model.parameters(), LIMIT))
    tracker.gradient_scaled(min(1.0, LIMIT / (norm + 1e-6)), LIMIT)


def accelerates(model: nn.Module, _: Tracker) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).clip_grad_norm_(model.parameters(), LIMIT)


def fabrics(model: nn.Module, tracker: Tracker) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    fabric.clip_gradients(model, tracker.optimizer, max_norm=LIMIT)


@pytest.mark.parametrize("clip", [
    lambda model, _: clip_grad_norm_(model.parameters(), LIMIT),
    lambda model, _: nn.utils.clip_grad_norm_(list(model.parameters()), max_norm=LIMIT, foreach=False),
    lambda model, _: clip_grad_norm_(chain(model.parameters(), [nn.Parameter(torch.ones(2))]), LIMIT),
    with_torchs_parts, told_besides, accelerates, fabrics,
])  # fmt: skip
def test_what_clips_to_a_norm_is_seen(clip: Clip, tmp_path: Path) -> None:
    expected = batches_of(lambda _, tracker: tracker.clip_grad_norm_(LIMIT), tmp_path / "told")
    assert float(torch.as_tensor(expected[0].weight).max()) < 1 / 6  # it acts
    (batch,), (told,) = batches_of(clip, tmp_path / "seen"), expected
    assert torch.equal(torch.as_tensor(batch.weight), torch.as_tensor(told.weight))
    assert batch.altered == told.altered


def test_another_norm_is_a_factor(tmp_path: Path) -> None:
    def clip(model: nn.Module, _: Tracker) -> Tensor:
        return clip_grad_norm_(model.parameters(), 0.001, norm_type=float("inf"))

    (batch,) = batches_of(clip, tmp_path / "t")
    assert batch.altered is not None
    assert [change.kind for change in batch.altered.changes] == ["factor"]
    assert batch.weight == pytest.approx(batch.altered.changes[0].amount / 6)


def test_micro_batches_take_on_the_factors_behind_them(tmp_path: Path) -> None:
    factors: list[float] = []

    def clip(model: nn.Module, _: Tracker) -> None:
        factors.append(min(1.0, LIMIT / (float(clip_grad_norm_(model.parameters(), LIMIT)) + 1e-6)))

    first, second = batches_of(clip, tmp_path / "t", micro=2, micro_clip=True)
    one, other = factors[-2:]
    assert first.weight == pytest.approx(one * other / 6, rel=1e-12)
    assert second.weight == pytest.approx(other / 6, rel=1e-12)


@pytest.mark.parametrize("clip", [
    lambda model, _: nn.utils.clip_grad_value_(model.parameters(), 1e-4),
    lambda model, _: clip_grad_norm_(next(model.parameters()), 1e-4),
])  # fmt: skip
def test_what_leaves_no_sum_over_samples_is_refused(clip: Clip, tmp_path: Path) -> None:
    assert all(batch.clipped for batch in batches_of(clip, tmp_path / "t"))


@pytest.mark.parametrize("clip", [
    lambda model, _: nn.utils.clip_grad_value_(model.parameters(), 1e4),
    lambda model, _: clip_grad_norm_(next(model.parameters()), 1e4),
    lambda model, _: clip_grad_norm_(model.parameters(), float("inf")),
    lambda *_: clip_grad_norm_([nn.Parameter(torch.ones(2))], 1e-4),
])  # fmt: skip
def test_what_does_nothing_is_nothing(clip: Clip, tmp_path: Path) -> None:
    (batch,) = batches_of(clip, tmp_path / "t")
    assert (batch.weight, batch.clipped, batch.altered) == (1 / 6, False, None)


def test_another_factor_of_the_loop_is_still_warned_of(tmp_path: Path) -> None:
    def halved(model: nn.Module, _: Tracker) -> None:
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad / 2

    with pytest.warns(SampleMismatchWarning):
        batches_of(halved, tmp_path / "t")


def test_outside_of_a_step_torch_is_torch() -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 3.0)
    assert float(nn.utils.clip_grad_norm_([parameter], 1.0)) == 6.0
    nn.utils.clip_grad_value_([parameter], 0.25)
    assert parameter.grad.tolist() == [0.25] * 4
