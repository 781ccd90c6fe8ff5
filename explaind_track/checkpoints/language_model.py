"""The causal language model behind a checkpoint: the model itself, its tokenizer, and its loss. Needs transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explaind_track.checkpoints.sequences import Row, Sequences, make_sequences
from explaind_track.core.checks import require_int, require_package
from explaind_track.errors import CheckpointError

LONGEST = 2048
"""Tokens in a sequence, where the caller names no length and the model takes as many."""


@dataclass(frozen=True)
class LanguageModel:
    """A model of transformers as its checkpoints' `config.json` describes it, in float32, and its tokenizer."""

    model: nn.Module
    vocabulary: int
    longest: int | None
    """Tokens that it can take at once; None where it does not say."""
    tokenizer: Any = None

    @classmethod
    def of(cls, folder: Path, tokenizer: str | None = None, device: str = "cpu") -> "LanguageModel":
        """The model of a checkpoint's folder, with weights at random; `Checkpoint.load` puts those of the file in.

        Args:
            folder: With `config.json`, and the tokenizer's files unless it is named.
            tokenizer: Another folder that has it, or its name at the hub.
            device: Where the model lies.

        Raises:
            CheckpointError: There is no such description, or the tokenizer that was named cannot be had.
        """
        require_package("transformers", "callbacks", "a language model")
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(
                f"{folder} does not describe a causal language model of transformers ({_first_line(error)}): put the "
                "config.json of the model there; other models are explained by explaind_track.explain_checkpoints"
            ) from None
        longest = getattr(config, "max_position_embeddings", None)
        return cls(model, int(config.vocab_size), longest, _tokenizer_of(folder, tokenizer))

    def sequences(self, rows: Sequence[Row], length: int | None, layout: str, name: str) -> Sequences:
        """Rows as sequences of this model's tokens, see `make_sequences`.

        length: tokens in a sequence; None: as many as the model takes, at most `LONGEST`.

        Raises:
            ValueError: The model cannot take so many tokens, or the rows do not fit it.
        """
        longest = self.longest or LONGEST
        length = min(longest, LONGEST) if length is None else require_int("length", length, 2)
        if self.longest is not None and length > self.longest:
            raise ValueError(f"the model takes at most {self.longest} tokens at once, not {length}")

        end = None if self.tokenizer is None else self.tokenizer.eos_token_id
        encode = None if self.tokenizer is None else self._encode
        return make_sequences(rows, length, self.vocabulary, encode, end, layout, name)

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens


def _tokenizer_of(folder: Path, name: str | None) -> Any:
    """The tokenizer that is named, or that lies in the folder; None where there is none."""
    from transformers import AutoTokenizer

    if name is None and not any(folder.glob("tokenizer*")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name or folder)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"there is no tokenizer in {name or folder} ({_first_line(error)})") from None
    tokenizer.model_max_length = 10**9  # texts are cut here, not there
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
