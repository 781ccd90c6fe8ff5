"""Groups: named parts of the model's parameters, every parameter in exactly one."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from torch import nn

from explaind_track.core import architectures
from explaind_track.core.checks import first_few, require_int, require_mapping, require_one_of, shown
from explaind_track.core.modules import parameters_of

Groups = Mapping[str, Sequence[str]]
"""The parameters of each group, by the group's name."""

_log = logging.getLogger(__name__)

GroupSpec = int | str | Mapping[str, str | Sequence[str]] | None
"""A caller's groups: a module depth, `"type"`, `"layer"`, `"layer.type"` or `"tensor"`, or for each group a pattern (or
several, or plain parameter names)."""

BY_ARCHITECTURE = ("type", "layer", "layer.type", "tensor")

WRAPPERS = ("module", "_orig_mod", "net", "model")
"""Modules by which DataParallel, `torch.compile` and people wrap a whole model in another."""


def resolve_groups(spec: GroupSpec, parameters: Iterable[str] | nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameters of every group.

    Args:
        spec: None groups by the model's modules, or by those of its only module, and so on down to a level with more
            than one; modules that only wrap the model (`module`, `_orig_mod`, `net`, `model`, and what a model of
            transformers calls its body) are passed by. A depth groups by the first so many parts of the parameters'
            module path, so that `2` puts `attention.encoder.weight` into `attention.encoder`. A mapping gives each
            group's patterns, in which `*` stands for anything: `{"attention": "attention.*", "mlp": ["linear1.*",
            "linear2.*"]}`. `"type"` groups a transformer's parameters by what they are (`embedding`, `attention.q`,
            `mlp.up`, `norm`, `head` …), by the names that the architectures of the package transformers give them;
            `"layer"` by depth (`embedding`, `layer.00`, … `norm`, `head`; of other models by numbered modules, else by
            module); `"layer.type"` by both (`layer.00.attention.q` …), from which panels and reports make a heat map
            and its sums; `"tensor"` each alone.
        parameters: The names of the model's parameters; or the model, whose tied weights are told then: one that
            embeds tokens and makes the logits is of the type `embedding+head`.

    Returns:
        The groups in the order of the mapping, or of their first parameters; each parameter in exactly one.

    Raises:
        ValueError: Parameters are in no group or in two, groups hold none, or `"type"` does not know what some are; all
            of them are named.

    Example:
        >>> from explaind_track import resolve_groups
        >>> names = ["embedding.weight", "blocks.0.weight", "blocks.1.weight"]
        >>> resolve_groups(None, names)
        {'embedding': ('embedding.weight',), 'blocks': ('blocks.0.weight', 'blocks.1.weight')}
        >>> list(resolve_groups(2, names))
        ['embedding', 'blocks.0', 'blocks.1']
        >>> resolve_groups({"first": ["embedding.*", "blocks.0.*"], "last": "blocks.1.*"}, names)["last"]
        ('blocks.1.weight',)
        >>> names = ["wte.weight", "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "ln_f.weight"]
        >>> list(resolve_groups("type", names)), list(resolve_groups("layer", names))
        (['embedding', 'attention.qkv', 'mlp.up', 'norm'], ['embedding', 'layer.0', 'norm'])
    """
    aliases = _aliases(parameters)
    names = list(aliases)
    if isinstance(spec, str):
        return _by_architecture(spec, aliases)
    if spec is None:
        groups = _by_modules(names, _bodies(parameters))
        _log.info("groups= was not given: the groups are %s", ", ".join(groups))
        return groups
    if isinstance(spec, Integral):
        return _by_depth(require_int("groups= (a module depth)", spec, 1), names)

    patterns = _patterns(spec)
    groups_of: dict[str, list[str]] = {
        name: [group for group, given in patterns.items() if any(fnmatchcase(name, pattern) for pattern in given)]
        for name in names
    }
    groups = {group: tuple(name for name in names if group in groups_of[name]) for group in patterns}

    # All complaints at once: who mends patterns one message at a time gets nowhere.
    in_none = [name for name, found in groups_of.items() if not found]
    in_several = [f"{name} ({', '.join(found)})" for name, found in groups_of.items() if len(found) > 1]
    empty = [f"{group} ({', '.join(patterns[group])})" for group, members in groups.items() if not members]
    complaints = [
        f"{what}: {', '.join(which)}"
        for what, which in (
            ("parameters in no group", in_none),
            ("parameters in more than one group", in_several),
            ("groups without parameters", empty),
        )
        if which
    ]
    if complaints:
        raise ValueError(
            f"every parameter belongs in exactly one group. {'; '.join(complaints)}. "
            f"The patterns were {patterns}; the parameters are {', '.join(names)}"
        )
    return groups


def _aliases(parameters: Iterable[str] | nn.Module) -> dict[str, list[str]]:
    """Every parameter's first name, with all of its names."""
    if not isinstance(parameters, nn.Module):
        return {name: [name] for name in parameters}
    first = {id(value): name for name, value in parameters_of(parameters).items()}
    found: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, value in parameters_of(parameters, aliases=True).items():
        found[first[id(value)]].append(name)
    return found


def _by_architecture(spec: str, aliases: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """By what transformers name their modules. aliases: of each parameter."""
    require_one_of("groups= (if not a depth, or patterns such as {'attention': 'attention.*'})", spec, BY_ARCHITECTURE)
    if spec == "tensor":
        return {name: (name,) for name in aliases}

    places = {name: place for name, known in aliases.items() if (place := architectures.place_of(known)) is not None}
    unknown = [name for name in aliases if name not in places]
    if spec == "layer":
        return _by_number(list(aliases)) if unknown else architectures.by_layer(places)
    if unknown:
        raise ValueError(
            f"groups={spec!r} goes by the names that transformers give their modules, and does not know what "
            f"{first_few(unknown, 20)} {'is' if len(unknown) == 1 else 'are'} ({len(places)} of {len(aliases)} "
            "parameters were recognised). Give the groups as patterns, such as {'attention': '*.attn.*', …}, or use "
            "groups='layer' or 'tensor'"
        )
    return architectures.by_layer_and_type(places) if spec == "layer.type" else architectures.by_type(places)


def _patterns(spec: Any) -> dict[str, tuple[str, ...]]:
    """The patterns of each group. Raises TypeError for what is no mapping of patterns."""
    require_mapping("groups=", spec, "{'attention': 'attention.*', 'mlp': ['linear1.*', 'linear2.*']}, or a depth")
    found: dict[str, tuple[str, ...]] = {}
    for group, given in spec.items():
        patterns = [given] if isinstance(given, str) else given
        if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"groups[{group!r}] is a pattern or several, such as 'attention.*', not {shown(given)}")
        found[group] = tuple(patterns)
    return found


def _bodies(parameters: Iterable[str] | nn.Module) -> set[str]:
    """What models of transformers call the module that their heads are put on."""
    modules = parameters.modules() if isinstance(parameters, nn.Module) else ()
    named = (getattr(module, "base_model_prefix", None) for module in modules)
    return {name for name in named if isinstance(name, str)}


def _by_modules(names: list[str], bodies: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """By the modules of the first level that has several. bodies: the names of other wrappers."""
    wrappers = {*WRAPPERS, *bodies}
    prefixes = dict.fromkeys(names, "")
    paths = {name: name.split(".") for name in names}
    """From the level at hand on, with the parameter's own name."""

    while (opened := _to_open({tuple(path) for path in paths.values()}, wrappers)) is not None:
        siblings = any(path[0] != opened for path in paths.values())
        inside = [name for name, path in paths.items() if path[0] == opened]
        is_numbered = any(paths[name][1].isdecimal() for name in inside)
        for name in inside:
            if opened not in wrappers or (siblings and is_numbered):  # beside others, a number says nothing
                prefixes[name] += f"{opened}."
            del paths[name][0]

    groups: dict[str, list[str]] = {}
    for name, path in paths.items():
        groups.setdefault(prefixes[name] + path[0], []).append(name)
    return {group: tuple(members) for group, members in groups.items()}


def _to_open(paths: Collection[tuple[str, ...]], wrappers: Collection[str]) -> str | None:
    """The module of a level whose own modules make better groups: the only one, or a wrapper. None if there is none."""
    firsts = {path[0] for path in paths}
    for module in sorted(firsts):
        inside = {path[1:] for path in paths if path[0] == module}
        holds_modules = () not in inside and any(len(path) > 1 for path in inside)
        is_distinct = {path[0] for path in inside if path}.isdisjoint(firsts - {module})
        if holds_modules and (firsts == {module} or (module in wrappers and is_distinct)):
            return module
    return None


def _by_depth(depth: int, names: list[str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1] or [name]  # a parameter of the model itself is a group by itself
        groups.setdefault(".".join(module[:depth]), []).append(name)
    return {group: tuple(members) for group, members in groups.items()}


def _by_number(names: list[str]) -> dict[str, tuple[str, ...]]:
    """By numbered modules (`blocks.3`), and what is in none by its module."""
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1] or [name]
        number = next((place for place, part in enumerate(module, 1) if part.isdecimal()), len(module))
        groups.setdefault(".".join(module[:number]), []).append(name)
    return {group: tuple(members) for group, members in groups.items()}
