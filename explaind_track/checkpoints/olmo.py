"""Folders of OLMo's own trainer: `model.safetensors` and `optim.safetensors`, whose names are encoded."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.model_files import SafeTensors, read_model
from explaind_track.checkpoints.optimizer_state import SavedOptimizer
from explaind_track.checkpoints.restricted_pickle import read_plain
from explaind_track.checkpoints.state_dict import optimizer_class
from explaind_track.checkpoints.step_number import require_step
from explaind_track.core.modules import parameters_of
from explaind_track.errors import CheckpointError

MODEL, OPTIMIZER = "model.safetensors", "optim.safetensors"
LAST_RATE = (
    "OLMo sets the rate at the beginning of a step: the file has that of the step before, a step of the schedule away "
    "from the next. To be exact, pass settings={'lr': …} to CheckpointSeries.open"
)


class OlmoCheckpoint(Checkpoint):
    """An unsharded checkpoint of OLMo's trainer; for OLMo's modules, or for those of transformers."""

    format = "OLMo"

    @classmethod
    def find(cls, path: Path, step: int | None = None) -> Sequence[Self]:
        return (cls(path, require_step(path, step)),) if (path / OPTIMIZER).is_file() else ()

    def weights(self) -> Mapping[str, Tensor]:
        if not (self.path / MODEL).is_file():
            return read_model(self.path)
        tensors = SafeTensors.of_file(self.path / MODEL)
        keys = _decoded(tensors, self.path / MODEL)
        return tensors if keys is None else {".".join(map(str, key)): tensors[name] for name, (key, _) in keys.items()}

    def weights_for(self, model: nn.Module) -> Mapping[str, Tensor]:
        return _for_transformers(self.weights(), model)

    def saved_optimizer(self, model: nn.Module) -> SavedOptimizer | None:
        file = self.path / OPTIMIZER
        tensors = SafeTensors.of_file(file)
        keys = _decoded(tensors, file)
        if keys is None:
            raise CheckpointError(f"{file} is not OLMo's: its names are not encoded as OLMo's trainer encodes them")

        groups: Any = None
        by_kind: dict[str, dict[str, Tensor]] = {}
        for name, (key, is_pickled) in keys.items():
            if key == ("param_groups",) and is_pickled:
                groups = read_plain(tensors[name].numpy().tobytes(), file, {})
            elif len(key) == 3 and key[0] == "state":
                by_kind.setdefault(str(key[2]), {})[str(key[1])] = tensors[name]
        if not isinstance(groups, list) or "exp_avg" not in by_kind:
            raise CheckpointError(f"{file} is not OLMo's: it holds no state and settings of an optimizer")
        return _saved(groups, by_kind, model, file)


def _saved(
    groups: list[dict[str, Any]], by_kind: dict[str, dict[str, Tensor]], model: nn.Module, file: Path
) -> SavedOptimizer:
    """The optimizer, by the names of the model."""
    counts = by_kind.pop("step", {})
    names = {name: [target for target, _ in _pieces(name, value, model)] for name, value in by_kind["exp_avg"].items()}
    state: dict[str, dict[str, Any]] = {}
    for kind, tensors in by_kind.items():
        for name, value in _for_transformers(tensors, model).items():
            state.setdefault(name, {})[kind] = value
    for name, count in counts.items():
        for target in names.get(name, ()):
            state[target]["step"] = count.reshape(()).clone()  # the pieces of a tensor count for themselves

    plain = [
        {**{key: value for key, value in group.items() if key != "param_names"},
         "params": [target for name in group["params"] for target in names.get(name, [name])]}
        for group in groups
    ]  # fmt: skip
    kept = [group for group in plain if group["params"]]
    return SavedOptimizer(optimizer_class(kept, state, file), kept, state, [LAST_RATE], replaceable=("lr",))


def _decoded(names: Mapping[str, Any], file: Path) -> dict[str, tuple[tuple[Any, ...], bool]] | None:
    """What OLMo's trainer has encoded in each name: the path in its dictionary, and whether the value is pickled. None
    where the names are plain."""
    found: dict[str, tuple[tuple[Any, ...], bool]] = {}
    for name in names:
        try:
            content = base64.b64decode(name, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        if not content.startswith(b"\x80"):
            return None
        key, is_pickled = read_plain(content, file, {})
        found[name] = (tuple(key), bool(is_pickled))
    return found


# ------------------------------------------------------------------------------------------- the names of transformers

LAYER = re.compile(r"(?:transformer\.)?blocks\.(\d+)\.(.+)\.weight$")
OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
WITHIN = {
    "att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "attn_out": ("self_attn.o_proj",),
    "ff_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "ff_out": ("mlp.down_proj",),
    "attn_norm": ("post_attention_layernorm",),
    "ff_norm": ("post_feedforward_layernorm",),
}
"""The modules of transformers that each of OLMo's became; those of fused ones, in the order of their rows."""


def _for_transformers(tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """OLMo's tensors by the names of transformers, where these are the model's; fused ones in their pieces."""
    return {target: value for name in tensors for target, value in _pieces(name, tensors[name], model)}


def _pieces(name: str, value: Tensor, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = parameters_of(model)
    targets = [] if name in parameters else [f"{target}.weight" for target in _targets(name)]
    if not targets or not all(target in parameters for target in targets):
        yield name, value
        return
    rows = [parameters[target].shape[0] for target in targets]
    if value.ndim == 0 or sum(rows) != value.shape[0]:
        yield from ((target, value) for target in targets)  # of another shape, which is told where they are fitted
        return
    yield from zip(targets, value.split(rows), strict=True)


def _targets(name: str) -> Sequence[str]:
    layer = LAYER.match(name)
    if layer is not None:
        return [f"model.layers.{layer[1]}.{target}" for target in WITHIN.get(layer[2], ())]
    plain = name.removeprefix("transformer.").removesuffix(".weight")
    return [OUTSIDE[plain]] if plain in OUTSIDE else []
