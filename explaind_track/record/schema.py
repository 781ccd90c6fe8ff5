"""The schema of a trajectory's files: every tensor's name and every JSON entry, its encoding beside its decoding.

keyframes/00000100.safetensors    the run behind step 99 (`Keyframe`)

    parameter:NAME                θ_s, as that step has left it
    buffer:NAME                   the model's buffers
    state:KEY:NAME                the optimizer's state, such as its second moments
    share:PART:NAME               what a part other than the kernel has of the momentum buffer
    outside:STEP:…                as in a segment; STEP is that of the keyframe
    random:DEVICE                 the random generators, where the run could be taken up
    header                        state: of the optimizer's state, by parameter, what is no tensor
                                  settings: the optimizer's groups; continues: see `Keyframe.continues`

steps/00000100.safetensors        the steps from 100 on (`Segment`)

    outside:STEP:parameter:NAME   changed by something other than the optimizer since the step before: as it was right
    outside:STEP:buffer:NAME      before the optimizer's step; behind the last step, where the run could be taken up
    gradient:STEP:NAME            as the optimizer used it
    auxiliary:STEP:LOSS:NAME      the gradient of an auxiliary loss, which that of the optimizer contains
    buffer:STEP:NAME              the model's buffers after the step, if it moved them
    batch:STEP:PLACE:NUMBER       the tensors of a batch that had no index, counted from 1
    batch:STEP:PLACE:random:DEVICE    the random generators before the batch's forward pass
    index:HASH, weight:HASH       of batches: once, in the first segment that uses them; again where that is long ago
    ids:HASH                      the samples' names, where these are words: a list in JSON; likewise once
    random:DEVICE                 the random generators, where the run could be taken up
    header                        steps: an entry for each step, with its settings, its auxiliary losses, its batches,
                                  and the hash of gradients that are not kept
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind_track.core.modules import buffers_of, parameters_of, plain_name, without_wrapper
from explaind_track.core.observer import StepObserver
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import Tensors
from explaind_track.errors import TrajectoryError
from explaind_track.record.batch_json import Fields, altered_of, refuse_other_size, words_of
from explaind_track.record.files import TensorFile, tensors_sha256
from explaind_track.record.signatures import environment, refuse_other_generators, signature
from explaind_track.record.validation import (
    BatchEntry,
    HashedGradients,
    KeyframeHeader,
    SegmentHeader,
    StepEntry,
    checked,
)

FORMAT = "explaind_track trajectory 2"

Settings = list[dict[str, Any]]
"""An optimizer's groups as JSON has them: numbers and words, and the names of the group's parameters as `params`."""


def qualified(cls: type) -> str:
    """A class by the module that defines it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def head_of(model: nn.Module, observer: StepObserver) -> dict[str, Any]:
    """The head of a manifest: all that it says of the run as a whole."""
    buffers = buffers_of(model)
    everything = parameters_of(model, aliases=True)
    names = {id(parameter): name for name, parameter in observer.parameters.items()}

    # tied parameters are recorded once: `aliases` leads from their other names to the first
    aliases = {name: names[id(p)] for name, p in everything.items() if name not in observer.parameters}
    return {
        "format": FORMAT,
        "model": qualified(type(without_wrapper(model))),
        "optimizer": qualified(type(observer.optimizer)),
        "parameters": signature(observer.parameters),
        "buffers": signature(buffers),
        "aliases": aliases,
        "saved": [name for name in map(plain_name, model.state_dict()) if name in everything or name in buffers],
        "packages": {"torch": str(torch.__version__), "explaind_track": version("explaind_track")},
        "environment": environment(),
    }


def settings_of(observer: StepObserver) -> Settings:
    """The settings that the optimizer has now."""
    names = {id(parameter): name for name, parameter in observer.parameters.items()}
    return [
        {
            **{key: _number(value) for key, value in group.items() if key != "params"},
            "params": [names[id(parameter)] for parameter in group["params"]],
        }
        for group in observer.optimizer.param_groups
    ]


def _number(setting: Any) -> Any:
    """A setting as JSON has it: a learning rate may be a tensor, or a number of NumPy's."""
    if isinstance(setting, tuple | list):
        return type(setting)(_number(one) for one in setting)
    return setting.item() if isinstance(setting, Tensor | np.generic | np.ndarray) else setting


