"""What the parameters of transformers are, by the names that their modules have: their type, and their depth.

For the architectures of the package transformers (Llama, Mistral, Qwen, OLMo, Gemma, Phi, GPT-2, GPT-J, NeoX, OPT,
BLOOM, Falcon, BERT and its kin, T5, BART, ViT …), and for models that name their modules alike. The order of `TYPES`
counts: a norm in a head is the head's.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

EMBEDDING, NORM, HEAD, TIED = "embedding", "norm", "head", "embedding+head"
"""Types that are no layer's. `TIED` is one parameter that embeds tokens and makes the logits."""


class Place(NamedTuple):
    """Where in a transformer a parameter lies."""

    type: str
    stack: str
    """The module that its layers lie in; empty outside of the layers."""
    depth: int | None
    """The number of its layer; None outside of the layers."""


def _module(*names: str) -> str:
    """A pattern for a module, or a tensor of one, that has one of these names."""
    return rf"(?:^|\.)(?:{'|'.join(names)})(?=\.|$)"


_ATTENTION = r"(?:^|\.)\w*(?:attn|[aA]ttention)(?:\.(?:self|attention|output))*\.(?:{})(?=\.|$)"
_CROSS = r"(?:^|\.)(?:EncDecAttention|encoder_attn|crossattention|cross_attn)(?:\.(?:self|output))*\.(?:{})(?=\.|$)"
_LAYER = r"\.\d+\.(?:.*\.)?(?:{})(?=\.|$)"

_PROJECTIONS = {
    "q": r"q|q_proj|query|query_proj|q_lin|q_attn|wq|q_[ab]_proj",
    "k": r"k|k_proj|key|key_proj|k_lin|wk",
    "v": r"v|v_proj|value|value_proj|v_lin|wv",
    "kv": r"kv_a_proj_with_mqa|kv_b_proj|kv_proj",
    "qkv": r"c_attn|query_key_value|qkv_proj|qkv|Wqkv|in_proj|in_proj_weight|in_proj_bias",
    "o": r"o|o_proj|out_proj|out_lin|dense|c_proj|wo|Wo",
    "position": r"relative_attention_bias|pos_key_proj|pos_query_proj|sinks",
}
_MLP = {
    "router": r"gate|router|shared_expert_gate",
    "gate": r"gate_proj|wi_0|experts\.\d+\.w1",
    "up": r"up_proj|c_fc|dense_h_to_4h|wi|wi_1|intermediate\.dense|fc1|fc_in|lin1|linear1|ffn\.(?:weight|bias)|"
    r"experts\.\d+\.w3",
    "gate_up": r"gate_up_proj|Wi",
    "down": r"down_proj|c_proj|dense_4h_to_h|wo|Wo|output\.dense|fc2|fc_out|lin2|linear2|ffn_output|experts\.\d+\.w2",
}
_HEAD = (
    "lm_head", "embed_out", "score", "classifier", "qa_outputs", "classification_head", "pooler", "cls", "predictions",
    "generator_predictions", "generator_lm_head", r"vocab_\w+", "project_out", r"^head", r"^decoder\.(?:weight|bias)",
)  # fmt: skip

TYPES: Mapping[str, re.Pattern[str]] = {
    HEAD: re.compile(_module(*_HEAD)),
    NORM: re.compile(_module(r"\w*[nN]orm\w*", r"ln_\w+", r"ln\d?")),
    **{f"cross_attention.{name}": re.compile(_CROSS.format(found)) for name, found in _PROJECTIONS.items()},
    **{f"attention.{name}": re.compile(_ATTENTION.format(found)) for name, found in _PROJECTIONS.items()},
    EMBEDDING: re.compile(
        _module("wte", "wpe", "shared", r"embed(?:_\w+)?", r"(?:\w+_)?embeddings?(?:_\w+)?", "project_in")
    ),
    **{f"mlp.{name}": re.compile(_LAYER.format(found)) for name, found in _MLP.items()},
}
"""A pattern for each type; the first that is found in a parameter's name tells its type."""

SHOWN = (EMBEDDING, TIED, *sorted((name for name in TYPES if "." in name), key=lambda name: name[0]), NORM, HEAD)
"""The types in the order in which a model passes through them."""

STACK = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h|albert_layer_groups)\.(\d+)\.")
"""The first number in a name that is a layer's."""


