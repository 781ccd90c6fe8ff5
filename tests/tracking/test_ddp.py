"""Live tracking under DistributedDataParallel, in two real processes, against one on the same global batches."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from jobs import Job, in_ranks, make_job, sample_loss
from models import Dropped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from explaind_track import Quadrature, Tracker, Trajectory, explain
from explaind_track.tracking.ddp import Ranks

RANKS, STEPS = 2, 4
LOOPS = ("plain", "per_sample", "accumulated", "accumulated_per_sample", "unnamed", "random")
"""Ordinary backward passes, gradients of single samples, both of them over micro-batches under `no_sync()`; batches
without an index; and dropout, batch norm and clipping."""


def job_of(loop: str) -> Job:
    job = make_job()
    if loop == "random":
        torch.manual_seed(0)
        job.model, job.x = Dropped().double(), job.x[:, :3]
        job.optimizer = torch.optim.AdamW(job.model.parameters(), lr=0.01, weight_decay=0.1)
        job.schedule = torch.optim.lr_scheduler.StepLR(job.optimizer, 2, 0.8)
    return job


def shards(loop: str, number: int) -> list[list[Tensor]]:
    """The micro-batches of each rank at one step: of uneven sizes, and uneven in number where they are accumulated."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(number))
    if "accumulated" in loop:
        return [[order[:4], order[4:9]], [order[9 : 11 + number % 2]]]
    return [[order[:8]], [order[8 : 13 - number % 3]]]


def weight_of(loop: str, rank: int, micro: Tensor, number: int) -> float:
    """Of a sample in its rank's loss."""
    return 1.0 / (len(micro) * len(shards(loop, number)[rank]))


def tracker_of(job: Job, model: nn.Module, directory: Path, loop: str, resume: bool | int = False) -> Tracker:
    return Tracker(
        model, job.optimizer, queries=job.queries, sample_loss=sample_loss, trajectory=directory, keyframe_every=3,
        samples_every=None if loop == "unnamed" else 1, resume=resume,
    )  # fmt: skip


def train_as_rank(rank: int, loop: str, out: Path) -> None:
    """What a user's loop does, in each process."""
    job = job_of(loop)
    wrapped = DistributedDataParallel(job.model)
    tracker = tracker_of(job, wrapped, out / loop, loop)
    torch.manual_seed(100 + rank)
    for number in range(STEPS):
        micros = shards(loop, number)[rank]
        if loop == "accumulated" and number == 2:  # as from a checkpoint of the loop's own
            tracker.finish()
            tracker = tracker_of(job, wrapped, out / loop, loop, resume=2)
            assert tracker.number == 2
        with tracker.step():
            job.optimizer.zero_grad()
            for place, micro in enumerate(micros):
                batch, weight = (job.x[micro], job.y[micro]), weight_of(loop, rank, micro, number)
                tracker.batch(batch, index=None if loop == "unnamed" else micro, weight=weight)
                with nullcontext() if place == len(micros) - 1 else wrapped.no_sync():
                    if loop.endswith("per_sample"):
                        tracker.backward()
                    else:
                        (sample_loss(wrapped, batch).sum() * weight).backward()
            if loop == "random":
                tracker.clip_grad_norm_(0.5)
            job.optimizer.step()
        job.schedule.step()
    tracker.finish()
    assert len(Trajectory.open(out / loop)) == STEPS  # complete for every rank
    if rank == 0:
        save(tracker, out / loop)
    else:
        with pytest.raises(RuntimeError, match="this is rank 1"):
            tracker.influence("query")


def save(tracker: Tracker, directory: Path) -> None:
    tracker.influence("query").save(directory / "live.safetensors")


def own_history(directory: Path) -> list[dict[str, float]]:
    from explaind_track.record.history import read_rows

    return read_rows(directory)


