"""Samples named by words, batches of any class, settings of NumPy: each gives the numbers that plain tensors give."""

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from inputs import columns, encoding, example, of_columns, of_encoding, of_example
from jobs import Job, make_job, sample_loss
from torch import Tensor, nn

from explaind_track import Query, Tracker, Trajectory, audit, explain, open_influence
from explaind_track.analysis import kernel_machine
from explaind_track.core.tensors import tree_map, tree_slice, tree_take

STEPS = 5
CLASSES = {f"id{number}": number % 3 for number in range(24)}


def words(index: Tensor) -> list[str]:
    return [f"id{number}" for number in index.tolist()]


def numbers(names: list[str]) -> Tensor:
    return torch.tensor([int(name.removeprefix("id")) for name in names])


def recorded(directory: Path, name: Callable[[Tensor], Any], **options: Any) -> tuple[Job, Tracker, Trajectory]:
    """A run whose samples are named by what `name` makes of their numbers."""
    job = make_job()
    tracker = job.tracker(trajectory=directory, keyframe_every=3, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        index = torch.randperm(24, generator=generator)[:6]
        batch = (job.x[index], job.y[index])
        with tracker.step():
            job.optimizer.zero_grad()
            tracker.batch(batch, index=name(index))
            tracker.backward()
            job.optimizer.step()
    tracker.finish()
    return job, tracker, Trajectory.open(directory)


def test_words_are_the_labels_of_samples(tmp_path: Path) -> None:
    job, _, by_words = recorded(tmp_path / "words", words)
    _, _, by_numbers = recorded(tmp_path / "numbers", lambda index: index)
    query = job.queries["query"]

    def of_words(names: list[str]) -> tuple[Tensor, Tensor]:
        return job.x[numbers(names)], job.y[numbers(names)]

    def of_numbers(index: Tensor) -> tuple[Tensor, Tensor]:
        return job.x[index], job.y[index]

    options = {"keep": ("query", "sample"), "sample_loss": sample_loss, "progress": False}
    named = explain(by_words, job.model, query, data=of_words, **options).data["influence"]
    plain = explain(by_numbers, job.model, query, data=of_numbers, **options).data["influence"]
    names = words(torch.tensor(plain["sample"].values.tolist()))
    assert set(named["sample"].values) == set(names)
    assert np.array_equal(named.sel(sample=names).values, plain.values)

    # a few of them, kinds of sequences, and parts of a partition
    few = [str(name) for name in named["sample"].values[[4, 1]]]
    for samples in (few, np.array(few), pd.Index(few)):
        some = explain(by_words, job.model, query, data=of_words, samples=samples, **options).data["influence"]
        assert list(some["sample"].values) == few
        assert np.allclose(some.values, named.sel(sample=few).values, rtol=1e-12)
    for partition in (CLASSES, pd.Series(CLASSES)):
        parts = explain(by_words, job.model, query, data=of_words, partition=partition, **options).data["influence"]
        wanted = [
            named.values[:, [CLASSES[name] == part for name in named["sample"].values]].sum(1) for part in range(3)
        ]
        assert np.allclose(parts.values, np.stack(wanted, 1), rtol=1e-9)
    with pytest.raises(ValueError, match=r"no step before 5 saw the samples \['id99'\]; .*'id0'"):
        explain(by_words, job.model, query, data=of_words, samples=["id99"], **options)
    with pytest.raises(ValueError, match=r"no label for the training sample id\d+, partition\['id"):
        explain(by_words, job.model, query, data=of_words, partition={"id1": 0}, **options)

    # on a disk, of kernels, in an audit
    out = tmp_path / "out"
    explain(by_words, job.model, query, data=of_words, out=out, **options)
    assert open_influence(out).data["influence"].equals(named)
    kernels = kernel_machine(
        by_words, job.model, query, data=of_words, outputs=lambda model, batch: model(batch[0]), progress=False,
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1], reduction="none"),
    )  # fmt: skip
    assert list(kernels["sample"].values) == list(named["sample"].values)
    assert audit(by_words, job.model, query, sample_loss=sample_loss, data=of_words).ok


def test_words_are_recorded_beside_their_numbers(tmp_path: Path) -> None:
    _, _, trajectory = recorded(tmp_path / "words", words)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        (batch,) = trajectory.batches(step)
        assert batch.ids == tuple(words(torch.randperm(24, generator=generator)[:6]))
        assert batch.index is not None
        assert batch.index.dtype is torch.int64


@pytest.mark.parametrize(
    "kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda index: pd.Index(index.numpy()), torch.Tensor.int]
)
def test_every_kind_of_index_gives_the_same_record(kind: Callable[[Tensor], Any], tmp_path: Path) -> None:
    _, _, other = recorded(tmp_path / "other", kind)
    _, _, plain = recorded(tmp_path / "plain", lambda index: index)
    assert other.fingerprint == plain.fingerprint


