"""Code that every recipe needs: its configuration, a directory for its results, tables and figures."""

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isnan, nan
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from explaind_track import Trajectory
from recipes.data import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """A model, its data, and the record of its training."""

    model: nn.Module
    data: Split
    trajectory: Trajectory


# ------------------------------------------------------------------ configuration


def configure(recipe: str, arguments: list[str]) -> DictConfig:
    """`recipes/<recipe>.yaml` with `key=value` arguments over it; exits with a message for a key it does not have.

    The file may stand on another one (`base: images`), and name settings under `presets`, which `preset=smoke` puts
    over the defaults and under the other arguments.
    """
    config, presets = _defaults(recipe)
    OmegaConf.set_struct(config, True)  # so that unknown keys are refused
    chosen = [argument.removeprefix("preset=") for argument in arguments if argument.startswith("preset=")]
    settings = [argument for argument in arguments if not argument.startswith("preset=")]
    try:
        for name in chosen:
            if name not in presets:
                raise ValueError(f"there is no preset '{name}', only {', '.join(presets) or 'the default'}")
            for preset in presets[name]:
                config.merge_with(preset)
        config.merge_with_dotlist(settings)
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"{reason}\nusage: python -m recipes.{recipe} [preset={'|'.join(presets)}] [key=value …] with keys of\n"
            f"{OmegaConf.to_yaml(config)}"
        )
    return config


def _defaults(recipe: str) -> tuple[DictConfig, dict[str, list[Any]]]:
    """The file's values over its base's, and the presets of both: the base's first."""
    config = load_config(Path(__file__).with_name(f"{recipe}.yaml"))
    file_presets, base = config.pop("presets", {}), config.pop("base", None)
    presets: dict[str, list[Any]] = {}
    if base is not None:
        below, presets = _defaults(base)
        below.merge_with(config)
        config = below
    for name, preset in file_presets.items():
        presets.setdefault(str(name), []).append(preset)
    return config, presets


def load_config(path: Path) -> DictConfig:
    """A configuration file: a mapping at the top."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


# ------------------------------------------------------------------ results


def output_directory(
    config: DictConfig, recipe: str, resumable: bool = False, may_change: Collection[str] = ()
) -> Path:
    """Makes the directory for a run's results, `config.out` or a fresh one, and writes the configuration into it.

    Exits with a message if the directory holds anything; where a recipe is resumable, anything but a run of the same
    configuration (but for what may change), which is gone on with.
    """
    if config.out is None:
        stem = f"runs/{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        candidates = (Path(stem if not number else f"{stem}-{number}") for number in range(1000))
        out = next(path for path in candidates if not path.exists())
    else:
        out = Path(config.out)
        if resumable and (out / "config.yaml").is_file():
            _require_same(config, load_config(out / "config.yaml"), out, {"out", *may_change})
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            sys.exit(f"out={out} holds a run already; name a new directory, or remove that one first")

    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, out / "config.yaml")
    return out


def _require_same(config: DictConfig, recorded: DictConfig, out: Path, free: Collection[str]) -> None:
    """Exits with the settings that differ from those of the run in `out`."""
    own, theirs = (OmegaConf.to_container(one) for one in (config, recorded))
    assert isinstance(own, dict)
    assert isinstance(theirs, dict)
    other = [f"{key}={theirs.get(key)!s}" for key in map(str, own) if own[key] != theirs.get(key) and key not in free]
    if other:
        sys.exit(
            f"out={out} holds a run with other settings: {', '.join(other)}. Repeat these to go on with it, or name a "
            "new directory"
        )


def measured(action: Callable[[], Result]) -> tuple[Result, float, float]:
    """The action's result, its seconds, and by how many MB the process grew at most meanwhile (nan but on Linux)."""
    status, before = Path("/proc/self/status"), nan
    if status.is_file():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _peak_mb(status)
    started = perf_counter()
    result = action()
    seconds = perf_counter() - started
    return result, seconds, nan if isnan(before) else _peak_mb(status) - before


def _peak_mb(status: Path) -> float:
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(peak) / 1024


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes what a recipe has found, for people too."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def over_seeds(results: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The mean over the seeds of each key's values, under the key, and their standard deviation, under `± key`."""
    summary: dict[str, list[float]] = {}
    for key in results[0]:
        values = np.array([result[key] for result in results])
        summary |= {key: values.mean(0).tolist(), f"± {key}": values.std(0).tolist()}
    return summary


# ------------------------------------------------------------------ figures


def draw_methods(
    methods: Mapping[str, Mapping[str, Any]],
    x: Sequence[float],
    labels: Mapping[str, str],
    x_label: str,
    width: float,
    dashed: str = "",
) -> "Figure":
    """A panel for each key, with a curve for each method: mean and deviation as `over_seeds` gives them.

    Args:
        methods: the values by key, by method.
        x: where the values lie, the same for all.
        labels: the vertical axis of each panel, by the key that it shows.
        x_label: of all panels.
        width: of the figure, in inches.
        dashed: the method whose curve is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots(1, len(labels))
    for name, values in methods.items():
        style = "--" if name == dashed else "-"
        for axis, key in zip(axes, labels, strict=True):
            axis.errorbar(x, values[key], values[f"± {key}"], fmt=style, marker=".", capsize=2, label=name)

    for axis, label in zip(axes, labels.values(), strict=True):
        axis.set_xlabel(x_label)
        axis.set_ylabel(label)
        axis.grid(alpha=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def save_figures(directory: Path, figures: Mapping[str, "Figure"]) -> None:
    """Writes each figure as PNG."""
    directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png", dpi=130)
