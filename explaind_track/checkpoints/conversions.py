"""Models of transformers whose files have other names than their modules: GPT-NeoX's head, mixtures of experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from explaind_track.core.modules import parameters_of, without_wrapper

CONFIG = "config.json"


def in_the_models_names(weights: Mapping[str, Tensor], model: nn.Module, path: Path) -> Mapping[str, Tensor]:
    """The weights as transformers' own reader converts them, where their names are not the model's already.

    Args:
        weights: Of the files, by their names there.
        model: Of transformers, or not; then they stay what they are.
        path: The folder, with the model's description.
    """
    plain: Any = without_wrapper(model)
    is_converted = callable(getattr(plain, "from_pretrained", None)) and (path / CONFIG).is_file()
    if not is_converted or all(name in weights for name in parameters_of(model)):
        return weights
    try:
        read, info = type(plain).from_pretrained(
            path, config=plain.config, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError):
        return weights  # compared with the model by their own names, so that what differs is told
    is_whole = not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return {name: value.detach() for name, value in read.state_dict().items()} if is_whole else weights