def test_tables_show_words(tmp_path: Path) -> None:
    shown: list[Any] = []

    def render(name: str) -> np.ndarray[Any, Any]:
        shown.append(name)
        return np.zeros((2, 2), dtype=np.uint8)

    recorded(tmp_path / "words", words, samples_every=2, render=render)
    rows = [json.loads(line) for line in (tmp_path / "words" / "history.jsonl").read_text().splitlines()]
    tables = [row["samples/most_influential"] for row in rows if "samples/most_influential" in row]
    assert len(tables) == 3
    for table in tables:
        place, norm = (table["columns"].index(column) for column in ("sample", "gradient norm"))
        assert all(row[place] in CLASSES and row[norm] > 0 for row in table["data"])
    assert set(shown) <= set(CLASSES)


def test_words_and_numbers_are_not_mixed() -> None:
    tracker = make_job().tracker()
    with tracker.step(), pytest.raises(TypeError, match=r"words and other things \(3\)"):
        tracker.batch((torch.zeros(2, 4), torch.zeros(2)), index=["a", 3])


KINDS = [(encoding, of_encoding), (columns, of_columns), (example, of_example)]


@pytest.mark.parametrize(("make", "loss"), KINDS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_batches_of_any_class_are_recorded(make: Any, loss: Any, per_sample: bool, tmp_path: Path) -> None:
    """Without an index, a batch is recorded itself, and its parts are had as the loss asks for them."""
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", sample_loss=loss)
    for _ in range(3):
        with tracker.step():
            job.optimizer.zero_grad()
            tracker.batch(make(job.x, job.y))
            if per_sample:
                tracker.backward()
            else:
                loss(job.model, make(job.x, job.y)).mean().backward()
            job.optimizer.step()
    tracker.finish()

    (batch,) = Trajectory.open(tmp_path / "t").batches(1)
    if make is not columns:  # which has a name of its own for them
        assert torch.allclose(loss(job.model, batch.data), loss(job.model, make(job.x, job.y)), rtol=1e-12)
    assert torch.equal(batch.data["x"], job.x)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"image": object()}, r"the batch\['image'\] is <object"),
        ({"when": np.array(["2026-01-01"] * 24, dtype="datetime64[D]")}, r"the batch\['when'\] is an array"),
        ({"names": [{1, 2}] * 24}, r"the batch\['names'\]\[0\] is \{1, 2\}"),
        ({3: 4}, r"the batch\[3\] is 'a name that is no word'"),
    ],
)
def test_batches_that_no_record_can_hold(extra: Any, message: str, tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", sample_loss=of_columns)
    with tracker.step():
        with pytest.raises(TypeError, match=f"{message}.*pass index="):
            tracker.batch({"x": job.x, "y": job.y, **extra})
        tracker.batch({"x": job.x, "y": job.y, **extra}, index=range(24))


def test_trees_keep_their_classes() -> None:
    from transformers import BatchEncoding
    from transformers.modeling_outputs import CausalLMOutput

    x = torch.arange(6.0).reshape(3, 2)
    for tree in (
        BatchEncoding({"x": x}),
        CausalLMOutput(logits=x),
        OrderedDict(x=x),
        defaultdict(list, x=x),
        encoding(x, x),
        columns(x, x),
        example(x, torch.zeros(3)),
    ):
        cut = tree_slice(tree, 1, 3)
        assert type(cut) is type(tree)
        names = vars(tree) if is_dataclass(tree) else tree
        name = "x" if "x" in names else "logits"
        assert torch.equal(getattr(cut, name) if hasattr(cut, name) else cut[name], x[1:])


def test_what_has_an_entry_for_each_row_is_cut_with_the_rows() -> None:
    x = torch.arange(3)
    tree = {
        "x": x, "words": ["a", "b", "c"], "tuple": ("a", "b", "c"), "lists": [[1], [2, 3], []], "array": np.arange(3),
        "shape": (3, 224, 224), "pair": [1, 2], "one": "abc", "none": None,
    }  # fmt: skip
    cut = {
        "x": [1, 2], "words": ["b", "c"], "tuple": ("b", "c"), "lists": [[2, 3], []], "array": [1, 2],
        "shape": (3, 224, 224), "pair": [1, 2], "one": "abc", "none": None,
    }  # fmt: skip
    for rows in (slice(1, 3), torch.tensor([1, 2])):
        found = tree_map(Tensor.tolist, tree_take(tree, rows))
        assert {**found, "array": found["array"].tolist()} == cut


def test_samples_with_words_stand_one_by_one() -> None:
    """Their gradients are those of their own backward passes, by `tracker.backward()` too."""
    job, plain = make_job(), make_job()
    tracker = job.tracker(sample_loss=of_example)
    with tracker.step():
        tracker.batch(example(job.x, job.y))
        tracker.backward()
        of_example(plain.model, example(plain.x, plain.y)).mean().backward()
        for mine, own in zip(job.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.allclose(mine.grad, own.grad, rtol=1e-12)  # type: ignore[arg-type]


def test_queries_with_nan_are_refused() -> None:
    job = make_job()
    for make, message in (
        (lambda: Query.outputs(torch.full((2, 4), float("nan"), dtype=torch.float64)), r"inputs hold 8 number\(s\)"),
        (lambda: Query.loss(job.x, torch.full((24,), float("nan"))), r"labels hold 24 number\(s\) that are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            job.tracker(queries={"q": make()})
    with pytest.raises(TypeError, match="a query's labels is a tensor, an array or a list"):
        Query.loss(job.x, {"a": 1})  # type: ignore[arg-type]
