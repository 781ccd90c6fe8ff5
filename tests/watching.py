"""Watches what is done to the file system, and the memory that it takes."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from explaind_track.record import files

MOST_MB = 200

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
watching: Path | None = None
strayed: list[str] = []


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if watching is None or (event != "open" and event not in WRITES):
        return
    if event == "open":
        path, _, flags = arguments
        if os.path.isdir(path):
            return  # a file without a name, or a directory that is locked or goes through to the disk
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        paths = [path]
    else:
        writes, paths = True, [one for one in arguments if isinstance(one, str | bytes | os.PathLike)]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            note(os.path.realpath(os.fsdecode(path)), writes)


def note(path: str, writes: bool) -> None:
    """Outside of the record, nothing is written; and nothing beside it is read."""
    assert watching is not None
    inside = path.startswith(str(watching))
    beside = path.startswith(str(watching.parent))
    if not inside and (writes or beside) and not path.startswith("/dev/") and "__pycache__" not in path:
        strayed.append(path)


sys.addaudithook(hook)


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Fails where a file outside of the directory is touched, or memory grows. Safetensors opens files unseen: tell."""
    global watching
    genuine = files.safe_open

    def told(path: Any, *arguments: Any, **options: Any) -> Any:
        note(os.path.realpath(path), False)
        return genuine(path, *arguments, **options)

    limit, before = resource.getrlimit(resource.RLIMIT_AS), memory_kb("VmRSS")
    files.safe_open = told  # type: ignore[assignment]
    resource.setrlimit(resource.RLIMIT_AS, (memory_kb("VmSize") * 1024 + 2**30, limit[1]))  # rather than none left
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    watching = directory.resolve()
    try:
        yield
    finally:
        watching = None
        resource.setrlimit(resource.RLIMIT_AS, limit)
        files.safe_open = genuine
        grown = (memory_kb("VmHWM") - before) / 1e3
        outside, strayed[:] = list(strayed), []
    assert outside == []
    assert grown < MOST_MB


def memory_kb(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))
