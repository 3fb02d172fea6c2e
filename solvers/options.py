"""Frozen option classes: a solver is a value that holds its own knobs and nothing else."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, dataclass_transform

P = ParamSpec("P")
T = TypeVar("T")


def suggest(name: str, known: list[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or an empty string where nothing is close."""
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


@dataclass_transform(frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose constructor refuses unknown options with a suggestion.

    Raises (from the constructor):
        TypeError: an option that the class does not have; the message lists those that it has.
    """
    frozen = dataclasses.dataclass(frozen=True)(cls)
    generated = frozen.__init__
    names = [field.name for field in dataclasses.fields(frozen) if field.init]  # type: ignore[arg-type]

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise TypeError(
                    f"{cls.__name__} has no option {name!r}.{suggest(name, names)} "
                    f"Its options: {', '.join(names) or 'none'}."
                )
        generated(self, *args, **kwargs)

    frozen.__init__ = __init__  # type: ignore[method-assign]
    _OPTIONS.add(frozen)
    return frozen


_OPTIONS: set[type] = set()


def spelled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which answers an unknown keyword with a suggestion."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in names:
                called = function.__qualname__.removesuffix(".__init__")
                raise TypeError(
                    f"{called} has no argument {name!r}.{suggest(name, names)} Its arguments: {', '.join(names)}."
                )
        return function(*args, **kwargs)

    return run


def check_integer(owner: str, name: str, value: object, least: int = 1) -> int:
    """`value` as an int, be it Python's, numpy's or a tensor's.

    Raises:
        ValueError: it is no integer, or below `least`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{owner}{name} must be an integer of at least {least}; got {value!r}.")
    return number


def check_real(owner: str, name: str, value: object, holds: Callable[[float], bool], what: str) -> float:
    """`value` as a float, be it Python's or numpy's.

    Raises:
        ValueError: it is no number, not finite, or `holds` does not; `what` says what should.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and holds(value)):  # type: ignore[arg-type]
        raise ValueError(f"{owner}{name} must be {what}; got {value!r}.")
    return float(value)  # type: ignore[arg-type]


def require(instance: object, base: type | tuple[type, ...], argument: str) -> None:
    """Check that `instance`, given as `argument`, is an instance of `base` and not a class or a name.

    Raises:
        TypeError: it is not; the message names the argument, what it got and the choices.
    """
    if isinstance(instance, base):
        return
    bases = base if isinstance(base, tuple) else (base,)
    # Only what is made to be chosen from: there are classes that serve others.
    known = {c for b in bases for c in _subclasses(b) | {b} if not getattr(c, "__abstractmethods__", None)}
    listed = {c for c in known & _OPTIONS if not _demands(c)} or known
    choices = sorted(c.__name__ for c in listed if not c.__name__.startswith("_"))
    if isinstance(instance, type) and issubclass(instance, base):
        raise TypeError(f"{argument} must be an instance: write {argument}={instance.__name__}().")
    hint = suggest(instance, choices) if isinstance(instance, str) else ""
    raise TypeError(f"{argument} must be one of {', '.join(f'{c}()' for c in choices)}; got {instance!r}.{hint}")


def _demands(cls: Any) -> bool:
    """Whether an option class has options without a default."""
    missing = dataclasses.MISSING
    return any(f.init and f.default is missing and f.default_factory is missing for f in dataclasses.fields(cls))


def _subclasses(base: type) -> set[type]:
    found: set[type] = set()
    direct: list[type] = base.__subclasses__()
    for sub in direct:
        found |= {sub} | _subclasses(sub)
    return {c for c in found if not getattr(c, "__abstractmethods__", None)}
