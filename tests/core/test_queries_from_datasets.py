"""Queries made of a dataset and its collator: the model's own loss, whatever is padded or ignored."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query

LENGTHS = (5, 3, 7, 2, 6)


class Rows:
    """Token ids of several lengths, by number, as a dataset has them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(1, 9, (length,), generator=generator) for length in LENGTHS]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row]}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    padded = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=-100)
    mask = padded != -100
    return {"input_ids": padded.clamp(min=0), "attention_mask": mask.long(), "labels": padded}


def test_it_is_the_loss_that_a_causal_model_has_of_the_batch() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).eval().double()
    for rows in (3, 64):
        query = Query.from_dataset(Rows(), collate, rows)
        own = model(**collate([Rows()[row] for row in range(min(rows, len(LENGTHS)))])).loss.detach()
        assert query.size == min(rows, len(LENGTHS))
        assert len(query) == 1
        assert query(model).detach().mean().item() == pytest.approx(own.item(), rel=1e-6)  # its loss is float32


def test_rows_of_one_class_each_have_their_mean_cross_entropy() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    model = nn.Linear(4, 3)

    def stack(rows: list[int]) -> dict[str, Any]:
        return {"input": x[rows], "label": y[rows]}

    query = Query.from_dataset(iter(range(6)), stack, 4)  # a stream
    assert query.is_loss
    assert query.reduction == "mean"
    assert torch.allclose(query(model)[:, 0], F.cross_entropy(model(x[:4]), y[:4], reduction="none"))


@pytest.mark.parametrize(
    ("dataset", "collator", "rows", "error", "message"),
    [
        ([], collate, 3, ValueError, "no rows"),
        (3, collate, 3, TypeError, "a dataset with rows"),
        (Rows(), collate, 0, ValueError, "rows= is at least 1"),
        (Rows(), None, 3, TypeError, "collator="),
        (Rows(), lambda rows: rows, 3, TypeError, "a mapping of the model's keyword arguments"),
        (Rows(), lambda rows: {"x": torch.ones(3)}, 3, ValueError, "no 'labels'"),
        (Rows(), lambda rows: {"x": torch.ones(3), "labels": torch.ones(3)}, 3, ValueError, "one class each"),
        (
            Rows(),
            lambda rows: {"x": torch.ones(3, 2), "labels": torch.full((3, 2), -100)},
            3,
            ValueError,
            "loss counts",
        ),
    ],
)
def test_what_makes_no_query_is_refused(
    dataset: Any, collator: Any, rows: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Query.from_dataset(dataset, collator, rows)
