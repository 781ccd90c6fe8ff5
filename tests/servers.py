"""W&B's stand-in server, as tests hold it."""

import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import wandb
from jobs import TESTS


class Server:
    """A W&B server of our own on loopback, which the real SDK is pointed at."""

    def __init__(self, state: Path) -> None:
        self.state = state
        script = TESTS / "wandb_standin.py"
        self._process = subprocess.Popen([sys.executable, str(script), "--dir", str(state)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (state / "port").is_file():
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        self.address = f"http://127.0.0.1:{(state / 'port').read_text().strip()}"

    def ask(self, what: str, **content: Any) -> Any:
        request = urllib.request.Request(f"{self.address}/_ctl/{what}", json.dumps(content).encode() or None)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def faults(self, **faults: Any) -> None:
        """`down`, `fail_rate`, `fail_status`, `fail_graphql`, `fail_downloads`, `latency_ms`, …"""
        self.ask("faults", **faults)

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows of `entity/project/id`."""
        rows = self.ask(f"history/{run}")
        return [json.loads(row) if isinstance(row, str) else row for row in rows]

    def media_lacking(self, run: str) -> list[str]:
        """What the rows of `entity/project/id` show and is not there, to the byte: files, and the artifacts of
        tables."""
        lacking, files = [], self.state / "runs" / run.replace("/", "__") / "files"
        state = self.ask("state")
        known = {name for name, made in state["clients"].items() if state["artifacts"][made]["state"] == "COMMITTED"}
        for row in self.history(run):
            for shown in (value for value in row.values() if isinstance(value, dict) and "path" in value):
                path = files / shown["path"]
                if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shown["sha256"]:
                    lacking.append(shown["path"])
                client = shown.get("artifact_path", "").split("/")[2:3]
                lacking += [name for name in client if name not in known]
        return lacking

    def requests(self, kind: str) -> list[str]:
        """The requests of one kind ("PUT blob", "GQL UseArtifact") that were answered, without their time."""
        lines = (line.split(" ", 1)[1] for line in (self.state / "requests.log").read_text().splitlines())
        return [line for line in lines if line.startswith(kind)]

    def downloads(self) -> int:
        return int(self.ask("stats")["ops"].get("GET", 0))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def close_wandb() -> None:
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()
