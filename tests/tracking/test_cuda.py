"""What needs a GPU: pieces by nccl, fused optimizers, parameters that lie on the host. `pytest -m cuda`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xarray as xr
from jobs import in_ranks
from sharded_jobs import CASES, STEPS, make_model, make_tracker, shard, train

from explaind_track import Influence, Quadrature

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

CASE = replace(CASES["accumulated"], dtype=torch.float32)
WAYS = ("foreach", "fused", "offload")


def optimizer_of(model: torch.nn.Module, way: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, fused=way == "fused")


def main(rank: int, out: Path) -> None:
    """As many processes as there are GPUs."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    torch.cuda.set_device(rank)
    meeting = f"file://{out}/meeting"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meeting, rank=rank, world_size=torch.cuda.device_count())
    for way in WAYS:
        model = make_model(CASE)
        offload: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if way == "offload" else {}
        shard(model, CASE, "cuda", **offload)
        if way == "offload":
            model.cpu()
        optimizer = optimizer_of(model, way)
        tracker = make_tracker(model, optimizer, CASE, trajectory=out / way, keyframe_every=2)
        train(model, tracker, optimizer, CASE, [rank], STEPS, "cuda")
        tracker.finish()
        if rank == 0:
            tracker.influence("near").save(out / f"{way}.safetensors")
    dist.destroy_process_group()


def test_pieces_on_gpus_are_one_process_on_a_cpu(tmp_path: Path) -> None:
    in_ranks(__file__, tmp_path, torch.cuda.device_count())
    model = make_model(CASE)
    optimizer = optimizer_of(model, "foreach")
    tracker = make_tracker(model, optimizer, CASE, quadrature=Quadrature.trapezoid())
    train(model, tracker, optimizer, CASE, list(range(torch.cuda.device_count())), STEPS)
    wanted = tracker.influence("near").data
    for way in WAYS:
        found = Influence.load(tmp_path / f"{way}.safetensors").data
        xr.testing.assert_allclose(found["influence"], wanted["influence"], rtol=1e-3, atol=1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
