"""Quantities that are computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch

T = TypeVar("T")


class lazy(Generic[T]):
    """A property that is computed once with derivatives and once without.

    What was computed under no_grad has no graph, and must not be handed to a caller who wants one.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[T]: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...

    def __get__(self, instance: object | None, owner: type | None = None) -> lazy[T] | T:
        if instance is None:
            return self
        key = (self.name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        cache: dict[Any, T] = instance.__dict__.setdefault("_lazy", {})
        if key not in cache:
            cache[key] = self.compute(instance)
        return cache[key]
