"""A guess of the active set from the dual: a linear complementarity problem in the inequalities alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .quadratic_kkt import solve_factor, times, times_transposed
from .quadratic_problem import Programme

STEPS = 15
"""Interior point steps after which the samples that are left are somebody else's."""

FIRST = 2
"""The first step after which active sets are tried: before, the direction says little about them."""

TRIALS = 4
"""Active sets that one step may lead to, each from the signs of the one before."""

SIGN = 1e-9
"""What counts as negative, relative to the largest entry."""


def guess_active(problem: Programme) -> tuple[Tensor, Tensor, Tensor]:
    """The active inequalities (batch, m), the samples (batch,) in which they have the right signs, and steps (batch,).

    Nothing that follows relies on the guess: it is exact up to the condition number of Q, and meant to be checked.
    It costs m x m factorisations, with no products of matrices but at the start; the method for a positive definite Q
    and not many more inequalities than variables.
    """
    K, e = reduced(problem)
    batch, m = e.shape
    active = torch.zeros(batch, m, dtype=torch.bool, device=e.device)
    right = torch.zeros(batch, dtype=torch.bool, device=e.device)
    steps = torch.zeros(batch, dtype=torch.int64, device=e.device)
    rows = (torch.isfinite(K).flatten(1).all(1) & torch.isfinite(e).all(1)).nonzero().flatten()
    if len(rows) < batch:
        K, e = K[rows], e[rows]
    if len(rows) == 0:
        return active, right, steps
    diagonal = K.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    size = (e.abs() / diagonal.sqrt()).mean(1, keepdim=True).clamp_min(1e-6)
    z = torch.maximum(-e / diagonal, size / diagonal.sqrt())
    s = torch.maximum(e, size * diagonal.sqrt())
    for k in range(STEPS):
        z, s, guess = _step(K, e, z, s)
        steps[rows] = k + 1
        if k < FIRST:
            continue
        solved, sets = _try(K, e, guess)
        active[rows[solved]] = sets
        right[rows[solved]] = True
        keep = torch.ones_like(rows, dtype=torch.bool)
        keep[solved] = False
        keep &= torch.isfinite(z).all(1) & torch.isfinite(s).all(1)
        kept = keep.nonzero().flatten()
        if len(kept) == 0:
            break
        if len(kept) < len(rows):
            rows, K, e, z, s = rows[kept], K[kept], e[kept], z[kept], s[kept]
    return active, right, steps


def reduced(problem: Programme) -> tuple[Tensor, Tensor]:
    """K (batch, m, m) and e (batch, m) of s = e + K z, s >= 0, z >= 0, s'z = 0.

    In coordinates in which Q is the identity, the equations are projected out.
    """
    m, batch = problem.m, problem.batch
    factor, right = problem.root, problem.C.mT
    assert factor is not None
    if factor.ndim < 3 and right.ndim == 3:
        factor = factor.expand(batch, *factor.shape)
    white = torch.linalg.solve_triangular(factor, right, upper=False)
    if factor.ndim == 3:
        q = torch.linalg.solve_triangular(factor, problem.q.unsqueeze(2), upper=False).squeeze(2)
    else:
        q = torch.linalg.solve_triangular(factor, problem.q.mT, upper=False).mT
    G, A, d = white[..., :m], white[..., m:], problem.d
    if A.shape[-1] == 0:
        K, e = G.mT @ G, d + times(G.mT, q)
    else:
        gram = A.mT @ A
        # Rows that repeat each other make it singular.
        gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-12)
        inner = torch.linalg.cholesky_ex(gram)[0]
        basis = torch.linalg.solve_triangular(inner, A.mT, upper=False)
        if inner.ndim == 3:
            feasible = torch.linalg.solve_triangular(inner, d[:, m:].unsqueeze(2), upper=False).squeeze(2)
        else:
            feasible = torch.linalg.solve_triangular(inner, d[:, m:].mT, upper=False).mT
        point = times_transposed(basis, feasible)
        q = q + point
        q = q - times_transposed(basis, times(basis, q))
        projected = G - basis.mT @ (basis @ G)
        K, e = projected.mT @ projected, d[:, :m] - times(G.mT, point) + times(projected.mT, q)
    if K.ndim == 2:
        K = K.expand(batch, m, m)
    return K, e


def _step(K: Tensor, e: Tensor, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictor and corrector; what follows z and s, and the active set that the predictor aims at."""
    matrix = K.clone(memory_format=torch.contiguous_format)
    matrix.diagonal(dim1=1, dim2=2).add_(s / z)
    factor = torch.linalg.cholesky_ex(matrix)[0]
    left = s - e - times(K, z)
    mu = (s * z).mean(1, keepdim=True)
    dz = solve_factor(factor, left - s)
    ds = -s - s / z * dz
    guess = dz / z > ds / s
    length = torch.minimum(to_boundary(s, ds), to_boundary(z, dz)).clamp_max(1.0)
    ahead = ((s + length * ds) * (z + length * dz)).mean(1, keepdim=True)
    target = (ahead / mu).clamp(0.0, 1.0) ** 3 * mu - s * z - ds * dz
    dz = solve_factor(factor, left + target / z)
    ds = (target - s * dz) / z
    length = (0.99 * torch.minimum(to_boundary(s, ds), to_boundary(z, dz))).clamp_max(1.0)
    return z + length * dz, s + length * ds, guess


def to_boundary(t: Tensor, dt: Tensor) -> Tensor:
    """The step (batch, 1) at which the first entry becomes zero."""
    return torch.where(dt < 0, -t / dt, math.inf).amin(1, keepdim=True)


def _try(K: Tensor, e: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Which samples have the right signs on their active set, or on one of those that the signs lead to."""
    at = torch.arange(len(e), device=e.device)
    solved, sets = [], []
    for _ in range(TRIALS):
        z = _solve_active(K, e, active)
        s = torch.where(active, 0.0, e + times(K, z))
        least_z = SIGN * z.abs().amax(1, keepdim=True)
        least_s = SIGN * e.abs().amax(1, keepdim=True)
        right = ((z >= -least_z) & (s >= -least_s)).all(1)
        following = z - s > 0
        done = right.nonzero().flatten()
        solved.append(at[done])
        sets.append(active[done])
        rest = (~right & (following != active).any(1)).nonzero().flatten()
        if len(rest) == 0:
            break
        at, active = at[rest], following[rest]
        if len(rest) < len(K):
            K, e = K[rest], e[rest]
    return torch.cat(solved), torch.cat(sets)


def _solve_active(K: Tensor, e: Tensor, active: Tensor) -> Tensor:
    """z with K z = -e in the active rows, and zero in the others."""
    counts = active.sum(1)
    most = int(counts.max())
    if most == 0:
        return torch.zeros_like(e)
    # The active rows in front, so that only they are factorised.
    order = torch.argsort(active.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
    part = K.gather(1, order.unsqueeze(2).expand(-1, -1, K.shape[2]))
    part = part.gather(2, order.unsqueeze(1).expand(-1, most, -1))
    taken = active.gather(1, order)
    part = part * (taken.unsqueeze(1) & taken.unsqueeze(2))
    part.diagonal(dim1=1, dim2=2).add_((~taken).to(e.dtype) + 1e-12)
    inner = solve_factor(torch.linalg.cholesky_ex(part)[0], torch.where(taken, -e.gather(1, order), 0.0))
    return torch.zeros_like(e).scatter(1, order, torch.where(taken, inner, 0.0))
