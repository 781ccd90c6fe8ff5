"""Settings as `key=value` on the command line: read, and told to be wrong before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from explaind_track.engine.path_integral import Quadrature


@dataclass(frozen=True)
class Setting:
    """The check of a setting's value that needs nothing else, and the words for what it should be."""

    fits: Callable[[Any], bool]
    description: str


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


SETTINGS = {
    "nodes": Setting(lambda value: isinstance(value, int) and value > 0, "a number of nodes, as nodes=8"),
    "tolerance": Setting(lambda value: isinstance(value, int | float) and value > 0, "a number, as tolerance=0.01"),
    "window": Setting(
        lambda value: _is_list_of(value, int) and len(value) == 2, "first and last step, as window=[0,500]"
    ),
    "keep": Setting(lambda value: _is_list_of(value, str), "a list of axes, as keep=[step,group]"),
}
"""Those whose shape is known; the function that takes the others says what is wrong with them."""

QUADRATURE = ("nodes", "tolerance")
"""The settings that make up the argument `quadrature`, which all analyses take."""


def parse_settings(pairs: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of an analysis, from settings.

    Args:
        pairs: as `["window=[0,500]", "nodes=8"]`; values as in YAML.
        allowed: the names that this command has, beside `nodes` and `tolerance`.

    Raises:
        click.UsageError: for another name, and for a value that does not fit.
    """
    from omegaconf import OmegaConf

    given: dict[str, Any] = OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs)))  # type: ignore[assignment]
    names = [*allowed, *QUADRATURE]
    if unknown := sorted(set(given) - set(names)):
        raise click.UsageError(f"there is no setting {', '.join(unknown)}; there are {', '.join(names)}")
    for name, value in given.items():
        if name in SETTINGS and not SETTINGS[name].fits(value):
            raise click.UsageError(f"{name}={value} does not fit; it is {SETTINGS[name].description}")

    nodes, tolerance = (given.pop(name, None) for name in QUADRATURE)
    if nodes is not None:
        given["quadrature"] = Quadrature.fixed(nodes)
    elif tolerance is not None:
        given["quadrature"] = Quadrature(tolerance=tolerance)
    if "window" in given:
        given["window"] = tuple(given["window"])
    return given
