"""Looking through torch.func: control flow needs the plain values under grad and vmap wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C import _functorch


def inside_transform() -> bool:
    """True inside torch.func.grad, vjp, jvp, vmap and what is built of them."""
    return _functorch.peek_interpreter_stack() is not None


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


@contextlib.contextmanager
def no_derivatives() -> Iterator[None]:
    """Neither reverse-mode graphs nor forward-mode tangents are recorded inside."""
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        yield
