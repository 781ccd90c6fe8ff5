"""Models, data and queries that the page of figures is measured on (`performance.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query
from recipes.data import modulo_addition
from recipes.models import ModuloTransformer

WORDS, LENGTH = 2000, 128


@dataclass(frozen=True)
class Workload:
    """A training step, and what is asked of it."""

    name: str
    model: Callable[[], nn.Module]
    data: tuple[Any, Tensor]
    """Inputs and labels of the one batch that every step trains on."""
    losses: Callable[[nn.Module, Any], Tensor]
    """(model, batch) → (N,)."""
    queries: dict[str, Query]
    """By how the page calls them."""
    groups: Any

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = self.model()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def negative_likelihood(model: nn.Module, batch: Any) -> Tensor:
    return F.nll_loss(model(batch[0]), batch[1], reduction="none")


def sequence_losses(model: nn.Module, batch: Any) -> Tensor:
    """The mean loss of each sequence's tokens, (N,)."""
    scores = model(input_ids=batch[0]).logits[:, :-1]
    losses = F.cross_entropy(scores.flatten(0, 1), batch[1][:, 1:].flatten(), reduction="none")
    return losses.view(len(batch[1]), -1).mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 10),
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def images(count: int, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randint(10, (count,), generator=generator)


def classifier(name: str, model: Callable[[], nn.Module], shape: tuple[int, ...], groups: Any) -> Workload:
    """On 256 images, with 100 queries."""
    x, y = images(100, shape, 1)
    queries = {"mean loss of 100": Query.loss(x, y).mean(), "100 x 10 outputs": Query.outputs(x, y)}
    return Workload(name, model, images(256, shape, 0), cross_entropy, queries, groups)


def grokking() -> Workload:
    data = modulo_addition(113, 4000, 2000, 0)
    x, y = data.x_test[:200], data.y_test[:200]
    queries = {
        "mean loss of 200": Query.loss(
            x, y, lambda output, labels: F.nll_loss(output, labels, reduction="none")
        ).mean(),
        "200 x 115 outputs": Query.outputs(x, y),
    }
    name = "Transformer of the main job, batch of 4,000"
    return Workload(name, ModuloTransformer, (data.x_train, data.y_train), negative_likelihood, queries, 1)


def language_model() -> Workload:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(WORDS, (24, LENGTH), generator=generator)
    batch = tokens[:16]

    def query(rows: Tensor) -> Query:
        return Query.tokens({"input_ids": rows}).mean()

    queries = {
        "loss of half as many tokens": query(tokens[16:24]),
        "loss of a 16th of the tokens": query(tokens[16:17]),
    }
    return Workload("Llama of 2.6M, 16 sequences of 128", llama, (batch, batch), sequence_losses, queries, "type")


def workloads() -> list[Workload]:
    return [
        classifier("MLP of 119k, batch of 256", mlp, (196,), 1),
        classifier("CNN of 31k, batch of 256", cnn, (1, 14, 14), 1),
        grokking(),
        language_model(),
    ]
