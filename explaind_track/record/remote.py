"""Fetches what W&B keeps, on demand: each file once, whole, and as it was written, or not at all."""

import re
import time
from pathlib import Path

import msgspec

from explaind_track.errors import TrajectoryError
from explaind_track.record.files import file_sha256
from explaind_track.record.manifest import MANIFEST, Entry
from explaind_track.record.validation import MOST_BYTES, Count, Sha256, checked

PREFIX = "wandb:"
"""In front of an artifact's name, where a directory on this disk could stand."""
ATTEMPTS = 8
CHUNK = 2**20


class ResultMetadata(msgspec.Struct):
    """What an artifact of `artifacts.log_result` says of its file."""

    file: str
    sha256: Sha256


def cache_directory() -> Path:
    """The directory that keeps fetched files, each under its hash. It may be removed at any time."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("explaind_track"))


class RemoteArtifact:
    """An artifact of W&B. `name` is `entity/project/name:alias`, with `latest` for a missing alias."""

    def __init__(self, name: str) -> None:
        """Raises TrajectoryError where W&B does not answer or has no such artifact."""
        import wandb

        wanted = name.removeprefix(PREFIX)
        if ":" not in wanted:
            wanted = f"{wanted}:latest"
        try:
            self.artifact = wandb.Api().artifact(wanted)
        except (wandb.errors.Error, ValueError) as error:
            raise TrajectoryError(
                f"W&B gives no artifact {wanted!r} ({error}); it is named entity/project/name:alias"
            ) from None
        self.name = self.artifact.source_qualified_name

    def manifest_directory(self) -> Path:
        """The directory that the trajectory's manifest is fetched to."""
        digest = str(self.artifact.digest)
        if not re.fullmatch("[0-9a-f]{32,64}", digest):
            raise TrajectoryError(f"W&B names {self.name} by {digest!r}, which is no digest")
        if (size := self.size_of(MANIFEST)) > MOST_BYTES:
            raise TrajectoryError(f"{MANIFEST} of {self.name} has {size} bytes, and none of ours has over {MOST_BYTES}")

        directory = cache_directory() / "manifests" / digest
        self.artifact.get_entry(MANIFEST).download(root=str(directory))
        return directory

    def size_of(self, path: str) -> int:
        """The bytes of the artifact's file `path`, as W&B says. Raises TrajectoryError if there is none."""
        entry = self.artifact.manifest.entries.get(path)
        if entry is None:
            raise TrajectoryError(f"{self.name} is not what this package sends: there is no {path} in it")
        return checked(entry.size, Count, f"the size of {path} in {self.name}")

    def locate(self, entry: Entry) -> Path:
        """The file of the trajectory, fetched if it is not here yet."""
        return self.fetch(entry.path, entry.size, entry.sha256)

    def fetch(self, path: str, size: int, sha256: str) -> Path:
        """The artifact's file `path`. A download that breaks off goes on where it stopped, also in another process.

        Raises TrajectoryError if the file is not there, is another than expected, or does not arrive.
        """
        from filelock import FileLock

        target = cache_directory() / "files" / sha256[:2] / sha256
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.is_file() and target.stat().st_size == size and file_sha256(target) == sha256:
                return target

            part = target.with_suffix(".part")
            self._complete(path, size, part)
            found = file_sha256(part)
            if found != sha256:
                part.unlink()
                raise TrajectoryError(
                    f"{path} of {self.name} is not what was written: its sha256 is {found}, {sha256} was expected"
                )
            part.replace(target)
        return target

    def _complete(self, path: str, size: int, part: Path) -> None:
        """Asks for what is missing of the file until it has its size, a few times."""
        import requests

        for attempt in range(ATTEMPTS):
            have = part.stat().st_size if part.is_file() else 0
            if have == size and part.is_file():
                return
            if have > size:
                part.unlink()  # begun from another file: from the start again

            try:
                self._append(path, size, part)
            except requests.RequestException as error:
                reason = str(error)
            else:
                if part.stat().st_size == size:
                    return
                reason = f"{part.stat().st_size} of {size} bytes"
            time.sleep(min(0.1 * 2**attempt, 10))

        raise TrajectoryError(
            f"{path} of {self.name} does not arrive ({reason}); try again, it goes on where it stopped"
        )

    def _append(self, path: str, size: int, part: Path) -> None:
        """Asks for the rest of the file, and writes what comes, up to its size."""
        import requests

        files = list(self.artifact.files(names=[path]))
        if not files:
            raise TrajectoryError(f"{self.name} has no file {path!r}")

        have = part.stat().st_size if part.is_file() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(files[0].direct_url, headers=headers, stream=True, timeout=60) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink()  # begun from a longer file than is there
            answer.raise_for_status()

            # a server that ignores the range sends the whole file
            with part.open("ab" if answer.status_code == requests.codes.partial_content else "wb") as file:
                for chunk in answer.iter_content(CHUNK):
                    file.write(chunk[: size - file.tell()])
                    if file.tell() == size:
                        break  # what comes behind is not the file's


def fetch_result(name: str) -> Path:
    """The single file of an artifact that `artifacts.log_result` made. Raises TrajectoryError."""
    remote = RemoteArtifact(name)
    told = dict(remote.artifact.metadata)
    metadata: ResultMetadata = checked(
        told, ResultMetadata, f"{remote.name} is no result of this package: its metadata"
    )
    return remote.fetch(metadata.file, remote.size_of(metadata.file), metadata.sha256)
