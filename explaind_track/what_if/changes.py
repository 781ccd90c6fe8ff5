"""What is done otherwise in a rerun: samples left out or weighted, parameters frozen or transplanted, parts of steps
switched off, other settings; and the class to derive more of these from."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from explaind_track.core.checks import require_known, require_mapping, require_number, require_one_of, words
from explaind_track.core.step import Batch, Step, number_of_id
from explaind_track.core.tensors import Tensors
from explaind_track.explanation.step_source import Window

Shapes = Mapping[str, tuple[int, ...]]

Samples = Iterable[int] | Iterable[str]
"""Training indices, or the words that the loop has named its samples by."""


@dataclass(frozen=True)
class Change:
    """A thing done otherwise in a rerun, in the steps of a window. Derive from it for one of your own.

    What a derived class does not override stays as it was in the run. Changes compose: each sees what those before it
    in the list have made.

    Example:
        >>> from dataclasses import dataclass
        >>> from explaind_track.what_if import Change
        >>> @dataclass(frozen=True)
        ... class Clamped(Change):
        ...     limit: float
        ...     def begin(self, number, parameters):
        ...         for parameter in parameters.values():
        ...             parameter.clamp_(-self.limit, self.limit)
        >>> Clamped(0.1, window=(100, 200)).acts(100, ())
        True
    """

    window: Window | None = field(default=None, kw_only=True)
    """`(first, last)`: the steps first ≤ s < last in which it is done; None: all."""

    def acts(self, number: int, batches: Sequence[Batch]) -> bool:
        """Whether it changes step `number`, of these batches."""
        return self.window is None or self.window[0] <= number < self.window[1]

    def check(self, shapes: Shapes, seen: Collection[int]) -> None:
        """Refuses what cannot be done, before any work.

        Args:
            shapes: Of the model's parameters, by name.
            seen: The training samples of all steps.

        Raises:
            ValueError: For parameters and samples that there are not.
        """

    def begin(self, number: int, parameters: Tensors) -> None:
        """Changes the parameters in place, before the forward pass of step `number`.

        Args:
            number: The step's.
            parameters: The model's, by name.
        """

    def factors(self, batch: Batch) -> Tensor | None:
        """What the samples' weights in the loss are multiplied by.

        Args:
            batch: A batch of N samples.

        Returns:
            (N,), or None where all stay as they were.
        """
        return None

    def gradients(self, number: int, gradients: dict[str, Tensor]) -> None:
        """Changes the step's gradient, as the optimizer will see it; a parameter that is taken out does not move.

        Args:
            number: The step's.
            gradients: By parameter; to be changed in place.
        """

    def settings(self, name: str, settings: dict[str, Any]) -> None:
        """Changes the optimizer's settings of the parameter `name`: a copy of its group, to be changed in place."""

    def end(self, step: Step, parameters: Tensors) -> None:
        """Changes the parameters in place, behind the optimizer's step.

        Args:
            step: What the optimizer did.
            parameters: The model's, by name.
        """


@dataclass(frozen=True)
class Reweighted(Change):
    """Samples whose losses count for more or less, or not at all, wherever they are seen.

    `L = Σ_k w_k c_k L_k` with the factors c_k; the other samples' weights stay as they were. In batch norm, a sample
    of weight 0 is still one of its batch.

    Example:
        >>> from explaind_track.what_if import Reweighted
        >>> twice, left_out = Reweighted({7: 2.0}), Reweighted.without([1, 5])
        >>> left_out.weights
        {1: 0.0, 5: 0.0}
    """

    weights: Mapping[Any, float]
    """Each sample's factor."""

    @classmethod
    def without(cls, samples: Samples, window: Window | None = None) -> "Reweighted":
        """Leaves samples out.

        Args:
            samples: Their indices, or their names.
            window: The steps in which they are.
        """
        return cls(dict.fromkeys(_listed(samples), 0.0), window=window)

    def check(self, shapes: Shapes, seen: Collection[int]) -> None:
        require_mapping_of_numbers("weights of samples", self.weights)
        lacking = [sample for sample in self.weights if _number(sample) not in seen]
        if lacking:
            raise ValueError(f"no step saw the samples {lacking[:10]}, so they cannot be weighted otherwise")

    def acts(self, number: int, batches: Sequence[Batch]) -> bool:
        return super().acts(number, batches) and any(self.factors(batch) is not None for batch in batches)

    def factors(self, batch: Batch) -> Tensor | None:
        if batch.index is None:  # nobody knows its samples
            return None
        known = {_number(sample): float(factor) for sample, factor in self.weights.items()}
        found = torch.tensor([known.get(index, 1.0) for index in batch.index.tolist()], dtype=torch.float64)
        return None if bool((found == 1).all()) else found


@dataclass(frozen=True)
class Frozen(Change):
    """Parameters that do not move, and whose optimizer states stay as they are.

    Example:
        >>> from explaind_track.what_if import Frozen
        >>> Frozen("decoder.*", window=(0, 50))
        Frozen(window=(0, 50), parameters='decoder.*')
    """

    parameters: str | Sequence[str] = "*"
    """Names, or patterns in which `*` stands for anything."""

    def check(self, shapes: Shapes, seen: Collection[int]) -> None:
        _require_match(self.parameters, shapes)

    def gradients(self, number: int, gradients: dict[str, Tensor]) -> None:
        for name in [name for name in gradients if _matches(self.parameters, name)]:
            del gradients[name]


