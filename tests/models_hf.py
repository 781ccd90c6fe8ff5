"""Tiny models of transformers with random weights, their data, and their samples' losses written with plain torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 7, 6, 11
PADDING = -100


@dataclass(frozen=True)
class Family:
    """A model, and what it learns."""

    id: str
    make: Callable[[], nn.Module]
    adapted: list[str]
    """Its modules that LoRA adapts."""
    shifted: bool
    """Whether it predicts the next token; else the masked ones."""

    def data(self) -> dict[str, Tensor]:
        """Sequences of several lengths, each with a first token of its own, with labels at some of them."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
        tokens[:, 0] = 1 + torch.arange(ROWS)
        length = 3 + torch.arange(ROWS) % (LENGTH - 2)
        mask = (torch.arange(LENGTH) < length[:, None]).long()
        labels = tokens.masked_fill(mask == 0, PADDING)
        if not self.shifted:
            labels = labels.masked_fill(torch.arange(LENGTH) % 2 == 0, PADDING)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def losses(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum of the tokens' losses for each sample."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        log_p = logits.log_softmax(-1)
        picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        by_token = -(1 - smoothing) * picked - smoothing * log_p.mean(-1)
        return (by_token * (labels != PADDING)).sum(1)

    def items(self, labels: Tensor) -> int:
        return int(((labels[:, 1:] if self.shifted else labels) != PADDING).sum())


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Embedding and head are one parameter."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Two heads share keys and values; rotary positions, gated layers, RMS norms."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


FAMILIES = [
    Family("gpt2", gpt2, ["c_attn"], True),
    Family("gpt2 with dropout", lambda: gpt2(0.2), ["c_attn"], True),
    Family("llama", llama, ["q_proj", "v_proj"], True),
    Family("bert", bert, ["query", "value"], False),
]


def without_values(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("labels", "index")}


__all__ = ["FAMILIES", "F", "Family", "without_values"]
