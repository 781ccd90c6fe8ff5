"""Panels of language models: text in tables, maps by layer and type, their sums, and tables of tokens."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn

from explaind_track import Query, TokenText, Tracker, resolve_groups
from explaind_track.cli.report import make_report
from explaind_track.cli.report_maps import maps_of
from explaind_track.core.architectures import cells_of
from explaind_track.record.history import numbers_in, read_rows
from explaind_track.record.layer_types import without_cells
from explaind_track.record.media import from_json
from explaind_track.tracking.maps import Maps
from explaind_track.wandb_io.media import for_wandb

VOCABULARY, LENGTH = 11, 6
TEXT = TokenText(lambda ids: "".join(f"<{number}>" for number in ids))


class Layer(nn.Module):
    """Named as the layers of a Llama are."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 4), "down_proj": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn["o_proj"](self.self_attn["q_proj"](x).cumsum(1).tanh())
        return x + self.mlp["down_proj"](self.mlp["up_proj"](x).tanh())


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.lm_head(self.norm(x))}


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def sample_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores = model(batch["input_ids"])["logits"][:, :-1].movedim(-1, 1)
    return F.cross_entropy(scores, batch["labels"][:, 1:], reduction="none").mean(1)


def queries() -> dict[str, Query]:
    own = TEXT._decode
    return {
        "en": Query.tokens(tokens(3, 1)).mean(),
        "de": Query.tokens(tokens(3, 2)).mean(),
        "text": Query.tokens(tokens(2, 3), tokenizer=own),
    }


def trained(directory: Path, steps: int = 5, **options: Any) -> tuple[Tracker, list[dict[str, Any]]]:
    torch.manual_seed(0)
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    defaults: dict[str, Any] = {"queries": queries(), "groups": "layer.type", "maps_every": 2, "samples_every": 4}
    tracker = Tracker(
        model, optimizer, sample_loss=sample_loss, trajectory=directory, render=TEXT, **{**defaults, **options}
    )
    for number in range(steps):
        batch = {"input_ids": tokens(4, 10 + number), "attention_mask": torch.ones(4, LENGTH, dtype=torch.long)}
        batch["attention_mask"][0, 4:] = 0
        batch["labels"] = batch["input_ids"]
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch(batch, index=torch.arange(4))
            sample_loss(model, batch).mean().backward()
            optimizer.step()
    tracker.finish()
    return tracker, read_rows(directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, list[dict[str, Any]]]:
    return trained(tmp_path_factory.mktemp("run") / "one")


def test_groups_by_layer_and_type_are_both_at_once() -> None:
    model = Language()
    groups = resolve_groups("layer.type", model)
    assert sorted(name for members in groups.values() for name in members) == sorted(dict(model.named_parameters()))
    cells = cells_of(groups)
    for spec, place in (("layer", 0), ("type", 1)):
        sums: dict[str, set[str]] = {}
        for group, members in groups.items():
            sums.setdefault(cells[group][place], set()).update(members)
        assert sums == {name: set(members) for name, members in resolve_groups(spec, model).items()}
    assert cells_of(["encoder.07.mlp.up", "head"])["encoder.07.mlp.up"].layer == "encoder.07"
    for others in (["a", "b"], ["blocks.0.norm", "blocks.0.linear"], ["embedding", "head"]):
        assert cells_of(others) == {}


def test_sums_take_the_place_of_cells(run: tuple[Tracker, list[dict[str, Any]]]) -> None:
    tracker, rows = run
    row = numbers_in(rows[3])
    shown = without_cells(row)
    cells = cells_of(tracker.groups)
    assert len(shown) < len(row)
    assert not any(key.endswith(tuple(f"/{group}" for group in cells if "." in group)) for key in shown)
    for section in ("loss/kernel", "de/kernel", "loss/reg", "D"):
        total = row[f"{section}/total"]
        for kind in ("type", "layer"):
            parts = {key: value for key, value in shown.items() if key.startswith(f"{section}/{kind}/")}
            assert math.isclose(sum(parts.values()), total, rel_tol=1e-5, abs_tol=1e-12)
        up = row[f"{section}/layer.0.mlp.up"] + row[f"{section}/layer.1.mlp.up"]
        assert math.isclose(shown[f"{section}/type/mlp.up"], up, rel_tol=1e-9, abs_tol=1e-15)
    others = [key for key in row if key.rpartition("/")[2] not in cells]
    assert {key: row[key] for key in others} == {key: shown[key] for key in others}

    # what a loop logs by its own names stays as it is
    own = {"train/step": 3, "grad/layer.0.mlp.up": 1.0, "grad/layer.1.mlp.up": 2.0, "note": "words"}
    assert without_cells(own) == own


def test_wandb_gets_sums_and_text(run: tuple[Tracker, list[dict[str, Any]]]) -> None:
    tracker, rows = run
    directory = tracker.recorded().directory
    cells = [group for group in tracker.groups if group.startswith("layer.")]
    for row in rows:
        shown = for_wandb(from_json(row, directory))
        assert not any(key.endswith(f"/{cell}") for key in shown for cell in cells)
    assert "loss/kernel/type/mlp.up" in shown or "maps/steps" in shown
    table = for_wandb(from_json(rows[4], directory))["samples/most_influential"]
    assert isinstance(table, wandb.Table)
    assert all("<" in text for text in table.get_column("text"))