@dataclass(frozen=True)
class SwitchedOff(Change):
    """One part of the steps of some parameters is not done.

    Without the kernel part, the optimizer takes its step, and what it did but for weight decay is undone: its momenta
    go on as they would. Without regularization, weight decay is 0.

    Example:
        >>> from explaind_track.what_if import SwitchedOff
        >>> SwitchedOff("regularization", "decoder.*", window=(500, 600)).part
        'regularization'
    """

    part: Literal["kernel", "regularization"]
    parameters: str | Sequence[str] = "*"
    """Names, or patterns in which `*` stands for anything."""

    def check(self, shapes: Shapes, seen: Collection[int]) -> None:
        require_one_of("the part that is switched off", self.part, ("kernel", "regularization"))
        _require_match(self.parameters, shapes)

    def settings(self, name: str, settings: dict[str, Any]) -> None:
        if self.part == "regularization" and _matches(self.parameters, name):
            settings["weight_decay"] = 0.0

    def end(self, step: Step, parameters: Tensors) -> None:
        if self.part != "kernel":
            return
        for name, update in step.updates.items():
            if _matches(self.parameters, name):
                # θ_s − r_s, less whatever else is not the samples'
                others = [update.contribution(part) for part in update.contributions if part != "regularization"]
                parameters[name].copy_(update.before - update.regularization() - sum(others))


@dataclass(frozen=True)
class Settings(Change):
    """Other settings of the optimizer: rates, decays, momenta.

    Example:
        >>> from explaind_track.what_if import Settings
        >>> half_as_fast = Settings(times={"lr": 0.5}, window=(0, 100))
        >>> no_decay = Settings({"weight_decay": 0.0}, parameters="*.bias")
    """

    values: Mapping[str, float] = field(default_factory=dict)
    """What a setting is, by its name in `optimizer.param_groups`."""
    times: Mapping[str, float] = field(default_factory=dict)
    """What a setting is multiplied by."""
    parameters: str | Sequence[str] = "*"
    """Names, or patterns in which `*` stands for anything."""

    def check(self, shapes: Shapes, seen: Collection[int]) -> None:
        require_mapping_of_numbers("times=", self.times)
        _require_match(self.parameters, shapes)

    def settings(self, name: str, settings: dict[str, Any]) -> None:
        if not _matches(self.parameters, name):
            return
        for key in (*self.values, *self.times):
            require_known("setting of the optimizer", key, settings)
        settings |= self.values
        for key, factor in self.times.items():
            settings[key] = settings[key] * factor


@dataclass(frozen=True)
class Transplanted(Change):
    """Parameters of another checkpoint are put in at the beginning of step `at`; optimizer states stay as they are.

    Example:
        >>> import torch
        >>> from explaind_track.what_if import Transplanted
        >>> other = torch.nn.Linear(3, 2).state_dict()
        >>> Transplanted(other, at=100, parameters="weight").acts(100, ())
        True
    """

    checkpoint: Tensors
    """By name, as `Trajectory.state_dict` gives it."""
    at: int
    parameters: str | Sequence[str] = "*"
    """Names, or patterns in which `*` stands for anything: those that are put in."""

    def __repr__(self) -> str:
        return f"Transplanted({len(self.checkpoint)} tensors, at={self.at}, parameters={self.parameters!r})"

    def check(self, shapes: Shapes, seen: Collection[int]) -> None:
        _require_match(self.parameters, [name for name in shapes if name in self.checkpoint])
        for name, shape in shapes.items():
            if name in self.checkpoint and _matches(self.parameters, name) and self.checkpoint[name].shape != shape:
                found = tuple(self.checkpoint[name].shape)
                raise ValueError(f"the checkpoint's {name!r} is of shape {found}, not {shape}, so it cannot be put in")

    def acts(self, number: int, batches: Sequence[Batch]) -> bool:
        return number == self.at

    def begin(self, number: int, parameters: Tensors) -> None:
        for name, parameter in parameters.items():
            if name in self.checkpoint and _matches(self.parameters, name):
                parameter.copy_(self.checkpoint[name])


def require_mapping_of_numbers(name: str, values: Any) -> None:
    """Finite numbers, by anything."""
    if not isinstance(values, Mapping):
        require_mapping(name, values, "{7: 0.5}")
    for key, value in values.items():
        require_number(f"{name}: that of {key!r}", value)


def _listed(samples: Any) -> list[Any]:
    named = words("samples", samples)
    if named is not None:
        return list(named)
    return samples.tolist() if hasattr(samples, "tolist") else list(samples)


def _number(sample: Any) -> int:
    """The index that stands for a sample."""
    return number_of_id(sample) if isinstance(sample, str) else int(sample)


def _patterns(parameters: str | Sequence[str]) -> Sequence[str]:
    return (parameters,) if isinstance(parameters, str) else parameters


def _matches(parameters: str | Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _patterns(parameters))


def _require_match(parameters: str | Sequence[str], names: Collection[str]) -> None:
    for pattern in _patterns(parameters):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter is called {pattern!r}; there are: {', '.join(names)}")
