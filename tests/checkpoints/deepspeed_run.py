"""Trains a tiny model by DeepSpeed itself, in two processes on the CPU, and keeps the folders that it writes.

`python tests/checkpoints/deepspeed_run.py` (with deepspeed installed) writes `deepspeed_files/` anew: a folder of each
stage, and beside it in `expected.safetensors` the float32 weights as DeepSpeed's own functions gather them; and, where
these gather gradients (not in stage 2), the weights after a step more and its gradient.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILES = Path(__file__).parent / "deepspeed_files"
RANKS = 2
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"zero_optimization": {"stage": 1}},
    "stage2": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": True}},
    "stage3": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


class Tiny(nn.Module):
    """Sizes that two processes cannot share evenly, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 7)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.first(self.embedding(tokens)).tanh()
        hidden = self.norm(hidden * self.scale.to(hidden))
        result: Tensor = self.second(hidden)
        return result


def decays(name: str) -> bool:
    return "norm" not in name and "bias" not in name


def _train(rank: int, stage: str, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({"DS_ACCELERATOR": "cpu", **{name: str(value) for name, value in names.items()}})
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = Tiny()
    groups = [
        {"params": [value for name, value in model.named_parameters() if decays(name)], "weight_decay": 0.1},
        {"params": [value for name, value in model.named_parameters() if not decays(name)], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_max_lr": 1e-2}},
        **STAGES[stage],
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)

    def step(gathers: bool = False) -> dict[str, Tensor]:
        tokens = torch.randint(0, 7, (4, 2))
        loss = nn.functional.cross_entropy(engine(tokens).flatten(0, 1).float(), tokens.flip(1).flatten())
        engine.backward(loss)
        named = list(engine.module.named_parameters())
        gradients = {f"gradient:{name}": safe_get_full_grad(value).float() for name, value in named} if gathers else {}
        engine.step()
        return gradients

    def gathered(kind: str) -> dict[str, Tensor]:
        return {f"{kind}:{name}": safe_get_full_fp32_param(value) for name, value in engine.module.named_parameters()}

    torch.manual_seed(rank)
    for _ in range(3):
        step()
    engine.save_checkpoint(FILES / stage)

    expected = {name: value.clone() for name, value in gathered("weight").items()}
    if stage != "stage2":
        expected |= {name: value.clone() for name, value in step(gathers=True).items()}
        expected |= {name: value.clone() for name, value in gathered("after").items()}
    if rank == 0:
        kept = {name: value.contiguous() for name, value in expected.items()}
        save_file(kept, FILES / stage / "expected.safetensors")


if __name__ == "__main__":
    for place, chosen in enumerate(sys.argv[1:] or STAGES):
        torch.multiprocessing.spawn(_train, (chosen, 29600 + place), nprocs=RANKS)
        for script in (FILES / chosen).glob("*.py"):
            script.unlink()
