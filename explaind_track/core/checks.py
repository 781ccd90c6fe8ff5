"""Checks of arguments where they enter, before any work: each message says what is expected, what came, what to do.

A `name` is the argument as its caller writes it (`every=`); a check returns the value as the package goes on with it,
so that a NumPy number is Python's from there on.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor


def require_int(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, at least so large; a boolean is none, nor is 3.0."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise TypeError(f"{name} is a whole number, not {shown(value)} ({type(value).__name__})")
    if least is not None and value < least:
        raise ValueError(f"{name} is at least {least}, not {value}")
    return int(value)


def require_real(name: str, value: Any) -> float | int:
    """A number, which may be NaN or infinite: Python's, NumPy's or a tensor with one number, but no boolean."""
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} is a number, not {shown(value)} ({type(value).__name__})")
    return number


def require_positive(name: str, value: Any) -> float | int:
    """A number above 0; infinity is one."""
    number = require_real(name, value)
    if not number > 0:
        raise ValueError(f"{name} is a number above 0, not {number}")
    return number


def require_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float | int:
    """A finite number within bounds."""
    number = require_real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}: it has to be finite")
    if not least <= number <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} is {bounds}, not {number}")
    return number


def shown(value: Any) -> str:
    """A value in a message: on one line, and an array by its shape."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(value, Tensor) else 'an array'} {tuple(value.shape)} of {value.dtype}"
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:100]}…"


def first_few(names: Sequence[str], most: int = 8) -> str:
    """Names in a message: the first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain_number(value: Any) -> Any:
    """Python's number for one of NumPy's or a tensor's; anything else as it is."""
    is_number = isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)
    return value.item() if is_number else value


def require_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name} is one of {', '.join(map(repr, allowed))}, not {shown(value)}{_meant(value, allowed)}"
        )


def require_known(what: str, value: Any, known: Collection[str]) -> None:
    """A name of something that there is. what: such as "query"."""
    if not isinstance(value, str) or value not in known:
        listed = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"there is no {what} {value!r}; there are: {listed}{_meant(value, known)}")


def _meant(value: Any, known: Iterable[str]) -> str:
    close = get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_names(name: str, values: Any, what: str, some: bool = True) -> tuple[str, ...]:
    """Words, each once, and at least one if `some`. what: what they name, such as "part"."""
    if isinstance(values, str):
        raise TypeError(f"{name} is several names of {what}s, not one: write {name}({values!r},)")
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        raise TypeError(f"{name} is a tuple of names of {what}s, not {shown(values)}")
    names = tuple(values)
    if some and not names:
        raise ValueError(f"{name}() asks for nothing: name at least one {what}, or leave the argument out")
    if not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name} is a tuple of names of {what}s, not {shown(values)}")
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise ValueError(f"{name} names {', '.join(twice)} twice, which would count twice")
    return names


def require_mapping(name: str, value: Any, example: str) -> None:
    """Something by its names, which are words. example: how it is written."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is a mapping, such as {example}, not {shown(value)}")
    odd = [key for key in value if not isinstance(key, str)]
    if odd:
        raise TypeError(f"{name} has names that are strings, such as {example}, not {odd[0]!r}")


def require_instance(name: str, value: Any, kind: type, advice: str) -> None:
    """An object of a class. advice: what to write instead."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {kind.__name__}, not {shown(value)}: {advice}")


def require_callable(name: str, value: Any, call: str) -> None:
    """A function. call: how it is called, and what it returns."""
    if not callable(value):
        raise TypeError(f"{name} is a function {call}, not {shown(value)}")


def require_options(options: Mapping[str, Any], taken_by: Callable[..., Any]) -> None:
    """Keyword arguments that are handed on later: only those that the function takes."""
    known = [key for key, parameter in inspect.signature(taken_by).parameters.items() if parameter.kind == 3]
    for option in options:
        if option not in known:
            raise TypeError(f"there is no option {option!r}{_meant(option, known)}; there are: {', '.join(known)}")


def require_finite(name: str, values: Tensor) -> None:
    """An array without NaN and infinity."""
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds {int((~values.isfinite()).sum())} number(s) that are not finite (NaN, inf)")


def require_window(window: Any) -> tuple[int, int]:
    """`(first, last)`; whether the run has these steps is its source's to say."""
    if isinstance(window, str) or not isinstance(window, Sequence | np.ndarray | Tensor) or len(window) != 2:
        raise TypeError(f"window= is (first, last), for the steps first ≤ s < last, not {window!r}")
    first, last = (require_int("window=(first, last): each", plain_number(step)) for step in window)
    return first, last


def require_package(module: str, extra: str, purpose: str) -> None:
    """A package that only some of what we do needs. extra: of ours, which brings it."""
    if find_spec(module) is None:
        raise missing_package(module, extra, purpose)


def missing_package(module: str, extra: str, purpose: str) -> ModuleNotFoundError:
    """The error for a package that is not there. extra: of ours, which brings it."""
    return ModuleNotFoundError(
        f"{purpose} needs {module}, which is not installed: pip install 'explaind_track[{extra}]'", name=module
    )


def whole_numbers(name: str, values: Any, some: bool = True) -> list[int]:
    """Whole numbers from a list, a range, an array or a tensor of them, each once, and at least one if `some`."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a sequence of whole numbers, not {shown(values)}")
    given = list(values)
    if some and not given:
        raise ValueError(f"{name} is empty: name at least one, or leave the argument out")
    numbers = [require_int(f"{name}: each", plain_number(value)) for value in given]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} names some numbers twice: {sorted({n for n in numbers if numbers.count(n) > 1})[:5]}")
    return numbers


def words(name: str, values: Any) -> tuple[str, ...] | None:
    """The words of a list, an array or a series of them; None for anything else. Raises TypeError for a mixture."""
    if values is None or isinstance(values, str | Mapping | Tensor) or not isinstance(values, Iterable):
        return None
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    if kind in "biufc":
        return None
    given = [plain_number(value) for value in values]
    are_words = [isinstance(value, str) for value in given]
    if any(are_words) and not all(are_words):
        odd = given[are_words.index(False)]
        raise TypeError(f"{name} holds words and other things ({shown(odd)}): name all samples by words, or by numbers")
    return tuple(str(value) for value in given) if given and all(are_words) else None


def as_tensor(name: str, values: Any) -> Tensor:
    """A tensor from a list, an array of NumPy or a series of pandas; a tensor stays what it is."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, str | bytes | Mapping) or values is None:
        raise TypeError(f"{name} is a tensor, an array or a list of numbers, not {shown(values)}")
    try:
        array = np.array(values)  # a copy, since what NumPy and pandas lend may not be written to
        return torch.from_numpy(array) if array.dtype.kind in "biuf" else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is a tensor, an array or a list of numbers, not {shown(values)}") from None
