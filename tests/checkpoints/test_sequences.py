"""Rows of text and tokens: what is wrong with them is told by its line, and sequences are made of all that is right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from explaind_track.checkpoints.sequences import Row, draw, make_sequences, parse_mixture, read_rows
from explaind_track.core.tokens import IGNORED

VOCABULARY = 50


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def rows_of(*tokens: list[int], source: str = "all") -> list[Row]:
    return [Row(number, tuple(one), source) for number, one in enumerate(tokens, 1)]


def test_rows_are_text_or_tokens_with_a_source(tmp_path: Path) -> None:
    path = written(tmp_path / "mix.jsonl", {"text": "ab", "source": "en"}, "", {"input_ids": [3, 4]})
    assert read_rows(path) == [Row(1, "ab", "en"), Row(3, (3, 4), "all")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[1, 2]", "is no object"),
        ({"txt": "ab"}, "neither text and input_ids"),
        ({"text": "ab", "input_ids": [1]}, "both text and input_ids"),
        ({"text": ""}, "not a string with something in it"),
        ({"text": 3}, "not a string with something in it"),
        ({"input_ids": [1, 2.0]}, "not a list of whole numbers"),
        ({"input_ids": [True]}, "not a list of whole numbers"),
        ({"input_ids": []}, "not a list of whole numbers"),
        ({"text": "ab", "source": 3}, "source is 3"),
        ({"text": "ab", "source": None}, "source is None"),
    ],
)
def test_a_wrong_line_is_told_by_its_number(tmp_path: Path, line: Any, reason: str) -> None:
    path = written(tmp_path / "mix.jsonl", {"text": "ab"}, line)
    with pytest.raises(ValueError, match=f"line 2: .*{reason}"):
        read_rows(path)


def test_many_wrong_lines_are_told_at_once_and_an_empty_file_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)line 1.*line 5.*and 4 more"):
        read_rows(written(tmp_path / "wrong.jsonl", *["{"] * 9))
    with pytest.raises(ValueError, match="has no rows"):
        read_rows(written(tmp_path / "empty.jsonl", "", "  "))


@given(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1), st.integers(2, 5))
def test_packed_sequences_are_the_tokens_in_their_order(tokens: list[list[int]], length: int) -> None:
    joined = [token for one in tokens for token in one]
    if len(joined) < length:
        with pytest.raises(ValueError, match="too few for one sequence"):
            make_sequences(rows_of(*tokens), length, VOCABULARY)
        return
    made = make_sequences(rows_of(*tokens), length, VOCABULARY)
    assert made.input_ids.flatten().tolist() == joined[: len(joined) // length * length]
    assert torch.equal(made.labels, made.input_ids)


def test_texts_end_with_the_end_token_and_sources_do_not_mix() -> None:
    rows = [Row(1, "abc", "en"), Row(2, "x", "de"), Row(3, "de", "en"), Row(4, "yz", "de")]
    made = make_sequences(rows, 5, VOCABULARY, encode=lambda text: [ord(letter) - 96 for letter in text], end=0)
    assert made.sources == ("en", "de")
    assert made.input_ids.tolist() == [[1, 2, 3, 0, 4], [24, 0, 25, 26, 0]]


def test_padding_is_not_predicted() -> None:
    made = make_sequences(rows_of([1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]), 4, VOCABULARY, end=0, layout="pad")
    assert made.input_ids.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]]
    assert made.labels.tolist() == [[1, 2, 3, IGNORED], [4, 5, IGNORED, IGNORED], [6, 7, 8, 9]]


def test_what_the_model_does_not_know_is_refused_by_its_line() -> None:
    with pytest.raises(ValueError, match=r"mix, line 2: token 50 is not one of the model's 50 .*another tokenizer"):
        make_sequences(rows_of([1, 2], [3, 50]), 2, VOCABULARY, name="mix")
    with pytest.raises(ValueError, match="mix, line 7: there is no tokenizer beside the checkpoint"):
        make_sequences([Row(7, "ab", "all")], 2, VOCABULARY, name="mix")


@given(st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 100), min_size=1), st.integers(1, 40))
def test_a_drawn_batch_has_the_mixtures_shares_and_nothing_twice(shares: dict[str, float], count: int) -> None:
    mixture = parse_mixture(",".join(f"{source}:{share!r}" for source, share in shares.items()))
    assert sum(mixture.values()) == pytest.approx(1)
    rows = [row for source in "abc" for row in rows_of(*([i, i] for i in range(VOCABULARY)), source=source)]
    drawn = draw(make_sequences(rows, 2, VOCABULARY), count, mixture, seed=3)
    assert len(drawn) == count
    assert all(abs(number - count * mixture[source]) < 1 for source, number in drawn.composition().items())
    assert (
        len({(source, tokens[0]) for source, tokens in zip(drawn.sources, drawn.input_ids.tolist(), strict=True)})
        == count
    )


def test_too_few_sequences_are_told_by_source() -> None:
    made = make_sequences(rows_of([1, 2], [3, 4], source="en"), 2, VOCABULARY)
    with pytest.raises(ValueError, match="mix has 0 sequences of 'de', and 1 are asked for; there are: en 2"):
        draw(made, 2, {"en": 0.5, "de": 0.5}, seed=0, name="mix")
    with pytest.raises(ValueError, match="mix has 2 sequences, and 3 are asked for"):
        draw(made, 3, None, seed=0, name="mix")


@pytest.mark.parametrize("text", ["", "en", "en:0", "en:-1", "en:x", "en:.5,en:.5", ":1", "en:nan", "en:inf"])
def test_a_mixture_is_shares_above_zero(text: str) -> None:
    with pytest.raises(ValueError, match=r"a mixture is written en:.4,de:.2"):
        parse_mixture(text)
