"""Tells one question from another: digests of queries, models, functions, and whatever these hold.

A function is what it runs (code, constants, defaults), what it has closed over or is bound to, and the globals that it
names, all of these in turn. What an installed package defines goes by its name and the package's version. What Python
can tell nothing of (a lock, an open file, a generator) is `unknown`: questions that differ in that alone look alike.
"""

import hashlib
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind_track.core.modules import without_wrapper
from explaind_track.core.queries import Query
from explaind_track.errors import UncheckedContentWarning

Atoms = (bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, type(None), type(...))
"""What is told by its type and by what it prints."""

UNTOLD = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
"""What a class holds for its own machinery."""

PACKAGE = __name__.split(".")[0]


def fingerprint(*values: Any) -> str:
    """A digest of what the values print."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]


class Digest:
    """Hashes values by their content, the same in every process."""

    def __init__(self) -> None:
        self.unknown: list[str] = []
        """Where in the values that were added something lies whose content cannot be told."""
        self._hash = hashlib.sha256()
        self._known: dict[int, tuple[int, Any]] = {}
        """By id, so that circles end: the place, and the object, so that no other takes its id."""

    @property
    def hex(self) -> str:
        """The digest of all that was added."""
        return self._hash.hexdigest()[:32]

    def add(self, value: Any, name: str) -> "Digest":
        """Adds a value. name: what to call it where it is unknown."""
        if isinstance(value, Atoms):
            self._put(type(value).__qualname__, repr(value))
        elif id(value) in self._known:
            self._put("again", self._known[id(value)][0])
        elif isinstance(value, Tensor):
            self._tensor(value, name)
        else:
            self._known[id(value)] = (len(self._known), value)
            self._compound(value, name)
        return self

    def add_model(self, model: nn.Module) -> "Digest":
        """Adds what a model computes, whatever its parameters and buffers are, and in which mode it is."""
        for own in (*model.modules(), *model.parameters(), *model.buffers()):
            self._known[id(own)] = (len(self._known), own)
        self._module(model, "the model", values=False)
        return self

    def _put(self, *words: Any) -> None:
        self._hash.update(repr(words).encode())

    def _tensor(self, tensor: Tensor, name: str) -> None:
        self._put("tensor", str(tensor.dtype), tuple(tensor.shape))
        try:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._hash.update(flat.view(torch.uint8).numpy().data)
        except (RuntimeError, NotImplementedError, TypeError):  # of a layout that has no bytes
            self.unknown.append(name)

    def _compound(self, value: Any, name: str) -> None:
        """Whatever has parts."""
        # values and containers
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            self._put("array", value.dtype.str, value.shape)
            self._hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, np.ndarray) or type(value) in (list, tuple):
            items = value.ravel().tolist() if isinstance(value, np.ndarray) else value
            self._put(type(value).__qualname__, len(items), getattr(value, "shape", None))
            for place, item in enumerate(items):
                self.add(item, f"{name}[{place}]")
        elif isinstance(value, set | frozenset):
            items = [Digest().add(item, name) for item in value]
            self._put(type(value).__qualname__, sorted(item.hex for item in items))
            self.unknown += [place for item in items for place in item.unknown]
        elif type(value) in (dict, OrderedDict, types.MappingProxyType):
            items = {key: item for key, item in value.items() if not _is_cached_hash(key, item)}
            self._put("mapping", len(items))
            for key, item in items.items():
                self.add(key, name).add(item, f"{name}[{key!r}]")

        # what runs
        elif isinstance(value, types.CodeType):
            self._code(value, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, name)
        elif isinstance(value, types.MethodType | types.BuiltinMethodType):
            self._put("method", value.__name__)
            self.add(getattr(value, "__func__", None), name).add(value.__self__, f"{name}.__self__")
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__, _version(value.__name__))
        elif isinstance(value, type):
            self._class(value, name)
        elif isinstance(value, staticmethod | classmethod):
            self.add(value.__func__, name)
        elif isinstance(value, property):
            self.add((value.fget, value.fset), name)

        # what holds state
        elif isinstance(value, nn.Module):
            self._module(value, name, values=True)
        elif isinstance(value, torch.Generator):
            self.add(value.get_state(), name)
        else:
            self._object(value, name)

    def _code(self, code: types.CodeType, name: str) -> None:
        """What runs, wherever it stands and whatever its variables are called."""
        self._put("code", code.co_code, code.co_exceptiontable, code.co_names, code.co_flags, code.co_argcount)
        self.add(code.co_consts, name)

    def _function(self, function: types.FunctionType, name: str) -> None:
        self.add(function.__code__, name)
        self.add((function.__defaults__, function.__kwdefaults__), f"the defaults of {name}")
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.add(cell.cell_contents, f"{free} of {name}")
            except ValueError:
                self._put("empty cell")
        self.add({key: item for key, item in vars(function).items() if not key.startswith("__")}, name)
        if _installed(function.__module__):
            self._put(function.__module__, function.__qualname__, _version(function.__module__))
            return

        # globals, and what is taken from modules that are not installed
        named = sorted(set(_names(function.__code__)))
        for key in named:
            if key in function.__globals__:
                found = function.__globals__[key]
                self._put("global", key)
                self.add(found, key)
                if isinstance(found, types.ModuleType) and not _installed(found.__name__):
                    for inner in named:
                        if inner in vars(found):
                            self.add(vars(found)[inner], f"{key}.{inner}")

    def _class(self, cls: type, name: str) -> None:
        self._put("class", cls.__module__, cls.__qualname__, _version(cls.__module__))
        if _installed(cls.__module__):
            return
        for base in cls.__bases__:
            self.add(base, name)
        for key, item in sorted(vars(cls).items()):
            is_machinery = key.startswith(("_abc_", "__")) and not callable(getattr(item, "__func__", item))
            if not (is_machinery or isinstance(item, UNTOLD)):
                self._put("attribute", key)
                self.add(item, f"{name}.{key}")

    def _module(self, module: nn.Module, name: str, values: bool) -> None:
        """values: of its own parameters and buffers; else only their shapes and types, and neither the mode."""
        self.add(type(module), name)
        own = dict(vars(module))
        hooks = [hook for key in ("_forward_pre_hooks", "_forward_hooks") for hook in own[key].values()]
        self.add([hook for hook in hooks if not _is_ours(hook)], f"the hooks of {name}")
        tensors = {**own["_parameters"], **own["_buffers"]}
        if values:
            self.add(tensors, name).add(own["training"], name)
        else:
            self.add({key: None if one is None else (str(one.dtype), *one.shape) for key, one in tensors.items()}, name)

        for key in sorted(own):
            if not (key.startswith("_") and key in _OF_EVERY_MODULE) and key != "training":
                self._put("attribute", key)
                self.add(own[key], f"{name}.{key}")
        for key, inner in own["_modules"].items():
            self._put("submodule", key)
            if inner is not None:
                self._module(inner, f"{name}.{key}", values)

    def _object(self, value: Any, name: str) -> None:
        """Anything else, by what a pickle of it would hold."""
        self.add(type(value), name)
        if hasattr(value, "__wrapped__"):  # a function that is cached
            self.add(value.__wrapped__, name)
        try:
            told = value.__reduce_ex__(4)
            parts = (told,) if isinstance(told, str) else (*told[:3], *map(list, filter(None, told[3:5])))
        except Exception:  # whatever an object that cannot be pickled raises
            self.unknown.append(f"{name} ({type(value).__qualname__})")
            return
        for part in parts:
            self.add(part, name)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes that the code and the functions within it use."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _is_cached_hash(name: Any, value: Any) -> bool:
    """Whether an object keeps what Python's `hash` has said of it, which is another in each process."""
    return isinstance(name, str) and name.endswith("_hash") and isinstance(value, int) and abs(value) >= 2**32


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).split(".")[0] == PACKAGE


