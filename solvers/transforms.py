"""Looking through torch.func, whose wrappers hide the values that control flow needs, past autocast and compilation."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

P = ParamSpec("P")
T = TypeVar("T")


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which torch.compile leaves alone: it breaks the graph once, and not at each decision of a loop.

    What is compiled by itself and called inside stays compiled.
    """
    disabled: list[Callable[P, T]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # The compiler takes seconds to import. Where nobody has done so, nothing is being compiled.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason="the steps of a solver depend on the data"))
        return disabled[0](*args, **kwargs)

    # The mark by which the compiler knows not to inline it.
    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run


def inside_transform() -> bool:
    """True inside torch.func.grad, vjp, jvp, vmap and what is built of them."""
    return _functorch.peek_interpreter_stack() is not None


def _levels() -> list[_functorch.TransformType]:
    """The kinds of the transforms of torch.func that enclose the caller, the outermost first."""
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def derivative_levels() -> int:
    """How many transforms of torch.func that differentiate enclose the caller."""
    return sum(kind in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp) for kind in _levels())


def inside_reverse() -> bool:
    """True inside torch.func.grad, vjp and what is built of them."""
    return _functorch.TransformType.Grad in _levels()


def inside_vmap() -> bool:
    """True inside torch.func.vmap and what is built of it."""
    return _functorch.TransformType.Vmap in _levels()


def solve_ex(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.linalg.solve_ex`, for (batch, n, n) and (batch, n, k).

    In torch 2.14 its derivative in forward mode, mapped over tangents inside a map over matrices, takes the factors of
    other matrices; triangular solves do not.
    """
    if not inside_vmap():
        solution, info = torch.linalg.solve_ex(matrix, right)
        return solution, info
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    order, lower, upper = torch.lu_unpack(factors, pivots)
    middle = torch.linalg.solve_triangular(lower, order.mT @ right, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, middle, upper=True), info


def plain(tensor: Tensor) -> Tensor:
    """The value under every functorch wrapper; a vmapped tensor shows all its examples at once."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def any_true(mask: Tensor) -> bool:
    """Whether any entry holds, in any example of an enclosing vmap."""
    return bool(plain(mask).any())


def all_true(mask: Tensor) -> bool:
    """Whether every entry holds, in every example of an enclosing vmap."""
    return bool(plain(mask).all())


def recording_tangents() -> bool:
    """Whether a level of forward-mode differentiation is open, of torch.func or not, and not switched off."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def differentiated(tensor: Tensor) -> bool:
    """Whether a derivative with respect to `tensor` may be wanted, in reverse or forward mode, at any open level."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    if tensor.requires_grad or not recording_tangents():
        return tensor.requires_grad
    return forward_ad.unpack_dual(tensor).tangent is not None


@contextlib.contextmanager
def no_derivatives() -> Iterator[None]:
    """Neither reverse-mode graphs nor forward-mode tangents are recorded inside."""
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        yield


@contextlib.contextmanager
def tangents_of_others(*saved: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For the jvp of an autograd Function: inside, tangents of the transforms of torch.func around it are recorded.

    Autograd switches all tangents off there, and those of the other levels would be zero without notice. The tensors
    that the function saved come back without the tangents of the level that the jvp is for.
    """
    if not inside_transform() or forward_ad._current_level < 0:
        yield saved
        return
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(torch.ops.aten._fw_primal(tensor, 0) for tensor in saved)


@functools.cache
def _can_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on this device; None where it is off."""
    kind = device.type
    if not _can_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast to this type, or none.

    A solver's own products are not what autocast is for: it would round the residuals that they tell apart.
    """
    if autocast_type(device) == dtype:
        return contextlib.nullcontext()
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype)
