"""Rows of text or tokens in JSON lines, as sequences of one length: read, packed or padded, drawn by a mixture.

A row is `{"text": "…"}` or `{"input_ids": [5, 8, …]}`, and may say the `"source"` it comes from, such as a language.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from explaind_track.core.checks import require_int, require_one_of, shown
from explaind_track.core.tokens import IGNORED

NO_SOURCE = "all"
"""The source of rows that say none."""

COMPLAINTS = 5
"""Wrong lines that are told of at once."""

LAYOUTS = ("pack", "pad")

Encode = Callable[[str], Sequence[int]]
"""A tokenizer: from a text to its tokens."""


@dataclass(frozen=True)
class Row:
    """A line of a file: its text, or its tokens."""

    line: int
    content: str | tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length.

    Example:
        >>> import torch
        >>> from explaind_track.checkpoints.sequences import Sequences
        >>> tokens = torch.tensor([[5, 8, 2], [7, 1, 1]])
        >>> Sequences(tokens, tokens, ("en", "de")).composition()
        {'en': 1, 'de': 1}
    """

    input_ids: Tensor
    """(N, T)"""
    labels: Tensor
    """(N, T): the same, and `IGNORED` where there is padding."""
    sources: tuple[str, ...]
    """Of each sequence."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def composition(self) -> dict[str, int]:
        """How many sequences there are of each source."""
        return dict(Counter(self.sources))

    def predicted(self) -> int:
        """How many tokens are predicted: all but the first of each sequence, and padding."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def take(self, index: Sequence[int]) -> "Sequences":
        """The sequences of these positions, in this order."""
        positions = torch.tensor(list(index), dtype=torch.long)
        return Sequences(self.input_ids[positions], self.labels[positions], tuple(self.sources[i] for i in index))


# ------------------------------------------------------------------ files


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """The rows of a file of JSON lines; empty lines are passed over.

    Raises:
        ValueError: Lines are no rows; the first of them are named by their numbers. Or the file has no rows.
    """
    rows, complaints = list[Row](), list[str]()
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_parse(number, line))
            except ValueError as error:
                complaints.append(f"line {number}: {error}")

    if complaints:
        listed = "\n  ".join(complaints[:COMPLAINTS])
        more = f"\n  and {len(complaints) - COMPLAINTS} more" if len(complaints) > COMPLAINTS else ""
        raise ValueError(
            f'{path} holds lines that are no rows. A row is {{"text": "…"}} or {{"input_ids": [5, 8, …]}}, with a '
            f'"source" if it has one:\n  {listed}{more}'
        )
    if not rows:
        raise ValueError(f'{path} has no rows; each line is {{"text": "…"}} or {{"input_ids": [5, 8, …]}}')
    return rows


def _parse(number: int, line: str) -> Row:
    """A row. Raises ValueError with what is wrong about it."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{shown(value)} is no object")
    given = [key for key in ("text", "input_ids") if key in value]
    if len(given) != 1:
        raise ValueError(f"has {'both' if given else 'neither'} text and input_ids (its keys: {', '.join(value)})")

    source = value.get("source", NO_SOURCE)
    if not isinstance(source, str) or not source:
        raise ValueError(f"source is {shown(source)}, not a name")
    content = value[given[0]]
    if given[0] == "text":
        if not isinstance(content, str) or not content:
            raise ValueError(f"text is {shown(content)}, not a string with something in it")
        return Row(number, content, source)

    if not isinstance(content, list) or not content or not all(type(token) is int for token in content):
        raise ValueError(f"input_ids is {shown(content)}, not a list of whole numbers")
    return Row(number, tuple(content), source)


# ------------------------------------------------------------------ sequences


def make_sequences(
    rows: Sequence[Row],
    length: int,
    vocabulary: int,
    encode: Encode | None = None,
    end: int | None = None,
    layout: str = "pack",
    name: str = "the rows",
) -> Sequences:
    """Token sequences of `length`.

    Args:
        rows: As `read_rows` gives them.
        length: Tokens in a sequence.
        vocabulary: How many tokens the model knows.
        encode: The tokenizer, where there are texts.
        end: The token behind each text; needed for texts to be packed, and for padding.
        layout: "pack": texts of a source one behind the other, cut into sequences; what is left at the end is dropped.
            "pad": a sequence for each row, cut at `length` or filled up.
        name: Of the file, for messages.

    Raises:
        ValueError: There are texts and no tokenizer, tokens that the model does not know, or too few for one sequence.
    """
    require_int("length", length, 2)
    require_one_of("layout", layout, LAYOUTS)
    tokens = [(row.source, _tokens_of(row, encode, end, vocabulary, name)) for row in rows]
    cut = list(_packed(tokens, length) if layout == "pack" else _padded(tokens, length))
    if not cut:
        total = sum(len(one) for _, one in tokens)
        raise ValueError(f"{name} has {total} tokens: too few for one sequence of {length}; ask for a shorter length")

    filler = end if end is not None else 0
    input_ids = torch.tensor([[*one, *[filler] * (length - len(one))] for _, one in cut])
    is_padding = torch.arange(length) >= torch.tensor([len(one) for _, one in cut])[:, None]
    labels = input_ids.masked_fill(is_padding, IGNORED)
    return Sequences(input_ids, labels, tuple(source for source, _ in cut))


def _tokens_of(row: Row, encode: Encode | None, end: int | None, vocabulary: int, name: str) -> Sequence[int]:
    """A row's tokens, and the end token behind a text. Raises ValueError for tokens that the model does not know."""
    if not isinstance(row.content, str):
        tokens: Sequence[int] = row.content
    elif encode is None:
        raise ValueError(
            f'{name}, line {row.line}: there is no tokenizer beside the checkpoint; give rows with "input_ids", or '
            "name the model that has one"
        )
    else:
        tokens = [*encode(row.content), *([] if end is None else [end])]

    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(
            f"{name}, line {row.line}: token {wrong[0]} is not one of the model's {vocabulary} (0 to "
            f"{vocabulary - 1}). Is it another tokenizer's?"
        )
    return tokens


