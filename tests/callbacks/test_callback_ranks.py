"""The callback of Lightning under its DistributedDataParallel, in two real processes: samples of all of them."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from jobs import in_ranks, sample_loss
from torch import nn

from explaind_track import Influence, Quadrature, Query, Trajectory, explain

RANKS, STEPS = 2, 3
X = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
QUERY = Query.outputs(X[:5])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def main(rank: int, out: Path) -> None:
    """Two micro-batches of two samples to a step in each process, clipped."""
    warnings.simplefilter("default")  # of our host's own
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import DDPStrategy

    from explaind_track.callbacks.lightning import TrackerCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: torch.Tensor) -> Any:
            return self.network(x)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return sample_loss(self, batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=RANKS)
    callback = TrackerCallback(
        queries={"test": QUERY}, groups=2, trajectory=out / "t", sample_loss=sample_loss, index=lambda batch: batch[2]
    )
    data = torch.utils.data.TensorDataset(X, Y, torch.arange(24))
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", devices=RANKS, strategy=DDPStrategy(), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        precision="64-true", accumulate_grad_batches=2, gradient_clip_val=0.05,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=2))
    if rank == 0:
        callback.tracker.influence("test").save(out / "live.safetensors")


def test_samples_of_all_processes_make_up_the_steps(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    in_ranks(__file__, tmp_path, RANKS)
    trajectory, live = Trajectory.open(tmp_path / "t"), Influence.load(tmp_path / "live.safetensors")
    assert len(trajectory) == STEPS
    batches = [batch for step in range(STEPS) for batch in trajectory.batches(step)]
    assert len(batches) == STEPS * RANKS * 2
    assert sorted(torch.cat([batch.index for batch in batches if batch.index is not None]).tolist()) == list(range(24))

    question: dict[str, Any] = {"groups": 2, "quadrature": Quadrature.fixed(1)}
    model = nn.ModuleDict({"network": network()})
    model.forward = lambda x: model["network"](x)  # type: ignore[method-assign]
    parts = tuple(live.data["part"].values.tolist())
    offline = explain(trajectory, model, QUERY, keep=("step", "group"), parts=parts, **question)
    assert np.allclose(offline.data["influence"], live.data["influence"], rtol=1e-9, atol=1e-12)
    samples = explain(  # which raises where they do not add up to a step's gradient
        trajectory, model, QUERY, keep=("group", "query", "sample"), sample_loss=sample_loss,
        data=lambda index: (X[index], Y[index]), **question,
    )  # fmt: skip
    kernel = offline.data["influence"].sel(part="kernel").sum(("step", "group"))
    assert float(samples.data["influence"].sum()) == pytest.approx(float(kernel), rel=1e-9)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
