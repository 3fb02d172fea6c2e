"""Repeating the accepted steps of a solve, rejecting none, in operations that autograd can record."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .method import Carry, Method, Rhs, Time
from .problem import END, Taken


class Clock:
    """The times of recorded steps as functions of the start and end of the solve.

    Steps have constant lengths and move with the start, up to the first one that was made to land on a constant time;
    a step that lands is as long as what is left. Where neither end requires a gradient all of it is floats.
    """

    def __init__(self, mesh: Sequence[Taken], start: Tensor | None = None, end: Tensor | None = None) -> None:
        self.start, self.end = start, end
        landed = [i for i, taken in enumerate(mesh) if taken.lands]
        self._first_landing = landed[0] if landed else len(mesh)

    def at(self, index: int, taken: Taken) -> tuple[Time, Time]:
        """Start and length of a step."""
        t: Time = taken.t
        h: Time = taken.h
        if self.start is not None and index <= self._first_landing:
            shift = self.start - self.start.detach()
            t = t + shift
            if taken.lands:
                h = h - shift
        if self.end is not None and taken.lands == END:
            h = h + (self.end - self.end.detach())
        return t, h


def replay(
    method: Method,
    rhs: Rhs,
    mesh: Sequence[Taken],
    first: int,
    last: int,
    y: Tensor,
    carry: Carry,
    clock: Clock,
    dense: bool = True,
) -> tuple[Tensor, Carry, list[Tensor]]:
    """Steps `first` to `last` (exclusive) of the mesh from `y`.

    Args:
        dense: whether to compute the dense output of the steps that have a slot. It is needed in any case where the
            dense output hands something to the carry of the next step.

    Returns:
        The state and carry after them, and the dense outputs of those steps that have a slot.
    """
    outputs: list[Tensor] = []
    for index in range(first, last):
        taken = mesh[index]
        if taken.replace is not None:
            y = y.index_select(0, taken.replace)
        t, h = clock.at(index, taken)
        if taken.restart or not carry:
            carry = method.init(rhs, t, y)
        step = method.step(rhs, t, y, h, carry)
        if taken.slot >= 0 and dense:
            outputs.append(method.dense(rhs, t, y, h, step))
        y, carry = step.y, step.carry
    return y, carry, outputs
