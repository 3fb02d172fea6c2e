"""The re-solve on a guessed active set, which is exact, and the check of its signs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .quadratic_kkt import Saddle, inactive, times
from .quadratic_problem import UNIT, Programme

SIGN = 1e-10
"""A slack or multiplier of a scaled programme may be negative by this, times the size of its terms."""

CLOSE = 1e-3
"""Relative residual below which a guess is not contradictory, but badly conditioned."""


@dataclasses.dataclass(frozen=True)
class Polished:
    """The optimum of a guess.

    Attributes:
        x, v: the point (batch, n) and the multipliers (batch, rows).
        active: the guess (batch, rows), equations included.
        next: the guess that the signs of the result suggest.
        proved: every sign is right and the residual is one of rounding (batch,): this is the optimum.
        saddle: the factorised system.
        error: relative residual (batch,).
    """

    x: Tensor
    v: Tensor
    active: Tensor
    next: Tensor
    proved: Tensor
    saddle: Saddle
    error: Tensor


def polish(
    problem: Programme, active: Tensor, x: Tensor | None, v: Tensor | None, tolerance: float, hard: bool = False
) -> Polished:
    """Solve with the `active` inequalities (batch, m) as equations, from x and v.

    Samples that refinement brings close, but not to the tolerance, are solved by the whole matrix; with `hard`, all
    that it does not bring to the tolerance.
    """
    m = problem.m
    everything = torch.cat([active, torch.ones_like(problem.d[:, m:], dtype=torch.bool)], 1)
    W = inactive(everything, problem.q.dtype)
    if problem.softness is not None:
        W = W + problem.softness
    saddle = Saddle.of(problem.Q, problem.C, W, UNIT)
    start = None if v is None else torch.where(everything, v, 0.0)
    x, v, error = saddle.solve(-problem.q, problem.d, x, start)
    slow = error > tolerance
    bad = (slow if hard else slow & (error < CLOSE)).nonzero().flatten()
    if len(bad):
        saddle = saddle.with_hard(bad)
        x, v, error = saddle.solve(-problem.q, problem.d, x, v)
    v = torch.where(everything, v, 0.0)
    slack = problem.d[:, :m] - times(problem.C, x)[:, :m]
    if problem.softness is not None:
        slack = slack + problem.softness[:, :m] * v[:, :m]
    reach = SIGN * (torch.linalg.vector_norm(x, dim=1, keepdim=True) + problem.d[:, :m].abs())
    pull = SIGN * (torch.linalg.vector_norm(v, dim=1, keepdim=True) + 1e-3)
    wrong_slack = ~active & (slack < -reach)
    wrong_pull = active & (v[:, :m] < -pull)
    proved = ~(wrong_slack | wrong_pull).any(1) & (error <= tolerance)
    return Polished(x, v, everything, (active & ~wrong_pull) | wrong_slack, proved, saddle, error)