def place_of(names: Collection[str]) -> Place | None:
    """Where a parameter lies; None if its names are none that transformers have.

    Args:
        names: Its name; of a tied parameter, all of them.
    """
    types = {_type(name) for name in names}
    if None in types:
        return None
    name = next(iter(names))
    numbered = STACK.search(name)
    found = TIED if types == {EMBEDDING, HEAD} else str(_type(name))
    return Place(found, "", None) if numbered is None else Place(found, name[: numbered.start()], int(numbered[1]))


def _type(name: str) -> str | None:
    return next((kind for kind, pattern in TYPES.items() if pattern.search(name)), None)


def by_type(places: Mapping[str, Place]) -> dict[str, tuple[str, ...]]:
    """The parameters of each type, in the order of `SHOWN`."""
    return _grouped(((place.type, name) for name, place in places.items()), SHOWN)


def by_layer(places: Mapping[str, Place]) -> dict[str, tuple[str, ...]]:
    """The parameters of each layer by its depth, with what is in none before and behind them.

    Layers are `layer.07`; where there are several stacks of them, by what these are called: `encoder.07`, `decoder.07`.
    A norm among the embeddings is the embedding's.
    """
    numbered = [place for place in places.values() if place.depth is not None]
    stacks = _stack_names(dict.fromkeys(place.stack for place in numbered))
    depths = sorted({place.depth for place in numbered if place.depth is not None})
    width = len(str(depths[-1])) if depths else 1

    def label(name: str, place: Place) -> str:
        if place.depth is not None:
            return f"{stacks[place.stack]}.{place.depth:0{width}}"
        return EMBEDDING if place.type == NORM and TYPES[EMBEDDING].search(name) else place.type

    layers = [f"{stack}.{depth:0{width}}" for stack in stacks.values() for depth in depths]
    before = [kind for kind in SHOWN if kind not in (NORM, HEAD)]
    return _grouped(((label(name, place), name) for name, place in places.items()), [*before, *layers, NORM, HEAD])


def by_layer_and_type(places: Mapping[str, Place]) -> dict[str, tuple[str, ...]]:
    """The parameters of each type in each layer, `layer.07.mlp.up`, with what is in no layer as `by_layer` has it."""
    found: dict[str, tuple[str, ...]] = {}
    for label, names in by_layer(places).items():
        in_layer = {name: places[name] for name in names if places[name].depth is not None}
        types = by_type(in_layer)
        found |= {f"{label}.{kind}": members for kind, members in types.items()} or {label: names}
    return found


CELL = re.compile(rf"(?P<layer>.+\.\d+)\.(?P<type>{'|'.join(re.escape(kind) for kind in SHOWN)})")
"""A group of `by_layer_and_type` that lies in a layer."""


class Cell(NamedTuple):
    """A type in a layer, which is one of the groups of `by_layer_and_type`."""

    layer: str
    type: str


def cells_of(groups: Iterable[str]) -> dict[str, Cell]:
    """The layer and the type of each group of `by_layer_and_type`, by their names; nothing for groups that are others.

    What lies in no layer has its type in the place of one.

    Example:
        >>> from explaind_track.core.architectures import cells_of
        >>> cells_of(["embedding", "layer.0.mlp.up", "layer.1.mlp.up"])["layer.1.mlp.up"]
        Cell(layer='layer.1', type='mlp.up')
        >>> cells_of(["embedding", "body", "head"])
        {}
    """
    names = list(groups)
    matches = {name: CELL.fullmatch(name) for name in names}
    is_known = all(match or name in SHOWN for name, match in matches.items())
    if not is_known or not any(matches.values()):
        return {}
    return {name: Cell(match["layer"], match["type"]) if match else Cell(name, name) for name, match in matches.items()}


def _stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """What each stack of layers is called: `layer` if it is the only one, else by its module, in full if need be."""
    known = list(stacks)
    short = [stack.rsplit(".", 1)[-1] or "layer" for stack in known]
    if len(known) == 1:
        return {known[0]: "layer"}
    return dict(zip(known, short if len(set(short)) == len(short) else known, strict=True))


def _grouped(pairs: Iterable[tuple[str, str]], order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names by their labels, the labels in this order, those without names left out."""
    found: dict[str, list[str]] = {}
    for label, name in pairs:
        found.setdefault(label, []).append(name)
    return {label: tuple(found[label]) for label in order if label in found}
