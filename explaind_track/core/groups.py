"""Groups: named parts of the model's parameters, every parameter in exactly one."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from explaind_track.core.checks import require_int, require_mapping, shown

Groups = Mapping[str, Sequence[str]]
"""The parameters of each group, by the group's name."""

GroupSpec = int | Mapping[str, str | Sequence[str]] | None
"""A caller's groups: a module depth, or for each group a pattern (or several, or plain parameter names)."""


def resolve_groups(spec: GroupSpec, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The parameters of every group.

    Args:
        spec: None or a depth (None is 1) groups by the first so many parts of the parameters' module path, so that `2`
            puts `attention.encoder.weight` into `attention.encoder`. A mapping gives each group's patterns, in which
            `*` stands for anything: `{"attention": "attention.*", "mlp": ["linear1.*", "linear2.*"]}`.
        parameters: The names of the model's parameters.

    Returns:
        The groups in the order of the mapping, or of their first parameters; each parameter in exactly one.

    Raises:
        ValueError: Parameters are in no group or in two, or groups hold none; all of them are named.

    Example:
        >>> from explaind_track import resolve_groups
        >>> names = ["embedding.weight", "blocks.0.weight", "blocks.1.weight"]
        >>> resolve_groups(None, names)
        {'embedding': ('embedding.weight',), 'blocks': ('blocks.0.weight', 'blocks.1.weight')}
        >>> list(resolve_groups(2, names))
        ['embedding', 'blocks.0', 'blocks.1']
        >>> resolve_groups({"first": ["embedding.*", "blocks.0.*"], "last": "blocks.1.*"}, names)["last"]
        ('blocks.1.weight',)
    """
    names = list(parameters)
    if spec is None or isinstance(spec, Integral):
        return _by_depth(require_int("groups= (a module depth)", 1 if spec is None else spec, 1), names)

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


def _by_depth(depth: int, names: list[str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1] or [name]  # a parameter of the model itself is a group by itself
        groups.setdefault(".".join(module[:depth]), []).append(name)
    return {group: tuple(members) for group, members in groups.items()}
