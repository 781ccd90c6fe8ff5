"""Whoever reads `help(…)` of a public name finds what it takes, gives and raises, and an example that runs."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cached_property
from types import FunctionType
from typing import Any

import explaind_track

ARRAYS = ("Tensor", "ndarray", "DataArray", "Dataset")


def public_names() -> Iterator[tuple[str, Any]]:
    for module in (explaind_track, explaind_track.analysis, explaind_track.what_if):
        for name in module.__all__:
            named = getattr(module, name)
            if not inspect.ismodule(named):
                yield name, named


def public_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods and properties that the package defines, as functions."""
    for base in cls.__mro__:
        if base.__module__.startswith("explaind_track"):
            for name, member in vars(base).items():
                function = function_of(member)
                field = name in getattr(base, "__dataclass_fields__", {})  # a function for a default is no method
                if function is not None and not field and not name.startswith("_"):
                    yield name, function


def function_of(member: Any) -> Callable[..., Any] | None:
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    if isinstance(member, classmethod | staticmethod):
        return inspect.unwrap(member.__func__)
    return inspect.unwrap(member) if isinstance(member, FunctionType) else None


def takes_arrays(function: Callable[..., Any]) -> bool:
    kinds = [str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()]
    return any(name in kind for kind in kinds for name in ARRAYS)


def raises(function: Callable[..., Any]) -> bool:
    """Whether the function itself raises an error, other than one that it has caught."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def complaints(name: str, named: Any) -> Iterator[str]:
    """What the docstrings of a class or function lack."""
    text = inspect.getdoc(named) or ""
    if ">>>" not in text:
        yield f"{name}: an example"
    if not inspect.isclass(named):
        yield from complaints_about_function(name, named, text)
        return

    # A dataclass makes its own `__init__`; the docstrings of its fields say what it takes.
    if isinstance(vars(named).get("__init__"), FunctionType) and not hasattr(named, "__dataclass_fields__"):
        yield from complaints_about_function(name, named.__init__, text + (inspect.getdoc(named.__init__) or ""))

    for method, function in public_methods(named):
        # What its only argument is, a method may say in its summary.
        several = len(inspect.signature(function).parameters) > 2
        yield from complaints_about_function(f"{name}.{method}", function, inspect.getdoc(function) or "", several)


def complaints_about_function(
    name: str, function: Callable[..., Any], text: str, arguments: bool = True
) -> Iterator[str]:
    if not text:
        yield f"{name}: a docstring"
    told = "Args:" in text or "the same arguments" in text
    if arguments and takes_arrays(function) and not told:
        yield f"{name}: Args: with the shapes of its arrays"
    if raises(function) and "Raises:" not in text:
        yield f"{name}: Raises:"


def test_public_names_say_what_they_take_give_and_raise() -> None:
    found = [complaint for name, named in public_names() for complaint in complaints(name, named)]
    assert not found, "missing:\n" + "\n".join(found)
