"""Accelerate, the Trainer of transformers and Lightning with their own FSDP, in two real processes, against one.

Accelerate shards on accelerators alone: here it is let take the CPUs for some.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xarray as xr
from jobs import in_ranks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from explaind_track import Influence, Quadrature, Query, Tracker
from explaind_track.record.history import read_rows

RANKS, STEPS = 2, 4
X = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
ONE: dict[str, Any] = {"quadrature": Quadrature.trapezoid()}
"""What one process is told to do as several do."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def with_accelerate(out: Path, together: bool) -> Tracker:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap") if together else None
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=not together, gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    query = Query.loss(X[:5], Y[:5]).mean()
    tracker = Tracker(model, optimizer, queries={"test": query}, trajectory=out, **({} if together else ONE))
    for index in torch.arange(24).split(3 if together else 6)[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.accumulate(model), tracker.step():
            accelerator.backward(F.cross_entropy(model(X[index]), Y[index]))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    tracker.finish()
    return tracker


def with_transformers(out: Path, together: bool, **more: Any) -> Tracker:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

    from explaind_track.callbacks.transformers import TrackerCallback

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=41, n_positions=16, n_embd=12, n_layer=2, n_head=2, use_cache=False, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    rows = torch.randint(0, 41, (30, 10))
    data = [{"input_ids": row, "labels": row} for row in rows]

    sharded: dict[str, Any] = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}} if together else {}
    arguments = TrainingArguments(
        str(out / "checkpoints"), per_device_train_batch_size=3 if together else 6, max_steps=STEPS, report_to=[],
        disable_tqdm=True, max_grad_norm=0.5, use_cpu=not together, dataloader_pin_memory=False, save_steps=2,
        learning_rate=0.01, weight_decay=0.1, **sharded,
    )  # fmt: skip

    # the five lines
    query = Query.from_dataset(data[24:], default_data_collator, rows=5)
    callback = TrackerCallback(
        queries={"test": query}, trajectory=out / "t", keyframe_every=2, **more, **({} if together else ONE)
    )
    trainer = Trainer(model, arguments, train_dataset=data[:24], callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(out / "checkpoints" / "checkpoint-2") if more else None)
    return callback.tracker


def with_lightning(out: Path, together: bool) -> Tracker:
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
    from torch.distributed.fsdp import fully_shard

    from explaind_track.callbacks.lightning import TrackerCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def configure_model(self) -> None:
            if together:
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        def forward(self, x: torch.Tensor) -> Any:
            return self.network(x)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    callback = TrackerCallback(
        queries={"test": Query.loss(X[:5], Y[:5]).mean()}, trajectory=out / "t", **({} if together else ONE)
    )
    strategy: Any = ModelParallelStrategy(RANKS, 1) if together else SingleDeviceStrategy(torch.device("cpu"))
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", devices=RANKS if together else 1, strategy=strategy,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out, use_distributed_sampler=False, accumulate_grad_batches=2,
    )  # fmt: skip
    data = TensorDataset(X, Y)
    share = DistributedSampler(data, shuffle=False) if together else None  # Lightning's own shuffles here
    trainer.fit(Module(), DataLoader(data, batch_size=3 if together else 6, sampler=share))
    return callback.tracker


HOSTS = {"accelerate": with_accelerate, "transformers": with_transformers, "lightning": with_lightning}


def main(rank: int, out: Path) -> None:
    host = (out / "host").read_text()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_TORCH_DEVICE": "cpu"}
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    if host != "lightning":
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)

    tracker = HOSTS[host](out / "run", True)
    if rank == 0:
        tracker.influence("test").save(out / "together.safetensors")
    if host == "transformers":  # gone on with from the Trainer's own checkpoint, and the keyframe of that step
        tracker = with_transformers(out / "run", True, resume=True)
        assert tracker.number == STEPS
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_several_processes_are_one(host: str, tmp_path: Path) -> None:
    pytest.importorskip({"accelerate": "accelerate", "transformers": "transformers", "lightning": "lightning"}[host])
    (tmp_path / "host").write_text(host)
    in_ranks(__file__, tmp_path, RANKS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of our host's own
        alone = HOSTS[host](tmp_path / "alone", False)
    found, wanted = Influence.load(tmp_path / "together.safetensors").data, alone.influence("test").data
    exact = 1e-9 if host == "accelerate" else 1e-5  # the others compute in float32 somewhere
    for variable in ("influence", "change", "residual"):
        xr.testing.assert_allclose(found[variable], wanted[variable], rtol=exact, atol=exact / 100)

    directory = tmp_path / "run" / ("" if host == "accelerate" else "t")
    assert [row["train/step"] for row in read_rows(directory)] == wanted["step"].values.tolist()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
