"""Whether a checkpoint's tokenizer, and a batch, are the model's."""

import json
import math
from pathlib import Path

from torch import nn

TOKENIZER = "tokenizer.json"


def tokens_beyond(path: Path, model: nn.Module) -> list[str]:
    """A complaint if the folder's tokenizer knows tokens that the model has no embedding for; else none."""
    file = path / TOKENIZER
    rows, last = _embedded(model), _last_token(file) if file.is_file() else None
    if last is None or rows is None or last < rows:
        return []
    return [f"{TOKENIZER} gives tokens up to {last}, and the model embeds {rows}: it is another model's tokenizer"]


def no_better_than_chance(loss: float, model: nn.Module) -> list[str]:
    """A complaint if a batch is predicted worse than by guessing among all tokens; else none."""
    rows = _embedded(model)
    if rows is None or loss < math.log(rows):
        return []
    return [
        f"the batch's loss is {loss:.2f}, and guessing among {rows} tokens gives {math.log(rows):.2f}: is it made by "
        "this model's tokenizer, and the model trained?"
    ]


def _embedded(model: nn.Module) -> int | None:
    """How many tokens a model of transformers embeds; None for other models."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    return getattr(get_embedding(), "num_embeddings", None) if callable(get_embedding) else None


def _last_token(file: Path) -> int | None:
    """The greatest token of a tokenizer of the package tokenizers; None where the file does not tell."""
    try:
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        tokens = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        tokens += [added["id"] for added in content.get("added_tokens") or []]
        return max(int(token) for token in tokens)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