def test_shares_are_of_sizes_that_add_up_to_the_change(run: tuple[Tracker, list[dict[str, Any]]]) -> None:
    for row in run[1][:5]:
        kernel, momentum, decay = (row[f"de/{part}/total"] for part in ("kernel", "momentum", "reg"))
        sizes = {"kernel": abs(kernel - momentum), "momentum": abs(momentum), "reg": abs(decay)}
        for part, size in sizes.items():
            assert math.isclose(row[f"de/share/{part}"], size / sum(sizes.values()), rel_tol=1e-6)


def test_tables_show_what_was_trained_on_and_what_the_model_makes_of_it(
    run: tuple[Tracker, list[dict[str, Any]]],
) -> None:
    table = run[1][4]["samples/most_influential"]
    assert {"text", "prediction"} <= set(table["columns"])
    assert "label" not in table["columns"]  # these are the text itself
    trained_on = tokens(4, 14)
    for line in table["data"]:
        cells = dict(zip(table["columns"], line, strict=True))
        length = 4 if cells["sample"] == 0 else LENGTH  # without padding
        assert cells["text"] == TEXT(trained_on[cells["sample"], :length])
        assert len(cells["prediction"].split(">")) - 1 == length


def test_tables_of_tokens_add_up_to_the_run(run: tuple[Tracker, list[dict[str, Any]]]) -> None:
    tracker, rows = run
    maps = [row for row in rows if "maps/steps" in row]
    assert [(row["train/step"], row["maps/steps"]) for row in maps] == [(1, 2), (3, 2), (5, 1)]
    data = tracker.influence("text", ("group", "token")).data
    wanted = -data["influence"].sel(part=["kernel", "regularization"]).sum(["part", "group"]).values
    tables = [row["maps/tokens/text"] for row in maps]
    assert tables[0]["columns"][:4] == ["token", "input", "loss", "all groups"]
    assert [line[0] for line in tables[0]["data"]] == [f"<{n}>" for n in tokens(2, 3)[:, 1:].flatten().tolist()]
    found = sum(np.array([line[3:] for line in table["data"]], dtype=float) for table in tables)
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-6)
    np.testing.assert_allclose(found[:, 1:].sum(1), found[:, 0], atol=1e-6)
    assert all((row["maps/layer_type"], row["maps/domains"]) for row in maps)


def test_the_report_has_maps_and_text(run: tuple[Tracker, list[dict[str, Any]]], tmp_path: Path) -> None:
    rows = run[1]
    maps = maps_of(rows)
    assert maps is not None
    assert [loss["name"] for loss in maps["by_layer"]] == ["en", "de"]
    wanted = sum(row[f"loss/{part}/layer.1.mlp.up"] for row in rows[:5] for part in ("kernel", "reg"))
    grid = maps["by_layer"][0]["maps"][0]
    line = next(line for line in grid["lines"] if line["label"] == "layer.1")
    cell = line["cells"][grid["columns"].index("mlp.up")]
    assert cell["title"] == f"layer.1 · mlp.up: {wanted:+.3g} nats"
    assert maps["domains"]["columns"] == ["en", "de"]
    page = make_report(rows, {}, "one", directory=run[0].recorded().directory)
    for words in ("en, by layer and type", "Each loss, by group", "Which tokens", "&lt;3&gt;", "gradients of earlier"):
        assert words in page


def test_what_has_no_map_is_refused(tmp_path: Path) -> None:
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters())
    logits = Query.function(tokens(2, 1), lambda output: output["logits"][:, -1])
    for asked in ({"logits": logits}, {"loss": Query.tokens(tokens(2, 1)).mean()}):
        with pytest.raises(ValueError, match="there is none of these among the queries"):
            Tracker(model, optimizer, queries=asked, maps_every=2)
    with pytest.raises(ValueError, match="maps_every="):
        Tracker(model, optimizer, queries=queries(), maps_every=0)


def test_a_map_begins_behind_the_last(tmp_path: Path) -> None:
    asked = {"text": queries()["text"]}
    tracker, rows = trained(tmp_path / "one", steps=3, maps_every=1, samples_every=None, queries=asked, groups=None)
    assert [row.get("maps/steps") for row in rows] == [1, 1, 1]
    tables = [np.array([line[3] for line in row["maps/tokens/text"]["data"]]) for row in rows]
    losses = [np.array([line[2] for line in row["maps/tokens/text"]["data"]]) for row in rows]
    for (before, after), change in zip(pairwise(losses), tables[1:], strict=True):
        np.testing.assert_allclose(after - before, change, atol=0.1 * abs(change).max())
    maps = Maps(tracker._live, 3)
    assert [maps.add(number, {"loss/kernel/lm_head": -1.0}) for number in range(3)] == [False, False, True]
    assert maps.draw()["maps/steps"] == 3
    assert maps.steps == 0
    assert json.dumps(tables[0].tolist())
