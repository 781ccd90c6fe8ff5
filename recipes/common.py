"""What every recipe needs: its configuration, and a directory for its results."""

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def configure(recipe: str, arguments: list[str]) -> DictConfig:
    """`recipes/<recipe>.yaml` with `key=value` arguments over it; exits with a message for a key it does not have."""
    config = OmegaConf.load(Path(__file__).with_name(f"{recipe}.yaml"))
    assert isinstance(config, DictConfig)  # a mapping at the top
    OmegaConf.set_struct(config, True)
    try:
        config.merge_with_dotlist(arguments)
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"{reason}\nusage: python -m recipes.{recipe} [key=value …] with keys of\n{OmegaConf.to_yaml(config)}")
    return config


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
