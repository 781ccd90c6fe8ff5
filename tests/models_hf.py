"""Tiny models of transformers with random weights, their data, and the losses of their samples in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 7, 6, 11
PADDING = -100


@dataclass(frozen=True)
class Family:
    """A model, and what it learns."""

    id: str
    make: Callable[[], nn.Module]
    adapted: tuple[str, ...]
    """Its modules that LoRA adapts."""
    shifted: bool = True
    """Whether it predicts the next token; else the masked ones."""
    single: bool = False
    """Whether some of its arithmetic is in float32, whatever its parameters are in."""

    def data(self) -> dict[str, Tensor]:
        """Sequences of several lengths, told from each other by their first token, with labels at some of theirs."""
        tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        tokens[:, 0] = 1 + torch.arange(ROWS)
        mask = (torch.arange(LENGTH) < 3 + torch.arange(ROWS)[:, None] % (LENGTH - 2)).long()
        labels = tokens.masked_fill(mask == 0, PADDING)
        if not self.shifted:
            labels = labels.masked_fill(torch.arange(LENGTH) % 2 == 0, PADDING)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "index": torch.arange(ROWS)}

    def losses(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """The sum of the tokens' losses for each sample, (N,)."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        log_p = logits.log_softmax(-1)
        picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        by_token = -(1 - smoothing) * picked - smoothing * log_p.mean(-1)
        return (by_token * (labels != PADDING)).sum(1)


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
    """A masked language model, which takes the mean over each micro-batch whatever the Trainer counts."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


FAMILIES = [
    Family("gpt2", gpt2, ("c_attn",)),
    Family("gpt2-dropout", lambda: gpt2(0.2), ("c_attn",)),
    Family("llama", llama, ("q_proj", "v_proj"), single=True),
    Family("bert", bert, ("query", "value"), shifted=False),
]
