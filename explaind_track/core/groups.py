"""Groups: named parts of the model's parameters, every parameter in exactly one."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

Groups = Mapping[str, Sequence[str]]
"""The parameters of each group, by the group's name."""

GroupSpec = int | Mapping[str, str | Sequence[str]] | None
"""What a caller may say: a module depth, or for each group a pattern (or several, or plain parameter names)."""


def resolve_groups(spec: GroupSpec, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The group of every parameter.

    spec: None or a depth (None is 1) groups by the first so many parts of the parameters' module path, so that
    `2` puts `attention.encoder.weight` into `attention.encoder`. A mapping gives each group's patterns, in which `*`
    stands for anything: `{"attention": "attention.*", "mlp": ["linear1.*", "linear2.*"]}`.

    Raises ValueError naming the parameters that are in no group or in two, and the groups that hold none.
    """
    names = list(parameters)
    if spec is None or isinstance(spec, int):
        return _by_depth(1 if spec is None else spec, names)
    patterns = {group: (given,) if isinstance(given, str) else tuple(given) for group, given in spec.items()}
    member: dict[str, list[str]] = {
        name: [group for group, given in patterns.items() if any(fnmatchcase(name, pattern) for pattern in given)]
        for name in names
    }
    lost = [name for name, groups in member.items() if not groups]
    torn = [f"{name} ({', '.join(groups)})" for name, groups in member.items() if len(groups) > 1]
    groups = {group: tuple(name for name in names if group in member[name]) for group in patterns}
    empty = [f"{group} ({', '.join(patterns[group])})" for group, members in groups.items() if not members]
    complaints = [
        f"{what}: {', '.join(which)}"
        for what, which in (
            ("parameters in no group", lost),
            ("parameters in more than one group", torn),
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


def _by_depth(depth: int, names: list[str]) -> dict[str, tuple[str, ...]]:
    if depth < 1:
        raise ValueError(f"groups by module depth need a depth of at least 1, not {depth}")
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1] or [name]
        groups.setdefault(".".join(module[:depth]), []).append(name)
    return {group: tuple(members) for group, members in groups.items()}
