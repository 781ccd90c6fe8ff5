"""The tokens of language models: which of them count, their losses, and their text."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from explaind_track.core.checks import shown

IGNORED = -100
"""The label of a token that no loss is counted for."""


HALF = "\ufffd"
"""What stands for a letter of which a token is only a part."""


class TokenText:
    """The text of token ids, by a tokenizer: of whole sequences, and of single tokens.

    As `Tracker(render=TokenText(tokenizer))`, tables of samples show the text that was trained on, and what the model
    takes for the next tokens.

    Example:
        >>> from explaind_track import TokenText
        >>> words = ["the", " cat", " sat"]
        >>> text = TokenText(lambda ids: "".join(words[number] for number in ids))
        >>> text([0, 1, 2]), text.of_each([0, 1, 2])
        ('the cat sat', ['the', ' cat', ' sat'])
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes note of the tokenizer.

        Args:
            tokenizer: One of the packages transformers or tokenizers, or any function from a list of ids to their text.

        Raises:
            TypeError: It is none of these.
        """
        decode = getattr(tokenizer, "decode", tokenizer)
        if not callable(decode):
            raise TypeError(f"a tokenizer is expected, with a method decode(ids), not {shown(tokenizer)}")
        self._decode: Callable[[list[int]], str] = decode

    def __call__(self, ids: Iterable[int] | Tensor) -> str:
        """The text of a sequence of ids; those below zero, which stand for padding and ignored labels, are left out."""
        return str(self._decode([number for number in _numbers(ids) if number >= 0]))

    def of_each(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The text of each token, as it stands in its sequence: with a space before it where a word begins.

        Args:
            ids: The ids of a sequence, none of them below zero.

        Example:
            >>> from explaind_track import TokenText
            >>> TokenText(lambda ids: " ".join(f"<{number}>" for number in ids)).of_each([7, 8])
            ['<7>', ' <8>']
        """
        numbers, texts = _numbers(ids), list[str]()
        for place, number in enumerate(numbers):
            alone = str(self._decode([number]))
            if place == 0:
                texts.append(alone)
                continue

            # a tokenizer may leave out the space of a token that stands first, and a letter may be two tokens
            first = str(self._decode([numbers[place - 1]]))
            both = str(self._decode([numbers[place - 1], number]))
            known = next((one for one in (first, first.rstrip(HALF)) if both.startswith(one)), None)
            texts.append(alone if known is None else both[len(known) :])
        return texts


def _numbers(ids: Iterable[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]


def logits_of(output: Any) -> Any:
    """The scores in what a model returns: itself, or its `logits`, or the first of several."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if isinstance(output, tuple):
        return output[0] if output else output
    return getattr(output, "logits", output)


def token_losses(output: Any, labels: Tensor) -> Tensor:
    """The cross-entropy of each label, (X, L); 0 where it is `IGNORED`.

    Args:
        output: Of the model, with scores (X, at least L, V) in it.
        labels: (X, L); where they are of the next tokens, one less than the model has scores for.

    Raises:
        ValueError: There are other scores.
    """
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] - labels.shape[1] not in (0, 1):
        found = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"in a {type(output).__name__}"
        raise ValueError(
            f"losses of tokens need scores (inputs, tokens, vocabulary) for labels {tuple(labels.shape)}, and the "
            f"model's are {found}: write the losses by Query.loss(inputs, labels, function)"
        )
    scores = logits[:, : labels.shape[1]].movedim(-1, 1)
    return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")


def token_labels(inputs: Any, labels: Tensor | None, next_token: bool) -> tuple[Any, Tensor]:
    """What a model is called with, and the label of each of its scores, (X, L).

    Args:
        inputs: Ids (X, T), or a mapping with `input_ids`; what it says by the name `labels` goes to the labels.
        labels: (X, T); None: those in the inputs, or the ids themselves, without padding.
        next_token: Whether scores at a token are of the next one, so that the first label has none.

    Raises:
        ValueError: The labels are no ids (X, T), or all ignored, or there are none.
    """
    given: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    labels = given.get("labels") if labels is None else labels
    if labels is None and next_token and isinstance(ids, Tensor):
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)

    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        what = "none" if labels is None else shown(labels)
        raise ValueError(
            f"losses of tokens need labels, a tensor of token ids (inputs, tokens), and there are {what}: pass "
            "labels=, or inputs with 'input_ids' (and 'labels', where these are others)"
        )
    labels = labels[:, 1:] if next_token else labels
    if not bool((labels != IGNORED).any()):
        raise ValueError(f"all labels are {IGNORED}, so that no token's loss counts")

    if isinstance(inputs, Mapping):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    return inputs, labels.long()
