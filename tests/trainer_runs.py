"""Runs of transformers' Trainer, tiny and on the spot, that leave the folders which people have."""

from pathlib import Path
from typing import Any

import torch
from models_hf import LENGTH, VOCABULARY
from torch import nn


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sequences in which the next token mostly follows from the last."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(1, VOCABULARY, (count, 1), generator=generator)
    tokens = (starts + torch.arange(LENGTH) * 3) % (VOCABULARY - 1) + 1
    noise = torch.rand(count, LENGTH, generator=generator) < 0.1
    tokens = torch.where(noise, torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator), tokens)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(model: nn.Module, directory: Path, **arguments: Any) -> Any:
    """Trains for 9 steps with a warmup and a cosine, a checkpoint every 3; returns the Trainer."""
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        str(directory), **{
            "max_steps": 9, "save_steps": 3, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True,
            "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2,
            "disable_tqdm": True, "logging_strategy": "no", **arguments,
        }
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows())
    trainer.train()
    return trainer
