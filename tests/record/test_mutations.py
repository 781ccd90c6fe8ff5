"""Records, rows and metadata, mutated by their structure: read right or refused, and nothing beside them is touched."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forging import digest_of, read_influence, read_manifest, refit, seal, write_influence
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jobs import make_job, sample_loss
from rich.console import Console
from safetensors.torch import load_file, save_file
from watching import watched

from explaind_track import Influence, Trajectory, errors, explain, open_influence
from explaind_track.cli.live_view import Follower, view
from explaind_track.cli.report import make_report, write_report
from explaind_track.errors import TrajectoryError
from explaind_track.record import files, remote
from explaind_track.record.history import append_row, read_rows
from explaind_track.record.manifest import Manifest
from explaind_track.record.media import Table, from_json, media_of
from explaind_track.record.run_directory import find_runs, is_finished, read_tie
from explaind_track.record.validation import read_json

OURS = tuple(error for name in errors.__all__ if issubclass(error := getattr(errors, name), Exception))
FEW, MANY = 12, 1000

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, -0.5, 1e308, float("inf"), float("nan"),
    "", "a", "../../secret", "/etc/passwd", "keyframes/00000000.safetensors", "a\0b", "\ud800", "<b>", "\x1b[2J",
    "0" * 64, "ä" * 10**5, [], [[]], [1, 2], {}, {"a": 1}, {"picture": "media/../../secret"}, [0] * 100,
]  # fmt: skip

Node = tuple[Any, Any]
"""A place in a JSON tree: what holds it, and its key or number there."""


def nodes(tree: Any) -> Iterator[Node]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from nodes(value)


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with a few of its nodes replaced, left out, doubled, renamed, exchanged, or off by a little."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        places = list(nodes(tree))
        if not places:
            return deepcopy(draw(st.sampled_from(VALUES)))
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "leave out", "double", "exchange", "off", "nest"]))
        value = holder[key]
        if kind == "replace":
            holder[key] = deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "leave out":
            del holder[key]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(key, value)
        elif kind == "double":
            holder[draw(st.sampled_from(["a", "more", "../x", f"{key} "]))] = value
        elif kind == "exchange":
            other, place = draw(st.sampled_from(places))
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = deepcopy(other[place])
        elif kind == "off" and isinstance(value, int | float):
            holder[key] = value + draw(st.sampled_from([-1, 1, -(10**9), 10**9, 10**12]))
        elif kind == "off" and isinstance(value, str):
            holder[key] = value[: draw(st.integers(0, len(value)))] + draw(st.sampled_from(["", "x", "/", "\n"]))
        else:
            for _ in range(draw(st.sampled_from([1, 20, 100]))):
                value = [value]
            holder[key] = value
    return tree


def attempt(*uses: Callable[[], Any]) -> None:
    """Each does what it should, or raises an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use in uses:
            with suppress(OURS):
                use()


