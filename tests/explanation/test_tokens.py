"""Which tokens: the losses of single tokens add up to the loss that a language model reports, and so do influences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Explainer, Influence, Quadrature, Query, TokenText, Tracker, Trajectory, explain
from explaind_track.core.tokens import IGNORED

VOCABULARY = 13
TOLERANCE = 1e-10


class Model(nn.Module):
    """Scores of the next token, from all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.mixing = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, VOCABULARY, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden: Tensor = self.mixing(self.embedding(input_ids).cumsum(1)).tanh()
        return {"logits": self.head(hidden)}


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, Tensor]:
    """Three sequences: the first with a prompt that is not learned, the second with padding."""
    ids = tokens(3, 1)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :3] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_losses(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """The loss of each token that counts, one by one."""
    logits = model(given["input_ids"])["logits"]
    places = [(row, place) for row in range(3) for place in range(6) if given["labels"][row, place + 1] != IGNORED]
    return [-logits[row, place].log_softmax(0)[given["labels"][row, place + 1]] for row, place in places]


def query() -> Query:
    return Query.tokens(inputs(), tokenizer=lambda ids: "".join(f" w{number}" for number in ids))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def steps(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    record = tmp_path_factory.mktemp("runs") / "one"
    tracker = Tracker(model, optimizer, queries={}, trajectory=record)
    for number in range(3):
        with tracker.step():
            optimizer.zero_grad()
            batch = tokens(5, 10 + number)
            F.cross_entropy(model(batch)["logits"][:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
    tracker.finish()
    return Trajectory.open(record)


def explained(steps: Trajectory, model: nn.Module, asked: Query, *keep: str, **options: Any) -> Influence:
    return explain(steps, model, asked, keep=keep, progress=False, quadrature=Quadrature.fixed(2), **options)


def test_each_tokens_loss_is_that_of_plain_torch(model: nn.Module) -> None:
    found = query()(model)
    assert found.shape == (3, 6)
    wanted = torch.stack(plain_losses(model, inputs()))
    torch.testing.assert_close(found[query().counted], wanted, rtol=0, atol=1e-14)
    assert not found[~query().counted].any()
    assert query().loss_count == len(wanted) == 4 + 3 + 6
    torch.testing.assert_close(query().mean()(model).mean(), wanted.mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(query().sum()(model).sum(), wanted.sum(), rtol=0, atol=1e-13)


def test_tokens_add_up_to_the_scalar_loss(steps: Trajectory, model: nn.Module) -> None:
    """Also where the queries are explained one by one, and written to a directory."""
    every = explained(steps, model, query(), "step", "group", "token").data
    assert every["influence"].dims == ("part", "step", "group", "token")
    scalars = [
        (query().sum(), 1.0),
        (query().mean(), 13.0),
        (Query.loss(query().inputs, query().labels[0], own_loss).sum(), 1.0),
    ]
    for scalar, count in scalars:
        wanted = explained(steps, model, scalar, "step", "group").data
        for name in ("influence", "rounding", "change", "remainder"):
            off = abs(every[name].sum("token") / count - wanted[name]).max()
            assert float(off) <= TOLERANCE * float(abs(wanted["influence"]).max()), name

    # and each is the influence on that token's loss alone
    one = Query.function(query().inputs, lambda output: -output["logits"].log_softmax(-1)[:, 4, 1:2])
    alone = explained(steps, model, one, "group", "query").data["influence"]
    ids = inputs()["input_ids"].clone()
    ids[2, 5] = 1
    other = explained(steps, model, Query.tokens(ids), "group", "token").data
    place = [i for i, at in enumerate(zip(other["input"].values, other["place"].values, strict=True)) if at == (2, 4)]
    np.testing.assert_allclose(other["influence"].values[..., place[0]], alone.values[..., 2], atol=1e-14)


def own_loss(output: dict[str, Tensor], labels: Tensor) -> Tensor:
    scores = output["logits"][:, :-1]
    return torch.stack([F.cross_entropy(s, y, reduction="sum") for s, y in zip(scores, labels, strict=True)])


def test_the_axis_has_the_tokens_that_count_by_their_text(steps: Trajectory, model: nn.Module, tmp_path: Path) -> None:
    kept = explained(steps, model, query(), "step", "token")
    labels = inputs()["labels"][:, 1:]
    assert kept.data["token"].values.tolist() == [f" w{int(label)}" for label in labels[labels != IGNORED]]
    assert kept.kept == ("step", "token")
    assert bool(kept.data.notnull().all().to_array().all())
    assert set(zip(kept.data["input"].values, kept.data["place"].values, strict=True)) == {
        tuple(place) for place in (labels != IGNORED).nonzero().tolist()
    }

    # what the losses were at both ends, and between these nothing is left over
    before = kept.data["initial"].values
    moved = kept.data["change"].sum("step").values
    np.testing.assert_allclose(before + moved, kept.data["final"].values, atol=1e-12)

    # to a directory and back, in small pieces
    filed = explained(steps, model, query(), "step", "token", out=tmp_path / "out", memory=10_000)
    np.testing.assert_allclose(filed.data["influence"], kept.data["influence"], atol=1e-14)
    assert filed.data["token"].values.tolist() == kept.data["token"].values.tolist()
    with pytest.raises(FileExistsError, match="differs in query"):
        explained(steps, model, Query.tokens(inputs()), "step", "token", out=tmp_path / "out", memory=10_000)
    kept.save(tmp_path / "tokens.safetensors")
    assert Influence.load(tmp_path / "tokens.safetensors").data.equals(kept.data)


def test_what_has_no_tokens_is_refused(model: nn.Module) -> None:
    given = inputs()
    with pytest.raises(ValueError, match=r"is one of Query\.tokens"):
        Explainer(model, query().mean(), {"all": [name for name, _ in model.named_parameters()]}, [("token",)])
    with pytest.raises(ValueError, match="leave out 'query' and 'output'"):
        Explainer(model, query(), {"all": [name for name, _ in model.named_parameters()]}, [("query", "token")])
    with pytest.raises(ValueError, match="there are none"):
        Query.tokens(given["input_ids"], next_token=False)
    with pytest.raises(ValueError, match="all labels are -100"):
        Query.tokens(given["input_ids"], torch.full((3, 7), IGNORED))
    with pytest.raises(ValueError, match=r"scores \(inputs, tokens, vocabulary\)"):
        Query.tokens(given["input_ids"])(nn.Sequential(nn.Embedding(VOCABULARY, 1), nn.Flatten()))
    with pytest.raises(TypeError, match=r"a method decode\(ids\)"):
        TokenText(3)


def test_text_keeps_the_spaces_that_a_tokenizer_leaves_out_in_front() -> None:
    words = ["▁the", "▁cat", "s", "▁sat"]

    def decode(ids: list[int]) -> str:  # as SentencePiece does
        return "".join(words[number] for number in ids).replace("▁", " ").removeprefix(" ")

    assert TokenText(decode).of_each([0, 1, 2, 3]) == ["the", " cat", "s", " sat"]
    assert TokenText(decode)(torch.tensor([0, -1, 1, IGNORED])) == "the cat"
    pieces = ["caf", "\xc3", "\xa9"]  # a letter in two tokens

    def decode_bytes(ids: list[int]) -> str:
        return b"".join(pieces[number].encode("latin1") for number in ids).decode("utf-8", "replace")

    assert "".join(TokenText(decode_bytes).of_each([0, 1, 2])).endswith("é")