def main(rank: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    for loop in LOOPS:
        train_as_rank(rank, loop, out)
    refusals(rank, out)
    dist.destroy_process_group()


def refusals(rank: int, out: Path) -> None:
    job = make_job()
    wrapped = DistributedDataParallel(job.model)
    options: dict[str, Any] = {"queries": job.queries, "sample_loss": sample_loss}
    with pytest.raises(ValueError, match="random state of rank zero alone"):
        Tracker(wrapped, job.optimizer, resume=True, trajectory="nowhere", **options)
    with pytest.raises((FileExistsError, RuntimeError)[rank], match="is not empty"):
        Tracker(wrapped, job.optimizer, trajectory=out, **options)
    tracker = Tracker(wrapped, job.optimizer, **options)
    with wrapped.join(), pytest.raises(RuntimeError, match="as many batches"), tracker.step():
        pass
    groups = [dist.new_group([own]) for own in range(RANKS)]
    alone = DistributedDataParallel(job.model, process_group=groups[rank])
    with pytest.raises(ValueError, match="trained by 1 of the 2 processes"):
        Tracker(alone, job.optimizer, **options)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes have left."""
    directory = tmp_path_factory.mktemp("ranks")
    in_ranks(__file__, directory, RANKS)
    return directory


def in_one_process(loop: str, directory: Path) -> Tracker:
    """The same global batches, as micro-batches of one process."""
    job = job_of(loop)
    tracker = tracker_of(job, job.model, directory, loop)

    for number in range(STEPS):
        with tracker.step():
            job.optimizer.zero_grad()
            for rank, micros in enumerate(shards(loop, number)):
                for micro in micros:
                    batch, weight = (job.x[micro], job.y[micro]), weight_of(loop, rank, micro, number) / RANKS
                    tracker.batch(batch, index=None if loop == "unnamed" else micro, weight=weight)
                    if loop.endswith("per_sample"):
                        tracker.backward()
                    else:
                        (sample_loss(job.model, batch).sum() * weight).backward()
            job.optimizer.step()
        job.schedule.step()

    tracker.finish()
    save(tracker, directory)
    return tracker


@pytest.mark.parametrize("loop", LOOPS[:-1])
def test_ranks_together_are_one_process(out: Path, tmp_path: Path, loop: str) -> None:
    in_one_process(loop, tmp_path / loop)
    job = job_of(loop)
    options: dict[str, Any] = {"quadrature": Quadrature.fixed(2), "progress": False}
    if loop != "unnamed":
        options |= {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    rows = [own_history(directory / loop) for directory in (out, tmp_path)]
    for one, other in zip(*rows, strict=True):
        for name, value in other.items():
            if name.startswith(("cost/", "residual/")):
                continue
            if isinstance(value, dict):  # a table
                cells, others = (np.array(table["data"], dtype=float) for table in (one[name], value))
                np.testing.assert_allclose(cells, others, rtol=1e-9, atol=1e-12, err_msg=name)
            else:
                assert one[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        assert one.keys() == other.keys()
    both = [Trajectory.open(directory / loop) for directory in (out, tmp_path)]
    for one, other in zip(*(trajectory.steps(lasting=True) for trajectory in both), strict=True):
        assert [batch.size for batch in one.batches] == [batch.size for batch in other.batches]
        for name, value in other.after.parameters.items():
            torch.testing.assert_close(one.after.parameters[name], value, rtol=1e-9, atol=1e-12)
    keeps = [("step", "group"), ("step", "seen", "group", "query", "sample")][: 1 + (loop != "unnamed")]
    for keep in keeps:
        found = [explain(trajectory, job.model, job.queries["query"], keep=keep, **options).data for trajectory in both]
        xr.testing.assert_allclose(*(data["influence"] for data in found), rtol=1e-9, atol=1e-11)
        if "sample" in keep:
            assert float(found[0]["mismatch"].max()) < 1e-9


def test_chance_and_batch_statistics_are_those_of_each_rank(out: Path) -> None:
    """Dropout, batch norm and clipping: every rank's samples as they ran there add up to the gradient."""
    job = job_of("random")
    data = explain(
        Trajectory.open(out / "random"), job.model, job.queries["query"], keep=("seen", "query", "sample"),
        sample_loss=sample_loss, data=lambda index: (job.x[index], job.y[index]), progress=False,
    ).data  # fmt: skip
    assert float(data["mismatch"].max()) < 1e-9


def test_batches_without_an_index_are_in_the_record_themselves(out: Path) -> None:
    job = job_of("unnamed")
    for number in range(STEPS):
        batches = Trajectory.open(out / "unnamed").batches(number)
        for batch, (micro,) in zip(batches, shards("unnamed", number), strict=True):
            assert torch.equal(batch.data[0], job.x[micro])


def test_what_pieces_and_ranks_cannot_tell_is_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        job = make_job()
        fully_shard(job.model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"queries\['query'\] has 5 targets.* a scalar query is needed, because"):
            Tracker(job.model, torch.optim.AdamW(job.model.parameters()), queries=job.queries)
        job = make_job()
        wrapped = DistributedDataParallel(job.model)
        wrapped.module.append(nn.SyncBatchNorm(3).double())  # a wrapper made after it would ask for a GPU
        with pytest.raises(ValueError, match=r"'3' normalises.*sample_loss= out"):
            Tracker(wrapped, job.optimizer, queries=job.queries, sample_loss=sample_loss)
    finally:
        dist.destroy_process_group()


def test_a_model_alone_is_its_own_rank() -> None:
    model = make_job().model
    assert Ranks(model).model is model
    assert Ranks(model).gather(3) == [3]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
