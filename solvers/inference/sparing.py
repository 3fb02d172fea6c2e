"""Recursions that keep some of their values, and compute the others again on the way back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..transforms import inside_transform

Carry = tuple[Tensor, ...]
Step = Callable[[Carry, int], tuple[Carry, Tensor | None]]


def walk(step: Step, carry: Carry, places: range, sparing: bool) -> tuple[Carry, list[Tensor]]:
    """Take one step after the other.

    Args:
        step: maps what is carried on and a place to what is carried on, and what is noted down there, or None.
        carry: before the first step.
        places: of the steps.
        sparing: keep for the backward pass what is carried on at about the square root of the number of steps, and take
            the steps between once more. Ignored inside transforms of torch.func, which know no such thing.

    Returns:
        What is carried on in the end, and all that was noted down.

    Source: Chen et al. 2016, Training deep nets with sublinear memory cost, section 4.
    """
    if not sparing or not torch.is_grad_enabled() or inside_transform() or len(places) < 4:
        return _walk(step, carry, places)
    every = math.isqrt(len(places) - 1) + 1
    noted: list[Tensor] = []
    for first in range(0, len(places), every):
        carry, found = checkpoint(
            _walk, step, carry, places[first : first + every], use_reentrant=False, preserve_rng_state=False
        )
        noted += found
    return carry, noted


def _walk(step: Step, carry: Carry, places: range) -> tuple[Carry, list[Tensor]]:
    noted = []
    for place in places:
        carry, note = step(carry, place)
        if note is not None:
            noted.append(note)
    return carry, noted
