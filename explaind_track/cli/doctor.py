"""`explaind-track doctor`: what is installed, what computes, W&B's state, and which places can be written."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click
import torch
from packaging.requirements import Requirement

from explaind_track.cli.common import AS_JSON, report_errors, tell
from explaind_track.record.remote import cache_directory

DEVELOPERS = ("dev", "docs", "recipes")
"""Extras for the source tree, of no use to an installed package."""

LITTLE_ROOM = 1e9


@dataclass(frozen=True)
class Check:
    """Something that was looked at."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""
    """What to do; where it is `ok`, what may be done."""


@click.command()
@AS_JSON
@report_errors
def doctor(as_json: bool) -> None:
    """Say what is installed and what works here.

    Versions, extras, devices, W&B's state and the places that are written to. Asks no server. Exits with 1 where
    something has to be mended.
    """
    checks = [*packages(), *devices(), *wandb_state(), *places()]
    ok = all(check.ok for check in checks)
    lines = [f"{'ok ' if check.ok else 'BAD'}  {check.what:22} {check.found}" for check in checks]
    lines = [
        line + (f"\n     → {check.advice}" if check.advice else "") for line, check in zip(lines, checks, strict=True)
    ]
    lines.append("all is well" if ok else "something has to be mended: see the lines with BAD")
    tell(as_json, {"ok": ok, "checks": [asdict(check) for check in checks]}, "\n".join(lines))
    if not ok:
        sys.exit(1)


def packages() -> Iterator[Check]:
    """Python, this package, what it requires, and its extras."""
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    yield Check("explaind_track", version("explaind_track"))

    extras: dict[str, list[str]] = {}
    for text in requires("explaind_track") or []:
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        if "extra ==" in marker:
            extra = marker.split("extra ==")[1].strip(" '\"")
            extras.setdefault(extra, []).append(requirement.name)
            continue
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        advice = "" if fits else f"pip install '{requirement}'"
        yield Check(requirement.name, found or "not installed", fits, advice)

    for extra, names in extras.items():
        if extra not in DEVELOPERS:
            lacking = [name for name in names if _version(name) is None]
            told = f"without {', '.join(lacking)}" if lacking else "installed"
            yield Check(f"extra {extra}", told, True, f"pip install 'explaind_track[{extra}]'" if lacking else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Check]:
    """What tensors can be on."""
    yield Check("cpu", f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} core(s)")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield Check(f"cuda:{number}", torch.cuda.get_device_name(number))
    else:
        yield Check("cuda", "none")


def wandb_state() -> Iterator[Check]:
    """Whether runs go to a server."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    server = wandb.setup().settings.base_url
    known = wandb.login(prompt=False, verify=False)
    if mode in ("offline", "disabled", "dryrun"):
        yield Check("W&B", f"WANDB_MODE={mode}: no run is sent", True, "unset WANDB_MODE to send runs")
    elif known:
        yield Check("W&B", f"somebody is logged in at {server}")
    else:
        yield Check(
            "W&B", "nobody is logged in: runs are offline", True, "`wandb login` to send them, or go on without"
        )


def places() -> Iterator[Check]:
    """The directories that are written to."""
    given = {
        "this directory": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "cache": cache_directory(),
        "W&B's files": Path(os.environ.get("WANDB_DIR", Path.cwd())),
    }
    for what, path in given.items():
        exists = next(place for place in (path, *path.parents) if place.exists())
        free = shutil.disk_usage(exists).free
        if not os.access(exists, os.W_OK | os.X_OK):
            yield Check(what, f"{path} cannot be written", False, "write elsewhere, or change its permissions")
        elif free < LITTLE_ROOM:
            yield Check(what, f"{path}, {free / 1e9:.1f} GB free", False, "make room: records grow while a run trains")
        else:
            yield Check(what, f"{path}, {free / 1e9:,.0f} GB free")