# ------------------------------------------------------------------------------------ a valid record, and its uses


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a record as `valid`, and a secret beside it."""
    place = tmp_path_factory.mktemp("mutations").resolve()
    job = make_job()
    tracker = job.tracker(trajectory=place / "valid", keyframe_every=3)
    job.run(tracker, 5)
    tracker.influence("query", ("query", "output")).save(place / "influence.safetensors")
    tracker.finish()
    explain(
        Trajectory.open(place / "valid"), job.model, job.queries["query"], groups=1, keep=("step", "sample"),
        sample_loss=sample_loss, data=lambda index: (job.x[index], job.y[index]), out=place / "result", progress=False,
    )  # fmt: skip
    table = Table(["sample", "picture"], [[3, b"a picture"], ["word", None]])
    append_row(place / "valid", {"train/step": 5, "samples/most_influential": table, "samples/map": b"a map"})
    (place / "secret").write_text("a secret")
    tie = {"entity": "me", "project": "p", "id": "abc", "name": "a run", "offline": True, "directory": "/w/x"}
    (place / "valid" / "run.json").write_text(json.dumps({**tie, "config": {"explaind_track": {"a": [1]}}}))
    return place


@pytest.fixture(scope="module")
def copy(place: Path) -> Callable[[], Path]:
    def fresh() -> Path:
        shutil.rmtree(place / "copy", ignore_errors=True)
        shutil.copytree(place / "valid", place / "copy")
        return place / "copy"

    return fresh


def replay(directory: Path) -> None:
    trajectory = Trajectory.open(directory)
    for step in trajectory.steps():
        assert step.number <= 5
    trajectory.state_dict(len(trajectory))
    trajectory.random_state()
    for _, batch in trajectory.batches_before(len(trajectory)):
        batch.weights(torch.zeros(0))


def resume(directory: Path) -> None:
    job = make_job()
    try:
        tracker = job.tracker(trajectory=directory, resume=True)
    except ValueError as error:
        if "the run in" not in str(error):  # which has another model
            raise
    else:
        tracker.finish()


def look(directory: Path) -> None:
    """What `show` and `report` do."""
    rows = read_rows(directory)
    follower = Follower(directory)
    follower.read()
    with open(os.devnull, "w") as nowhere:
        Console(file=nowhere).print(view(directory, list(follower.rows), "stopped"))
    if rows:
        head = Manifest.read(directory, missing_ok=True).head
        write_report(directory / "report.html", make_report(rows, head, "a run", read_tie(directory), directory))


def many(slow: bool) -> Any:
    count = MANY if slow else FEW
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=not slow,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip


def check_manifests(copy: Callable[[], Path], slow: bool) -> None:
    valid = read_manifest(copy())

    @many(slow)
    @given(mutated(valid), st.booleans())
    def check(content: Any, sealed: bool) -> None:
        directory = copy()
        if sealed and isinstance(content, dict):
            seal(directory, content)
        else:
            (directory / "manifest.json").write_text(json.dumps(content))
        with watched(directory):
            attempt(*(lambda use=use: use(directory) for use in (replay, resume, find_runs, look)))

    check()


def check_headers(copy: Callable[[], Path], slow: bool) -> None:
    directory = copy()
    paths = sorted(path.relative_to(directory) for path in directory.rglob("*.safetensors"))
    headers = {path: files.TensorFile(directory / path).header for path in paths}

    @many(slow)
    @given(st.sampled_from(paths).flatmap(lambda path: st.tuples(st.just(path), mutated(headers[path]))), st.data())
    def check(mutation: tuple[Path, Any], data: st.DataObject) -> None:
        directory, (path, header) = copy(), mutation
        tensors = load_file(directory / path)
        if data.draw(st.booleans()):  # a tensor of another shape, type or name
            name = data.draw(st.sampled_from(sorted(tensors)))
            value = tensors.pop(name)
            value = data.draw(
                st.sampled_from(
                    [value.reshape(-1), value[:1], value.float(), value.unsqueeze(-1)] if value.ndim else [value]
                )
            )
            tensors[data.draw(st.sampled_from([name, f"{name}x", name.replace(":", "", 1)]))] = value.clone()
        save_file(tensors, directory / path, {"explaind_track": json.dumps(header)})
        refit(directory, str(path))
        with watched(directory):
            attempt(*(lambda use=use: use(directory) for use in (replay, resume)))

    check()


def check_rows(copy: Callable[[], Path], slow: bool) -> None:
    rows = read_rows(copy())

    @many(slow)
    @given(mutated(rows), st.binary(max_size=40))
    def check(content: Any, torn: bytes) -> None:
        directory = copy()
        lines = [json.dumps(row).encode() for row in content] if isinstance(content, list) else [b"null"]
        lines.insert(len(lines) // 2, torn)
        (directory / "history.jsonl").write_bytes(b"\n".join(lines) + b"\n")

        def each() -> None:
            for row in read_rows(directory):
                from_json(row, directory)
            media_of(directory)

        with watched(directory):
            attempt(each, lambda: look(directory), lambda: resume(directory))

    check()


def check_metadata(copy: Callable[[], Path], place: Path, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the small files of a run say, and what W&B says of an artifact."""
    directory = copy()
    names = ["run.json", "finished.json"]
    told: dict[str, Any] = {name: read_json(directory / name) for name in names}
    content = (place / "influence.safetensors").read_bytes()
    told["artifact"] = {"file": "a", "sha256": files.file_sha256(place / "influence.safetensors"), "size": len(content)}
    monkeypatch.setattr(remote, "cache_directory", lambda: place / "copy" / "cache")
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)

    class Answer(SimpleNamespace):
        status_code = 200

        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *error: object) -> None: ...

        def raise_for_status(self) -> None: ...

        def iter_content(self, size: int) -> Iterator[bytes]:
            yield content

    monkeypatch.setattr("requests.get", lambda *arguments, **options: Answer())

    @many(slow)
    @given(st.sampled_from(sorted(told)).flatmap(lambda name: st.tuples(st.just(name), mutated(told[name]))))
    def check(mutation: tuple[str, Any]) -> None:
        directory, (name, said) = copy(), mutation
        if name != "artifact":
            (directory / name).write_text(json.dumps(said))

        def fetch() -> None:
            metadata = said if isinstance(said, dict) else {}
            entries = {"a": SimpleNamespace(size=metadata.get("size"))}
            named = SimpleNamespace(
                metadata=metadata, source_qualified_name="e/p/a:v0", manifest=SimpleNamespace(entries=entries),
                files=lambda names: [SimpleNamespace(direct_url="http://127.0.0.1/a")] if names == ["a"] else [],
            )  # fmt: skip
            monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(artifact=lambda wanted: named))
            open_influence("wandb:e/p/a")

        with watched(directory):
            attempt(lambda: read_tie(directory), lambda: is_finished(directory, 5), lambda: find_runs(directory))
            attempt(lambda: look(directory), lambda: resume(directory), fetch if name == "artifact" else lambda: None)

    check()


