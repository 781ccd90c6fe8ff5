"""The causal language model behind a checkpoint: the model itself, its tokenizer, and its loss. Needs transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.checkpoints.sequences import Sequences, draw, make_sequences, read_rows
from explaind_track.core.checks import require_package
from explaind_track.core.queries import Query
from explaind_track.core.tokens import IGNORED
from explaind_track.engine.batch_losses import SampleLoss
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
    def of(cls, folder: Path, named: str | None = None, device: str = "cpu") -> "LanguageModel":
        """The model of a checkpoint's folder, with weights at random; `Checkpoint.load` puts those of the file in.

        Args:
            folder: With `config.json` and the tokenizer's files, unless they are elsewhere.
            named: Another folder that has them, or their name at the hub.
            device: Where the model lies.

        Raises:
            CheckpointError: There is no such description.
        """
        require_package("transformers", "callbacks", "a language model")
        from transformers import AutoConfig, AutoModelForCausalLM

        place = named or str(folder)
        try:
            config = AutoConfig.from_pretrained(place)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(
                f"{place} does not describe a causal language model of transformers ({_first_line(error)}): name the "
                "folder, or the model at the hub, that has its config.json; other models are explained by "
                "explaind_track.explain_checkpoints"
            ) from None
        longest = getattr(config, "max_position_embeddings", None)
        return cls(model, int(config.vocab_size), longest, _tokenizer_of(place))

    def read(
        self,
        path: Path,
        count: int | None,
        mixture: Mapping[str, float] | None = None,
        length: int | None = None,
        layout: str = "pack",
        seed: int = 0,
    ) -> Sequences:
        """Sequences of a file of rows, so many of them (None: all), see `make_sequences` and `draw`.

        length: tokens in a sequence; None: as many as the model takes, at most `LONGEST`.

        Raises:
            ValueError: The model cannot take so many tokens, or the rows do not fit it, or are too few.
        """
        if length is None:
            length = min(self.longest or LONGEST, LONGEST)
        if self.longest is not None and length > self.longest:
            raise ValueError(f"the model takes at most {self.longest} tokens at once, not {length}")

        end = None if self.tokenizer is None else self.tokenizer.eos_token_id
        encode = None if self.tokenizer is None else self._encode
        rows, name = read_rows(path), str(path)
        sequences = make_sequences(rows, length, self.vocabulary, encode, end, layout, name)
        return sequences if count is None else draw(sequences, count, mixture, seed, name)

    @staticmethod
    def batch(sequences: Sequences) -> dict[str, Tensor]:
        """The sequences as `loss` and the model take them."""
        return {"input_ids": sequences.input_ids, "labels": sequences.labels}

    @staticmethod
    def loss(sequences: Sequences) -> SampleLoss:
        """The losses of sequences, whose mean over all of these is the mean over their tokens, as training has it."""
        tokens_each = sequences.predicted() / len(sequences)

        def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return token_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"]) / tokens_each

        return losses

    @staticmethod
    def query(sequences: Sequences) -> Query:
        """The mean loss over the tokens of all sequences."""
        tokens = sequences.predicted()

        def losses(output: Any, labels: Tensor) -> Tensor:
            return token_losses(output.logits, labels) / tokens

        return Query.function({"input_ids": sequences.input_ids}, losses, sequences.labels).sum()

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of each sequence's tokens, (N,), in float64: every token from those before it.

    logits: (N, T, V). labels: (N, T), with `IGNORED` where there is nothing to predict.
    """
    scores, wanted = logits[:, :-1].double().flatten(0, 1), labels[:, 1:]
    losses = F.cross_entropy(scores, wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(wanted).sum(1)


def _tokenizer_of(place: str) -> Any:
    """The tokenizer in a folder or at the hub; None where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError, KeyError):
        return None  # rows of tokens need none, and rows of text say that it is missing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        return None  # without its files, transformers makes an empty one
    tokenizer.model_max_length = 10**9  # texts are cut here, not there
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
