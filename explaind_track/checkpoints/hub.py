"""A repository of the Hugging Face hub whose branches are checkpoints (`step1000`), each fetched when it is needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self

from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.formats import checkpoints_in
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.step_number import step_by_name
from explaind_track.core.checks import first_few, require_package
from explaind_track.errors import CheckpointError

PREFIX = "hf:"
"""In front of a repository's name, where a folder on this disk could stand."""

WANTED = (
    "*.json", "*.safetensors", "*.distcp", "*/.metadata", ".metadata", "latest", "optimizer.*", "scheduler.*",
    "*_states.pt", "tokenizer*",
)  # fmt: skip
WEIGHTS_OF_TORCH = ("pytorch_model*.bin", "model.pt")
"""Fetched where a revision has no safetensors."""


class HubCheckpoint(Checkpoint):
    """A revision of a repository. Its files are fetched once, into the hub's own cache, when they are first needed."""

    format = "the hub"

    def __init__(self, repository: str, revision: str, step: int) -> None:
        super().__init__(Path(f"{PREFIX}{repository}@{revision}"), step)
        self._repository, self._revision = repository, revision

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        """None: revisions are found by `hub_checkpoints`, from a name that is no folder."""
        return ()

    @cached_property
    def folder(self) -> Path:
        """The revision's files on this disk.

        Raises:
            CheckpointError: The hub, or its cache, does not give them.
        """
        from huggingface_hub import snapshot_download

        with _telling_of_the_hub(self._repository):
            files = _of_the_hub(lambda api: list(api.list_repo_files(self._repository, revision=self._revision)))
            if files is None:
                return _cached(self._repository)[self._revision]
            return Path(snapshot_download(self._repository, revision=self._revision, allow_patterns=_chosen(files)))

    @cached_property
    def fetched(self) -> Checkpoint:
        """The checkpoint that the files are.

        Raises:
            CheckpointError: They are of no format that can be read.
        """
        found = checkpoints_in(self.folder, self.step)
        if len(found) != 1:
            raise CheckpointError(f"{self.path} holds no checkpoint that can be read (in {self.folder})")
        return found[0]

    def weights(self) -> Mapping[str, Tensor]:
        return self.fetched.weights()

    def weights_for(self, model: nn.Module) -> Mapping[str, Tensor]:
        return self.fetched.weights_for(model)

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        return self.fetched.saved_optimizer(model)


def hub_checkpoints(source: str) -> list[Checkpoint]:
    """The checkpoints of a repository: of every branch that is named after a step, or of the one revision it names.

    Args:
        source: `hf:owner/name`, or `hf:owner/name@revision`.

    Raises:
        CheckpointError: There is no such repository, or no revision of it tells a step.
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    require_package("huggingface_hub", "hub", "a repository of the hub")
    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    names = [revision] if revision else _branches(repository)
    steps = {name: step_by_name(Path(name)) for name in names}
    found: list[Checkpoint] = [
        HubCheckpoint(repository, name, step) for name, step in steps.items() if step is not None
    ]
    if not found:
        raise CheckpointError(
            f"{repository} has no branch that is named after a step, such as step1000 (it has {first_few(names)}): "
            "fetch what you want into folders that are, and open those"
        )
    return found


def _branches(repository: str) -> list[str]:
    """The branches of a repository; where the hub cannot be reached, those that its cache holds."""
    with _telling_of_the_hub(repository):
        names = _of_the_hub(lambda api: [branch.name for branch in api.list_repo_refs(repository).branches])
        return list(_cached(repository)) if names is None else names


def _of_the_hub(ask: Callable[[Any], list[str]]) -> list[str] | None:
    """What the hub says; None where it cannot be reached. ask: a request, given the client."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask(HfApi())
    except HfHubHTTPError:
        raise  # it has answered
    except Exception:  # of whichever library the client uses
        return None


def _cached(repository: str) -> dict[str, Path]:
    """The folders of a repository's revisions in the hub's cache, by branch and by commit.

    Raises:
        OSError: There are none.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        held = [repo for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_id == repository]
    except CacheNotFound:
        held = []
    if not held:
        raise OSError("it cannot be reached, and nothing of this was fetched before")
    commits = {revision.commit_hash: revision.snapshot_path for repo in held for revision in repo.revisions}
    return {name: revision.snapshot_path for repo in held for name, revision in repo.refs.items()} | commits


def _chosen(files: Sequence[str]) -> list[str]:
    """The files that a checkpoint is made of: no second copy of the weights in another form."""
    has_safetensors = any(fnmatch(PurePosixPath(name).name, "*model*.safetensors") for name in files)
    patterns = WANTED if has_safetensors else (*WANTED, *WEIGHTS_OF_TORCH)
    return [name for name in files if any(fnmatch(name, pattern) or fnmatch(PurePosixPath(name).name, pattern)
                                          for pattern in patterns)]  # fmt: skip


@contextmanager
def _telling_of_the_hub(repository: str) -> Iterator[None]:
    """Turns what the hub's client raises into an error of the checkpoints."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of the connection, the name, the server: the client's own kinds, and its libraries'
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"the hub does not give {repository} ({told[0][:200]}): check the name and the connection, or open a "
            "folder that it was fetched to"
        ) from None