def _packed(tokens: Sequence[tuple[str, Sequence[int]]], length: int) -> Iterator[tuple[str, list[int]]]:
    """All tokens of a source one behind the other, cut."""
    joined: dict[str, list[int]] = {}
    for source, one in tokens:
        joined.setdefault(source, []).extend(one)
    for source, stream in joined.items():
        for start in range(0, len(stream) - length + 1, length):
            yield source, stream[start : start + length]


def _padded(tokens: Sequence[tuple[str, Sequence[int]]], length: int) -> Iterator[tuple[str, list[int]]]:
    """A sequence for each row that has a token to predict."""
    for source, one in tokens:
        if len(one) > 1:
            yield source, list(one[:length])


# ------------------------------------------------------------------ mixtures


def parse_mixture(text: str) -> dict[str, float]:
    """The share of each source, from `en:.4,de:.2`; they add up to 1 then.

    Raises:
        ValueError: It is written otherwise, or a share is not above 0.

    Example:
        >>> from explaind_track.checkpoints.sequences import parse_mixture
        >>> parse_mixture("en:3,de:1")
        {'en': 0.75, 'de': 0.25}
    """
    shares: dict[str, float] = {}
    for piece in text.split(","):
        source, _, number = piece.strip().rpartition(":")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not source or source in shares or not 0 < share < float("inf"):
            raise ValueError(
                f"a mixture is written en:.4,de:.2 (each source once, each share above 0), not {text!r}: see {piece!r}"
            )
        shares[source] = share
    whole = sum(shares.values())
    return {source: share / whole for source, share in shares.items()}


def draw(
    sequences: Sequences, count: int, mixture: Mapping[str, float] | None, seed: int, name: str = "the rows"
) -> Sequences:
    """So many of the sequences, each at most once, at random: evenly, or by the shares of a mixture.

    Args:
        sequences: What there is.
        count: How many.
        mixture: The share of each source; None: as the sequences come.
        seed: Of the choice.
        name: Of the file, for messages.

    Raises:
        ValueError: There are too few, in all or of a source.
    """
    require_int("batch", count, 1)
    there = sequences.composition()
    wanted = {None: count} if mixture is None else _counts(count, mixture)

    generator, taken = random.Random(seed), list[int]()
    for source, number in wanted.items():
        positions = [i for i, one in enumerate(sequences.sources) if source in (None, one)]
        if len(positions) < number:
            raise ValueError(
                f"{name} has {len(positions)} sequences{'' if source is None else f' of {source!r}'}, and {number} are "
                f"asked for; there are: {', '.join(f'{key} {value}' for key, value in there.items())}. Give more rows, "
                "or ask for fewer or shorter sequences"
            )
        taken += generator.sample(positions, number)
    generator.shuffle(taken)
    return sequences.take(taken)


def _counts(count: int, mixture: Mapping[str, float]) -> dict[str | None, int]:
    """Whole numbers that add up to `count` and come closest to the shares: the largest remainders are rounded up."""
    exact = {source: share * count for source, share in mixture.items()}
    counts: dict[str | None, int] = {source: int(value) for source, value in exact.items()}
    remainders = sorted(exact, key=lambda source: exact[source] % 1, reverse=True)
    for source in remainders[: count - sum(counts.values())]:
        counts[source] += 1
    return counts
