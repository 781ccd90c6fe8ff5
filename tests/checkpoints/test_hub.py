"""A repository of the hub, served on loopback: its branches are checkpoints, fetched when they are needed."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save
from torch import nn

from explaind_track import CheckpointSeries
from explaind_track.errors import CheckpointError

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants


def content(step: int) -> dict[str, bytes]:
    tensors = {"weight": torch.full((1, 2), float(step)), "bias": torch.zeros(1)}
    return {"model.safetensors": save(tensors), "pytorch_model.bin": b"a second copy", "README.md": b"words"}


BRANCHES = {"main": content(300), "step100": content(100), "step200-tokens1B": content(200)}


def answer_to(path: str) -> tuple[bytes, dict[str, str]] | None:
    """What the hub says to a request, and the headers; None where it has nothing."""
    api = "/api/models/someone/series"
    if path == f"{api}/refs":
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": commit(n)} for n in BRANCHES]
        return json.dumps({"branches": branches, "converts": [], "tags": []}).encode(), {}

    for name, files in BRANCHES.items():
        for revision in (name, commit(name)):
            if path == f"{api}/revision/{revision}":
                siblings = [{"rfilename": file} for file in files]
                return json.dumps({"id": "someone/series", "sha": commit(name), "siblings": siblings}).encode(), {}
            if path.startswith(f"{api}/tree/{revision}"):
                tree = [{"type": "file", "path": f, "size": len(held), "oid": tag(held)} for f, held in files.items()]
                return json.dumps(tree).encode(), {}
            for file, held in files.items():
                if path == f"/someone/series/resolve/{revision}/{file}":
                    return held, {"ETag": f'"{tag(held)}"', "X-Repo-Commit": commit(name)}
    return None


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as listing and fetching needs."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        found = answer_to(path)
        self.send_response(200 if found else 404)
        held, headers = found or (b"", {"X-Error-Code": "RepoNotFound"})
        for name, value in {"Content-Length": str(len(held)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(held)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def tag(held: bytes) -> str:
    return hashlib.sha1(held).hexdigest()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the endpoint as the variable HF_ENDPOINT does when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "".join(template[1:]))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.shutdown()
    server.server_close()


def fetched(name: str) -> bool:
    return any("/resolve/" in path and path.endswith(name) for path in Hub.asked)


@pytest.mark.usefixtures("served")
def test_branches_named_after_steps_are_checkpoints_fetched_when_needed() -> None:
    series = CheckpointSeries.open("hf:someone/series")
    assert series.steps == [100, 200]
    assert not fetched("model.safetensors")
    model = nn.Linear(2, 1)
    series[1].load(model)
    assert model.weight.tolist() == [[200.0, 200.0]]
    assert series[1].optimizer(model) is None
    assert sum("/resolve/" in path and "model.safetensors" in path for path in Hub.asked) <= 2  # HEAD and GET
    assert not fetched("pytorch_model.bin")
    (one,) = CheckpointSeries.open(["hf:someone/series@step100"])
    one.load(model)
    assert model.weight.tolist() == [[100.0, 100.0]]


@pytest.mark.usefixtures("served")
def test_what_was_fetched_is_opened_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointSeries.open("hf:someone/series")[0].load(nn.Linear(2, 1))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    series = CheckpointSeries.open("hf:someone/series")
    assert series.steps == [100]
    model = nn.Linear(2, 1)
    series[0].load(model)
    assert model.weight.tolist() == [[100.0, 100.0]]


@pytest.mark.usefixtures("served")
def test_what_the_hub_does_not_have_is_told() -> None:
    with pytest.raises(CheckpointError, match="the hub does not give nobody/nothing"):
        CheckpointSeries.open("hf:nobody/nothing")
    with pytest.raises(CheckpointError, match=r"no branch that is named after a step.*it has main"):
        CheckpointSeries.open("hf:someone/series@main")
