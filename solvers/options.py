"""Frozen option classes: a solver is a value that holds its own knobs and nothing else."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any, TypeVar, dataclass_transform

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
    return frozen


def require(instance: object, base: type, argument: str) -> None:
    """Check that `instance`, given as `argument`, is an instance of `base` and not a class or a name.

    Raises:
        TypeError: it is not; the message names the argument, what it got and the choices.
    """
    if isinstance(instance, base):
        return
    choices = sorted(c.__name__ for c in _subclasses(base) if not c.__name__.startswith("_"))
    if isinstance(instance, type) and issubclass(instance, base):
        raise TypeError(f"{argument} must be an instance: write {argument}={instance.__name__}().")
    hint = suggest(instance, choices) if isinstance(instance, str) else ""
    raise TypeError(f"{argument} must be one of {', '.join(f'{c}()' for c in choices)}; got {instance!r}.{hint}")


def _subclasses(base: type) -> set[type]:
    found: set[type] = set()
    direct: list[type] = base.__subclasses__()
    for sub in direct:
        found |= {sub} | _subclasses(sub)
    return {c for c in found if not getattr(c, "__abstractmethods__", None)}
