"""Repeating the accepted steps of a solve, rejecting none, in operations that autograd can record."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..solution import SolverError
from .mesh import Mesh
from .method import Carry, Method, Rhs, renewed


def replay(
    method: Method,
    rhs: Rhs,
    mesh: Mesh,
    span: range,
    y: Tensor,
    carry: Carry,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Carry, dict[int, Tensor]]:
    """The steps `span` of the mesh from `y`.

    Args:
        carry: at the start of the first of them.
        start, end: first and last time of the solve where derivatives with respect to them are wanted.

    Returns:
        The state and carry after them, and the dense outputs (p + 1, batch, n) by step.
    """
    dense: dict[int, Tensor] = {}
    for index in span:
        taken = mesh.steps[index]
        if taken.replace is not None:
            y = y.index_select(0, taken.replace)
            carry = tuple(part.index_select(0, taken.replace) for part in carry)
        rhs.stand_in(taken.rows, mesh.own)
        t, h = mesh.times(index, start, end)
        carry = renewed(method, rhs, t, y, carry, taken.restart)
        step = method.step(rhs, t, y, h, carry)
        if taken.dense:
            dense[index] = method.dense(rhs, t, y, h, step)
        if taken.waits is None:
            y, carry = step.y, step.carry
        else:
            stays = taken.waits.unsqueeze(-1)
            y = torch.where(stays, y, step.y)
            carry = tuple(torch.where(stays, old, new) for old, new in zip(carry, step.carry))
    rhs.stand_in(None, mesh.own)
    return y, carry, dense


def check_repeats(found: Tensor, expected: Tensor) -> None:
    """Make sure that a replay meets the kept states.

    Raises:
        SolverError: it does not.
    """
    slack = math.sqrt(torch.finfo(found.dtype).eps)
    if not torch.allclose(found, expected, rtol=slack, atol=slack, equal_nan=True):
        raise SolverError(
            "solve_ode: the field gave other values when the accepted steps were repeated for the backward pass, so "
            "gradients would be wrong. It must be a function of t, y and args alone: fix its noise within a solve, and "
            "do not let it change state."
        )