def _installed(module: str | None) -> bool:
    """Whether the module belongs to Python or to an installed package, and is told by its name and version."""
    top = (module or "").split(".")[0]
    if top in sys.stdlib_module_names or top == PACKAGE:
        return True
    found = sys.modules.get(top)
    places = [getattr(found, "__file__", None) or "", *getattr(found, "__path__", ())]
    return any(name in place for place in places for name in ("site-packages", "dist-packages"))


def _version(module: str | None) -> str:
    top = (module or "").split(".")[0]
    return str(getattr(sys.modules.get(top), "__version__", ""))


def told_apart(digests: Mapping[str, Digest]) -> dict[str, str]:
    """The digests as a request holds them. An UncheckedContentWarning tells of what they could not look into."""
    unknown = [place for digest in digests.values() for place in digest.unknown]
    if unknown:
        warnings.warn(
            f"out= cannot tell what is in {', '.join(unknown[:5])}: name a new directory whenever that is another, or "
            "the answer to the old question is taken for one to the new",
            UncheckedContentWarning,
            stacklevel=2,
        )
    return {name: digest.hex for name, digest in digests.items()}


def query_digest(query: Query) -> Digest:
    """Tells one query from others: by its inputs and labels, and by what its target computes."""
    digest = Digest().add((query.inputs, query.labels), "the query's inputs")
    if query.token_text is not None:
        digest.add(query.token_labels()["token"], "the query's tokens")
    return digest.add((query.reduction, query.module), "the query").add(query.target, "the query's target")


def model_digest(model: nn.Module) -> Digest:
    """Tells one model from others by what it computes, whatever its parameters and buffers are."""
    return Digest().add_model(without_wrapper(model))
