"""What every recipe needs: its configuration, and a directory for its results."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def configure(recipe: str, arguments: list[str]) -> DictConfig:
    """`recipes/<recipe>.yaml` with `key=value` arguments over it; exits with a message for a key it does not have.

    The file may stand on another one (`base: images`), and name settings under `presets`, which `preset=smoke` puts
    over the defaults and under the other arguments.
    """
    config, presets = _defaults(recipe)
    OmegaConf.set_struct(config, True)
    chosen = [argument.removeprefix("preset=") for argument in arguments if argument.startswith("preset=")]
    try:
        for name in chosen:
            if name not in presets:
                raise ValueError(f"there is no preset '{name}', only {', '.join(presets) or 'the default'}")
            for preset in presets[name]:
                config.merge_with(preset)
        config.merge_with_dotlist([argument for argument in arguments if not argument.startswith("preset=")])
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"{reason}\nusage: python -m recipes.{recipe} [preset={'|'.join(presets)}] [key=value …] with keys of\n"
            f"{OmegaConf.to_yaml(config)}"
        )
    return config


def _defaults(recipe: str) -> tuple[DictConfig, dict[str, list[Any]]]:
    """The file's values over its base's, and the presets of both."""
    config = OmegaConf.load(Path(__file__).with_name(f"{recipe}.yaml"))
    assert isinstance(config, DictConfig)  # a mapping at the top
    own, base = config.pop("presets", {}), config.pop("base", None)
    presets: dict[str, list[Any]] = {}
    if base is not None:
        below, presets = _defaults(base)
        below.merge_with(config)
        config = below
    for name, preset in own.items():
        presets.setdefault(str(name), []).append(preset)
    return config, presets


def output_directory(given: str | None, recipe: str) -> Path:
    """The directory for a run's results, new or empty; exits with a message if it holds anything."""
    if given is None:
        stem = f"runs/{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        candidates = (Path(stem if not number else f"{stem}-{number}") for number in range(1000))
        out = next(path for path in candidates if not path.exists())
    else:
        out = Path(given)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            sys.exit(f"out={out} holds a run already; name a new directory, or remove that one first")
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_figures(directory: Path, figures: Mapping[str, "Figure"]) -> None:
    """Writes each figure as PNG into a new directory."""
    directory.mkdir()
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png", dpi=130)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text in columns; numbers with four digits, None as a dash."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
        return "–" if value is None else str(value)

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)
