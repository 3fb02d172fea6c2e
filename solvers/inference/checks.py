"""What all structured distributions ask of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..transforms import any_true, plain

_HALF = (torch.float16, torch.bfloat16)


def potentials(tensor: object, name: str, shape: tuple[int | str, ...]) -> Tensor:
    """`tensor` as log-potentials: half precision as float32, for whose sums it has too few digits.

    Args:
        tensor: the user's.
        name: how errors call it.
        shape: what its dimensions must be: a number, or the name of what is free.

    Raises:
        TypeError: it is no tensor of a real floating-point type.
        ValueError: its shape is another one; a named dimension is empty.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}.")
    expected = ", ".join(map(str, shape))
    sizes: dict[str, int] = {}
    fits = tensor.ndim == len(shape)
    for want, got in zip(shape, tensor.shape, strict=False):
        fits = fits and (got == want if isinstance(want, int) else sizes.setdefault(want, got) == got)
    if not fits:
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}.")
    empty = [want for want, got in zip(shape, tensor.shape, strict=True) if isinstance(want, str) and got == 0]
    if empty:
        raise ValueError(f"{name}: the dimension {empty[0]!r} of ({expected}) is empty; got {tuple(tensor.shape)}.")
    return tensor.float() if tensor.dtype in _HALF else tensor


def alike(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raise ValueError unless two tensors share dtype and device."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name}: expected {other.dtype} on {other.device} as {other_name}; got {tensor.dtype} on {tensor.device}."
        )


def lengths(given: Tensor | None, batch: int, longest: int, like: Tensor) -> Tensor | None:
    """Lengths (batch,) on the device of `like`, or None where every sequence is of the longest length.

    Raises:
        ValueError: not integers of shape (batch,); one is below 1 or above `longest`: the message names the first.
    """
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.is_floating_point() or given.dtype == torch.bool:
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"lengths: expected a tensor of integers, got {kind}.")
    if tuple(given.shape) != (batch,):
        raise ValueError(f"lengths: expected shape (batch,) = ({batch},), got {tuple(given.shape)}.")
    wrong = (given < 1) | (given > longest)
    if any_true(wrong):
        first = int(plain(wrong).flatten().nonzero()[0])
        got = int(plain(given).flatten()[first])
        raise ValueError(f"lengths: sample {first} has length {got}; expected at least 1 and at most {longest}.")
    return None if not any_true(given != longest) else given.to(like.device, torch.int64)


def finite(tensor: Tensor, name: str, unused: Tensor | None = None) -> Tensor:
    """`tensor`, whose entries must be real numbers or minus infinity.

    Args:
        tensor: log-potentials (batch, ...).
        name: how errors call it.
        unused: entries that are padding, broadcast against `tensor`: whatever is there becomes zero.

    Raises:
        ValueError: NaN or plus infinity; the message names the first place.
    """
    if tensor.numel() == 0 or bool((plain(tensor.detach()).amax() < math.inf).all()):
        return tensor
    if unused is not None:
        tensor = tensor.masked_fill(unused, 0.0)
    wrong = ~(plain(tensor.detach()) < math.inf)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        got = float(plain(tensor.detach())[place])
        raise ValueError(
            f"{name}: the entry {place} is {got}; log-potentials are real numbers, or minus infinity for what is "
            "excluded."
        )
    return tensor


def masked(tensor: Tensor, mask: Tensor | None, of: str) -> Tensor:
    """`tensor` with minus infinity where `mask` is False.

    Raises:
        ValueError: the mask is not boolean, or does not broadcast to the shape of `tensor`.
    """
    if mask is None:
        return tensor
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected booleans, True for what is allowed; got {kind}.")
    if mask.ndim != tensor.ndim or any(m not in (1, s) for m, s in zip(mask.shape, tensor.shape, strict=True)):
        raise ValueError(f"mask: expected the shape of {of}, {tuple(tensor.shape)}, got {tuple(mask.shape)}.")
    return tensor.masked_fill(~mask, -math.inf)


def count(value: object, name: str) -> int:
    """Raise ValueError unless `value` is an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")
    return value
