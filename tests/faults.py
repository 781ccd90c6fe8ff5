"""Faults at file operations: every operation beneath a directory is counted, and one of them goes wrong.

A fault is the process killed just before an operation, just after it, or halfway through a write; or the operation that
raises what a full disk, a broken one or missing rights raise. Each is done in a process of its own.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jobs import in_child

from explaind_track.core import influence_file

KILLED = ("killed before", "killed after", "killed halfway")
RAISED = ("ENOSPC", "EIO", "EACCES")
LASTING = ("full from then on",)
KINDS = (*KILLED, *RAISED, *LASTING)

TAKES_ROOM = ("write", "mkdir", "open to write", "allocate", "link", "copy")
"""What a full disk refuses."""


class FileFaults:
    """The file operations of this process beneath a directory, of which number `at` goes wrong."""

    def __init__(self, root: Path, at: int | None = None, kind: str = "") -> None:
        self.root, self.at, self.kind = str(root.resolve()), at, kind
        self.done: list[str] = []
        """What was done so far, or tried."""

    @property
    def is_full(self) -> bool:
        """Whether the next operation finds the disk full."""
        full_now = self.kind == "ENOSPC" and len(self.done) == self.at
        return full_now or (self.kind in LASTING and self.at is not None and len(self.done) >= self.at)

    def install(self) -> None:
        """From here on, for this whole process."""
        first = lambda path, *_, **__: path  # noqa: E731
        second = lambda _, path, *__, **___: path  # noqa: E731
        of_descriptor = lambda descriptor, *_, **__: f"/proc/self/fd/{descriptor}"  # noqa: E731
        operations: dict[tuple[Any, str], tuple[str, Callable[..., Any]]] = {
            (os, "replace"): ("rename", second),
            (os, "rename"): ("rename", second),
            (os, "unlink"): ("unlink", first),
            (os, "remove"): ("unlink", first),
            (os, "rmdir"): ("rmdir", first),
            (os, "mkdir"): ("mkdir", first),
            (os, "link"): ("link", second),
            (os, "symlink"): ("link", second),
            (os, "open"): ("open", first),
            (os, "fsync"): ("fsync", of_descriptor),
            (os, "posix_fallocate"): ("allocate", of_descriptor),
            (os, "sendfile"): ("copy", of_descriptor),
            (influence_file, "save_file"): ("write", second),
            (np.memmap, "flush"): ("fsync", lambda array: array.filename),
        }
        for (place, name), (what, path_of) in operations.items():
            setattr(place, name, self._watched(what, getattr(place, name), path_of))
        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]

    def _concerns(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        name = os.fspath(path)
        real = os.path.realpath(name) if name.startswith("/proc/") else os.path.abspath(name)
        return f"{real}/".startswith(f"{self.root}/")

    def _watched(self, what: str, real: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if not self._concerns(path_of(*arguments, **options)):
                return real(*arguments, **options)
            return self.run(what, path_of(*arguments, **options), lambda: real(*arguments, **options))

        return operation

    def run(self, what: str, path: Any, action: Callable[[], Any], halfway: Callable[[], Any] = lambda: None) -> Any:
        """Does the operation, or what the fault makes of it."""
        number = len(self.done)
        self.done.append(f"{what} {os.path.realpath(path).removeprefix(self.root)}")
        if number == self.at:
            if self.kind == "killed before":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "killed halfway":
                halfway()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind in RAISED:
                code = getattr(errno, self.kind)
                raise OSError(code, os.strerror(code), str(path))
        if self.kind in LASTING and self.at is not None and number >= self.at and what in TAKES_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        done = action()
        if number == self.at and self.kind == "killed after":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
            if not self._concerns(file):
                return real(file, mode, buffering, *more, **options)
            writes = set(mode) & set("wax+")
            if not writes or ("+" in mode and buffering):
                what = "open to write" if writes else "open"
                return self.run(what, file, lambda: real(file, mode, buffering, *more, **options))
            plain = mode.replace("b", "").replace("t", "")
            raw: Any = self.run("open to write", file, lambda: Watched(self, file, plain))
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **options)

        return opened


class Watched(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, faults: FileFaults, path: Any, mode: str) -> None:
        super().__init__(os.fspath(path), mode)
        self._is_full = False
        self._faults, self._path = faults, path

    def write(self, content: Any) -> int:
        """A disk that is full takes half, and then nothing."""
        faults, half, really = self._faults, memoryview(content)[: len(content) // 2], super().write
        if faults.is_full and not self._is_full and len(half):
            self._is_full = True
            return int(really(half))
        self._is_full = False
        return int(faults.run("write", self._path, lambda: really(content), lambda: really(half)))

    def truncate(self, size: int | None = None) -> int:
        really = super().truncate
        return int(self._faults.run("truncate", self._path, lambda: really(size)))


def operations(root: Path, action: Callable[[], Any]) -> list[str]:
    """The operations beneath the directory of an action that goes well, in a process of its own."""
    log = root.parent / f"{root.name}.operations"

    def counted() -> None:
        faults = FileFaults(root)
        faults.install()
        action()
        log.write_text("\n".join(faults.done))

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(counted), 0)[1]) == 0
    return log.read_text().split("\n")


def suffer(root: Path, action: Callable[[], Any], at: int, kind: str) -> None:
    """Does the action in a process of its own, in which an operation beneath the directory goes wrong."""

    def faulty() -> None:
        FileFaults(root, at, kind).install()
        action()

    os.waitpid(in_child(faulty), 0)