def groups_of(settings: Settings, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The groups that an optimizer is made of, from its settings."""
    return [
        {
            **{key: tuple(value) if isinstance(value, list) else value for key, value in group.items()},
            "params": [parameters[name] for name in group["params"]],
        }
        for group in settings
    ]


def model_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of the model, by their names in a keyframe."""
    tensors = {f"parameter:{name}": value.detach() for name, value in state.parameters.items()}
    return tensors | {f"buffer:{name}": value for name, value in state.buffers.items()}


def checkpoint_tensors(observer: StepObserver, state: State) -> dict[str, Tensor]:
    """The tensors of the model in this state, and of the optimizer, by their names in a keyframe."""
    tensors = model_tensors(state)
    for name, parameter in observer.parameters.items():
        for key, value in observer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"state:{key}:{name}"] = value
    return tensors


def share_tensors(observer: StepObserver) -> dict[str, Tensor]:
    """The shares of the momentum buffers that belong to parts other than the kernel, by their names in a keyframe."""
    shares = observer.momentum_shares.items()
    return {f"share:{part}:{name}": value for part, held in shares for name, value in held.items()}


def outside_tensors(number: int, changed: State) -> dict[str, Tensor]:
    """What was changed from outside before step `number`, by its names in a file."""
    tensors = {f"outside:{number}:parameter:{name}": value for name, value in changed.parameters.items()}
    return tensors | {f"outside:{number}:buffer:{name}": value for name, value in changed.buffers.items()}


def outside_in(file: TensorFile, number: int) -> State:
    """What was changed from outside before step `number`, as far as the file tells."""
    return State(file.prefixed(f"outside:{number}:parameter:"), file.prefixed(f"outside:{number}:buffer:"))


def random_tensors(state: Tensors) -> dict[str, Tensor]:
    """The state of the random generators, by its names in a file."""
    return {f"random:{device}": value for device, value in state.items()}


def random_state_in(file: TensorFile) -> Tensors:
    """The state of the random generators that a file holds, by device. Raises TrajectoryError for anything else."""
    state = file.prefixed("random:")
    refuse_other_generators(state)
    return state


def keyframe_header(observer: StepObserver, continues: bool) -> dict[str, Any]:
    """The header of a keyframe: what it holds beside its tensors."""
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in observer.parameters.items():
        for key, value in observer.optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                plain.setdefault(name, {})[key] = value
    return {"state": plain, "settings": settings_of(observer), "continues": continues}


class Keyframe:
    """A full checkpoint, read from its file, each tensor when it is asked for."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._header: KeyframeHeader = checked(file.header, KeyframeHeader, file.path)
        self.parameters = file.prefixed("parameter:")
        self.buffers = file.prefixed("buffer:")
        self.settings: Settings = self._header.settings
        self.continues: bool = self._header.continues
        """Whether it follows from the steps before it by the optimizer alone, so that it can prove their replay. One
        that does not holds another optimizer's state; or, in older records, what the model was changed to since."""

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter."""
        state: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in self._header.state.items()}
        for key, tensors in _by_first_word(self._file.prefixed("state:")).items():
            for name, value in tensors.items():
                state.setdefault(name, {})[key] = value
        return state

    def shares(self) -> dict[str, dict[str, Tensor]]:
        """The shares of the momentum buffers by part and parameter."""
        return _by_first_word(self._file.prefixed("share:"))

    def state_names(self) -> set[str]:
        """The names of the `checkpoint_tensors` and `share_tensors` that were written."""
        return {name for name in self._file.names if not name.startswith(("random:", "outside:"))}

    def outside(self, number: int) -> State:
        """What was changed from outside before the keyframe's step `number`, where the run could be taken up."""
        return outside_in(self._file, number)

    def __getitem__(self, name: str) -> Tensor:
        return self._file[name]


