"""What a field is made of: whether it is the one that was compiled, and which tensors it uses."""

from __future__ import annotations

import dis
import enum
import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .reasons import Unfit

# Of things and values within a field, which are looked at anew with every solve.
_MOST = 20_000
_VALUES = (bool, int, str, bytes, complex, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
# Code that does not change between two solves.
_LIBRARIES = ("torch", "numpy", "builtins", "math", "functools", "operator", "jaxtyping", "beartype")
_HOOKS = ("_parameters", "_buffers", "_modules")


class Fingerprint:
    """A walk through a callable and its arguments: code, closures, attributes, defaults and the globals it names.

    Two callables with equal keys are the same program on the tensors that are listed at the same places. What the walk
    cannot see, such as the state of an object of another language, it takes for the same if the object is.

    Attributes:
        kind: the first thing's code alone.
        key: hashable; of tensors it knows type, layout and whether they require a gradient.
        tensors: in the order of the walk, each once.
    """

    def __init__(self, *things: Any) -> None:
        """Walk through `things`.

        Raises:
            Unfit: they hold too much to look at with every solve, or tensors of another class.
        """
        self.tensors: list[Tensor] = []
        self._seen: dict[int, int] = {}
        # Objects made on the way, so that no other one takes over their ids.
        self._held: list[Any] = []
        self._parts: list[Any] = []
        for thing in things:
            self._visit(thing)
        self.kind: Hashable = _kind(things[0])
        self.key: Hashable = tuple(self._parts)

    def _visit(self, thing: Any) -> None:
        if len(self._parts) >= _MOST:
            raise Unfit("the field holds more objects than can be looked through with every solve")
        if isinstance(thing, float):
            self._parts.append(repr(thing))
            return
        if isinstance(thing, _VALUES):
            self._parts.append((type(thing), thing))
            return
        known = self._seen.get(id(thing))
        if known is not None:
            self._parts.append(known)
            return
        self._seen[id(thing)] = len(self._seen)
        self._held.append(thing)
        if isinstance(thing, Tensor):
            self._tensor(thing)
        elif isinstance(thing, nn.Module):
            self._module(thing)
        elif isinstance(thing, (list, tuple, set, frozenset)):
            self._parts += [type(thing), len(thing)]
            for part in thing:
                self._visit(part)
        elif isinstance(thing, dict):
            self._parts += [type(thing), len(thing)]
            for name, part in thing.items():
                self._visit(name)
                self._visit(part)
        elif isinstance(thing, functools.partial):
            self._parts.append(type(thing))
            for part in (thing.func, thing.args, thing.keywords):
                self._visit(part)
        elif isinstance(thing, types.FunctionType):
            self._function(thing)
        elif isinstance(thing, types.MethodType):
            self._parts.append(type(thing))
            self._visit(thing.__func__)
            self._visit(thing.__self__)
        elif isinstance(thing, types.ModuleType):
            self._parts.append(thing.__name__)
        else:
            self._object(thing)

    def _tensor(self, thing: Tensor) -> None:
        if type(thing) not in (Tensor, nn.Parameter, nn.Buffer):
            raise Unfit(f"the field uses a tensor of class {type(thing).__name__}")
        self.tensors.append(thing)
        layout = (thing.layout, tuple(thing.shape), thing.stride() if thing.layout == torch.strided else None)
        self._parts.append((thing.dtype, thing.device, layout, thing.requires_grad))

    def _module(self, thing: nn.Module) -> None:
        self._parts.append(type(thing))
        for name, part in vars(thing).items():
            # Of the many dictionaries of hooks most are empty.
            if not isinstance(part, dict) or part or name in _HOOKS:
                self._parts.append(name)
                self._visit(part)
        self._code(type(thing).forward)

    def _object(self, thing: Any) -> None:
        if _of_library(thing) or isinstance(thing, type) or not hasattr(thing, "__dict__"):
            self._parts.append(_Same(thing))
            return
        self._parts.append(type(thing))
        for name, part in vars(thing).items():
            self._parts.append(name)
            self._visit(part)
        if callable(thing):
            self._code(type(thing).__call__)

    def _code(self, method: Any) -> None:
        if isinstance(method, types.FunctionType):
            self._visit(method)

    def _function(self, thing: types.FunctionType) -> None:
        if _of_library(thing):
            self._parts.append(_Same(thing))
            return
        self._parts.append(thing.__code__)
        for cell in thing.__closure__ or ():
            try:
                self._visit(cell.cell_contents)
            except ValueError:
                self._parts.append("an empty cell")
        self._visit(thing.__defaults__)
        self._visit(thing.__kwdefaults__)
        wrapped = getattr(thing, "__wrapped__", None)
        if wrapped is not None:
            self._visit(wrapped)
        for name in _names(thing.__code__):
            if name in thing.__globals__:
                self._visit(thing.__globals__[name])


class _Same:
    """Equal to itself alone, as long as what it stands for exists."""

    def __init__(self, thing: Any) -> None:
        self._hash = id(thing)
        try:
            self._thing: Callable[[], Any] = weakref.ref(thing)
        except TypeError:
            self._thing = lambda: thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._thing() is self._thing() is not None

    def __hash__(self) -> int:
        return self._hash


def _kind(thing: Any) -> Hashable:
    """The code of a function, the class of another object."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    code: Hashable = getattr(thing, "__code__", None)
    return code or _Same(type(thing))


def _of_library(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return module.split(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1000)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function and those defined inside it look up among its globals."""
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return tuple(dict.fromkeys([*own, *inner]))