def check_results(place: Path, slow: bool) -> None:
    """A result on disk, and the file of an influence, with digests that fit."""
    contents = read_json(place / "result" / "request.json")
    header, tensors = read_influence(place / "influence.safetensors")

    @many(slow)
    @given(mutated(contents), mutated(header), st.booleans())
    def check(content: Any, header: Any, whole: bool) -> None:
        directory = place / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(place / "result", directory)
        if whole and isinstance(content, dict):
            content["digest"] = digest_of({key: value for key, value in content.items() if key != "digest"})
        (directory / "request.json").write_text(json.dumps(content))
        write_influence(directory / "influence.safetensors", header, tensors)

        with watched(directory), suppress(ValueError):
            attempt(lambda: open_influence(directory))
        with watched(directory), suppress(ValueError):
            attempt(lambda: open_influence(directory / "influence.safetensors"))

    check()


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["manifests", "headers", "rows", "metadata", "results"])
def test_a_mutated_record_is_read_right_or_refused(
    what: str, slow: bool, copy: Callable[[], Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "metadata":
        check_metadata(copy, place, slow, monkeypatch)
        return
    if what == "results":
        check_results(place, slow)
        return
    {"manifests": check_manifests, "headers": check_headers, "rows": check_rows}[what](copy, slow)


def test_the_watch_sees_what_strays(place: Path, copy: Callable[[], Path]) -> None:
    directory = copy()
    with pytest.raises(AssertionError), watched(directory):
        (directory / ".." / "secret").read_text()
    with pytest.raises(AssertionError), watched(directory):
        bytearray(b"x" * 300 * 10**6)
    with watched(directory):
        (directory / "inside").write_text("a")
    with pytest.raises(TrajectoryError), watched(directory):
        seal(directory, {**read_manifest(directory), "files": 3})
        Trajectory.open(directory)
    assert isinstance(Influence.load(place / "influence.safetensors"), Influence)