def _by_first_word(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Tensors called `word:rest`, by word and rest."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        word, rest = name.split(":", 1)
        found.setdefault(word, {})[rest] = value
    return found


@dataclass(frozen=True)
class StepRecord:
    """A step as a segment holds it."""

    settings: Settings
    outside: State
    """What something other than the optimizer has changed since the step before, as it was when this one began."""
    gradients: Tensors
    """By parameter, as the optimizer used them; a parameter that had none is left out."""
    auxiliary: Mapping[str, Tensors]
    """By auxiliary loss and parameter, the gradients that went into these."""
    buffers: Tensors
    """The model's after the step, if it moved them; none otherwise."""
    batches: tuple[Batch, ...]
    frozen: tuple[str, ...] = ()
    """The parameters that learned nothing, with gradients that are kept zeros."""
    hashed: HashedGradients | None = None
    """Of a step whose gradients were not kept, and are to be computed again."""

    @property
    def moved(self) -> tuple[str, ...]:
        """The parameters that had a gradient."""
        return tuple(self.gradients) if self.hashed is None else self.hashed.names

    def without_gradients(self) -> "StepRecord":
        """The record with a hash in the place of the gradients; with copies of them where the step's batches do not
        tell how to compute them again."""
        told = [batch for batch in self.batches if not batch.clipped or batch.altered is not None]
        unknown = any(one.kind == "other" for batch in told if batch.altered for one in batch.altered.changes)
        if not self.batches or len(told) < len(self.batches) or unknown:
            return replace(self, gradients={name: value.clone() for name, value in self.gradients.items()})
        hashed = HashedGradients(tuple(self.gradients), tensors_sha256(self.gradients))
        return replace(self, gradients={}, auxiliary={loss: {} for loss in self.auxiliary}, hashed=hashed)


class Segment:
    """A segment opened for reading."""

    def __init__(self, file: TensorFile, first: int, last: int, find: Callable[[str], Tensor]) -> None:
        """First ≤ s < last: its steps. find: gives an index or weights by their name, which this segment or an earlier
        one holds. Raises TrajectoryError if other steps are in the file."""
        self._file, self._first, self._find = file, first, find
        header: SegmentHeader = checked(file.header, SegmentHeader, file.path)
        self._steps = header.steps
        if len(self._steps) != last - first:
            raise TrajectoryError(f"{file.path} has {len(self._steps)} steps, where its manifest says {last - first}")

    def records(self, first: int, last: int) -> Iterator[StepRecord]:
        """Steps first ≤ s < last, as far as they are in this segment."""
        settings: Any = None
        for number, entry in enumerate(self._steps[: max(0, last - self._first)], self._first):
            settings = entry.settings or settings  # those of the step before, if not written again
            if number >= first:
                yield self._record(number, entry, settings)

    def _record(self, number: int, entry: StepEntry, settings: Settings) -> StepRecord:
        gradients, buffers = (self._file.prefixed(f"{kind}:{number}:") for kind in ("gradient", "buffer"))
        auxiliary = {loss: self._file.prefixed(f"auxiliary:{number}:{loss}:") for loss in entry.auxiliary}
        frozen, hashed = tuple(entry.frozen), entry.hashed
        batches, outside = self.batches(number), self.outside(number)
        return StepRecord(settings, outside, gradients, auxiliary, buffers, batches, frozen, hashed)

    def outside(self, number: int) -> State:
        """What was changed from outside before a step; before the one behind the segment's last, where the run could be
        taken up."""
        return outside_in(self._file, number)

    def changed_from_outside(self) -> set[int]:
        """The steps before which parameters were changed from outside."""
        return {int(name.split(":")[0]) for name in self._file.prefixed("outside:") if ":parameter:" in name}

    def batches(self, number: int) -> tuple[Batch, ...]:
        """The batches of one step."""
        return tuple(map(self._batch, self._steps[number - self._first].batches))

    def _batch(self, entry: BatchEntry) -> Batch:
        weight, index = map(self._named, (entry.weight, entry.index))
        ids = None if entry.ids is None else words_of(self._find(entry.ids))
        random = {device: self._file[name] for device, name in entry.random.items()}
        refuse_other_generators(random)
        altered = None if entry.altered is None else altered_of(entry.altered, self._named)
        data = self._data(entry.data)

        weights = (weight, weight if altered is None else altered.loss_weight)
        refuse_other_size(entry.size, weights, index, ids, data, self._file.path)
        return Batch(entry.size, weight, index, data, random, entry.clipped, ids, altered)

    def _named(self, value: Any) -> Any:
        """An index or weights by their name; a number for all samples is there itself."""
        return self._find(value) if isinstance(value, str) else value

    def _data(self, tree: Any) -> Any:
        """The batch itself, with its tensors in their places (JSON has made lists of tuples and of arrays, and
        dictionaries of everything that has names)."""
        if isinstance(tree, dict) and set(tree) == {"tensor"} and isinstance(tree["tensor"], str):
            return self._file[tree["tensor"]]
        if isinstance(tree, dict):
            return Fields({key: self._data(item) for key, item in tree.items()})
        return tuple(map(self._data, tree)) if isinstance(tree, list) else tree

    def before(self, stop: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the segment without the steps from `stop` on."""
        kinds = ("outside", "gradient", "auxiliary", "buffer", "batch")
        late = range(stop, self._first + len(self._steps) + 1)
        dropped = tuple(f"{kind}:{number}:" for kind in kinds for number in late)
        tensors = {name: self._file[name] for name in self._file.names if not name.startswith(dropped)}
        return tensors, {"steps": self._file.header["steps"][: stop - self._first]}
