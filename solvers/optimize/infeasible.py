"""Certificates of programmes that have no optimum: what an interior point method diverges from, solved for directly."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..tree import norms
from .quadratic_kkt import times, times_transposed
from .quadratic_problem import Found, Limits, Programme, QPSolver

SIGNIFICANT = 1e-7
"""A violation or a descent below this, in a scaled programme, proves nothing."""


def empty_set(problem: Programme, solver: QPSolver, limits: Limits) -> tuple[Tensor, Tensor]:
    """Farkas' vector v (batch, rows), and where it proves that no x is feasible (batch,).

    C'v = 0 and v >= 0 for inequalities, but d'v < 0: were x feasible, 0 = x'C'v <= d'v. It is the vector of
    violations at the point that violates the constraints least, in the sense of squares.
    """
    soft = dataclasses.replace(
        problem, Q=torch.zeros_like(problem.Q), q=torch.zeros_like(problem.q), softness=torch.ones_like(problem.d),
        root=None,
    )  # fmt: skip
    v = _solve(soft, solver, limits).v
    v = torch.cat([v[:, : problem.m].clamp_min(0), v[:, problem.m :]], 1)
    size = norms(v)
    gain = -torch.linalg.vecdot(problem.d, v)
    flat = norms(times_transposed(problem.C, v)) <= 1e-8 * size
    proved = flat & (size > SIGNIFICANT * (1 + norms(problem.d))) & (gain >= 0.5 * size**2)
    return v / size.clamp_min(1e-300).unsqueeze(1), proved


def descent_ray(problem: Programme, solver: QPSolver, limits: Limits) -> tuple[Tensor, Tensor]:
    """A direction x (batch, n) of endless descent, and where it is one (batch,).

    Qx = 0, Gx <= 0, Ax = 0 and q'x < 0: the projection of -q onto the directions in which the feasible set and the
    flat part of the objective do not end.
    """
    m, batch, n = problem.m, problem.batch, problem.q.shape[1]
    Q = problem.Q.expand(batch, n, n)
    C = torch.cat([problem.C.expand(batch, *problem.C.shape[-2:]), Q], 1)
    eye = torch.eye(n, dtype=Q.dtype, device=Q.device)
    cone = Programme(eye, problem.q, C, C.new_zeros(batch, C.shape[1]), m)
    x = _solve(cone, solver, limits).x
    size = norms(x)
    Cx = times(problem.C, x)
    outside = torch.cat([Cx[:, :m].clamp_min(0), Cx[:, m:], times(problem.Q, x)], 1)
    down = -torch.linalg.vecdot(problem.q, x)
    proved = (norms(outside) <= 1e-8 * size) & (size > SIGNIFICANT * norms(problem.q)) & (down >= 0.5 * size**2)
    return x / size.clamp_min(1e-300).unsqueeze(1), proved & (size > 0)


def _solve(problem: Programme, solver: QPSolver, limits: Limits) -> Found:
    return solver.run(problem, dataclasses.replace(limits, floor=0.0), None)
