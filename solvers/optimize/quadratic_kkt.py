"""The linear systems behind quadratic programmes: saddle points, solved on the condensed matrix and refined."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..transforms import any_true
from ..tree import norms

PROXIMAL = 1e-6
"""Regularisation of an active row's multiplier in the factor, relative to the row; refinement takes it out again."""

PRIMAL = 1e-9
"""Regularisation of the variables in the factor, relative to Q; refinement takes it out again where Q needs none."""

REFINEMENTS = 12
"""The largest number of refinements of one system."""


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """C x (batch, rows) for C (batch, rows, n), or (rows, n) shared, and x (batch, n)."""
    if matrix.ndim == 2:
        return x @ matrix.mT
    # A vector from the left makes bmm a product of a row, which is the faster one on a CPU.
    return torch.bmm(x.unsqueeze(1), matrix.mT).squeeze(1)


def times_transposed(matrix: Tensor, v: Tensor) -> Tensor:
    """C' v (batch, n) for v (batch, rows)."""
    if matrix.ndim == 2:
        return v @ matrix
    return torch.bmm(v.unsqueeze(1), matrix).squeeze(1)


def condensed(Q: Tensor, C: Tensor, weight: Tensor, shift: float | Tensor) -> Tensor:
    """Q + C' diag(weight) C + shift I, (batch, n, n)."""
    batch = len(weight)
    left = C.mT if C.ndim == 3 else C.mT.expand(batch, *C.mT.shape)
    matrix = torch.bmm(left, weight.unsqueeze(2) * C).add_(Q)
    matrix.diagonal(dim1=1, dim2=2).add_(shift)
    return matrix


def factorise(Q: Tensor, C: Tensor, weight: Tensor, shift: float) -> Tensor:
    """The Cholesky factor (batch, n, n) of the condensed matrix, with as much more shift as a sample needs."""
    matrix = condensed(Q, C, weight, shift)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        size = matrix.diagonal(dim1=1, dim2=2).amax(1)
        for exponent in (-14, -12, -10, -7):
            bad = (info != 0).nonzero().flatten()
            if len(bad) == 0:
                break
            again = matrix[bad]
            again.diagonal(dim1=1, dim2=2).add_((size[bad] * 10.0**exponent).unsqueeze(1))
            factor[bad], info[bad] = torch.linalg.cholesky_ex(again)
    return factor


def solve_factor(factor: Tensor, right: Tensor) -> Tensor:
    """H^-1 r (batch, n)."""
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(2), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(2)


@dataclasses.dataclass(frozen=True)
class Saddle:
    """The matrix [Q, C'; C, -W] of a batch, with W diagonal, and what solves with it.

    Rows of C with an infinite W take no part: their multiplier is zero. Rows with W = 0 are equations.

    Attributes:
        Q: (batch, n, n), or (n, n) shared.
        C: (batch, rows, n), or (rows, n) shared.
        W: (batch, rows), not negative.
        factor: of the condensed matrix, with regularised rows (batch, n, n).
        weight: 1 / (W + regularisation) (batch, rows).
        hard: indices of the samples that refinement does not solve, the rows that take part in them, padded, and the
            pseudo-inverses of their matrices, of which nothing but these rows is kept.
        unit: what is small enough to count as zero, in a right-hand side or a solution, divided by the resolution.
    """

    Q: Tensor
    C: Tensor
    W: Tensor
    factor: Tensor
    weight: Tensor
    hard: tuple[Tensor, Tensor, Tensor] | None = None
    unit: float = 0.0

    @classmethod
    def of(cls, Q: Tensor, C: Tensor, W: Tensor, unit: float) -> Saddle:
        """Factorise; Q and the rows of C are to be scaled to about one."""
        weight = 1 / (W + PROXIMAL)
        return cls(Q, C, W, factorise(Q, C, weight, PRIMAL), weight, unit=unit)

    def select(self, rows: Tensor) -> Saddle:
        """That of some samples; without those that are hard."""
        Q = self.Q if self.Q.ndim == 2 else self.Q[rows]
        C = self.C if self.C.ndim == 2 else self.C[rows]
        return Saddle(Q, C, self.W[rows], self.factor[rows], self.weight[rows])

    def residuals(self, u: Tensor, v: Tensor, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left of both equations, and its size relative to their terms (batch,)."""
        Qu, Cv, Cu = times(self.Q, u), times_transposed(self.C, v), times(self.C, u)
        left = r - Qu - Cv
        taking = torch.isfinite(self.W)
        below = torch.where(taking, d - Cu + torch.where(taking, self.W, 0.0) * v, 0.0)
        # Where one side of the system is zero, only rounding errors of the other are left of it. C u is exact to those
        # of u, but a u that Q and C do not feel must not pass for a solution.
        given = norms(r) + norms(torch.where(taking, d, 0.0)) + self.unit
        above = (given + norms(Qu) + norms(Cv)).clamp_min(torch.finfo(u.dtype).tiny)
        relative = beyond_rounding(left, self.Q, u, v) / above
        relative = relative + norms(below) / (given + norms(u)).clamp_min(torch.finfo(u.dtype).tiny)
        return left, below, relative

    def correct(self, left: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """An approximate solution."""
        du = solve_factor(self.factor, left + times_transposed(self.C, self.weight * below))
        dv = self.weight * (times(self.C, du) - below)
        if self.hard is not None:
            rows, order, inverse = self.hard
            both = times(inverse, torch.cat([left[rows], below[rows].gather(1, order)], 1))
            n = du.shape[1]
            sparse = torch.zeros_like(below[rows]).scatter(1, order, both[:, n:])
            du, dv = du.index_copy(0, rows, both[:, :n]), dv.index_copy(0, rows, sparse)
        return du, dv

    def solve(
        self, r: Tensor, d: Tensor, u: Tensor | None = None, v: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve Q u + C'v = r, C u - W v = d, from a start; u, v and the relative residual (batch,)."""
        if u is None or v is None:
            u, v = self.correct(r, torch.where(torch.isfinite(self.W), d, 0.0))
        left, below, error = self.residuals(u, v, r, d)
        goal = 4 * torch.finfo(u.dtype).eps
        for _ in range(REFINEMENTS):
            if not any_true(error > goal):
                break
            du, dv = self.correct(left, below)
            nu, nv = u + du, v + dv
            left_n, below_n, error_n = self.residuals(nu, nv, r, d)
            better = error_n < error
            if not any_true(better):
                break
            pick = better.unsqueeze(1)
            u, v = torch.where(pick, nu, u), torch.where(pick, nv, v)
            left, below = torch.where(pick, left_n, left), torch.where(pick, below_n, below)
            progress = (error_n < 0.5 * error) & (error_n > goal)
            error = torch.where(better, error_n, error)
            if not any_true(progress):
                break
        return u, v, error

    def with_hard(self, rows: Tensor) -> Saddle:
        """The same, which solves some samples by the pseudo-inverse of the whole matrix."""
        if len(rows) == 0:
            return self
        return dataclasses.replace(self, hard=(rows, *pseudo_inverse(self.select(rows))))


def pseudo_inverse(saddle: Saddle) -> tuple[Tensor, Tensor]:
    """The rows that take part (batch, k), padded, and the pseudo-inverses (batch, n + k, n + k) of their matrices."""
    batch, n = len(saddle.W), saddle.Q.shape[-1]
    taking = torch.isfinite(saddle.W)
    rows = int(taking.sum(1).max()) if taking.shape[1] else 0
    order = torch.argsort(taking.to(torch.uint8), dim=1, descending=True, stable=True)[:, :rows]
    taken = taking.gather(1, order)
    whole = saddle.W.new_zeros(batch, n + rows, n + rows)
    whole[:, :n, :n] = saddle.Q
    every = saddle.C.expand(batch, *saddle.C.shape[-2:])
    C = every.gather(1, order.unsqueeze(2).expand(-1, -1, n)) * taken.unsqueeze(2)
    whole[:, n:, :n], whole[:, :n, n:] = C, C.mT
    whole[:, n:, n:] = torch.diag_embed(-torch.where(taken, saddle.W.gather(1, order), 0.0))
    finite = torch.isfinite(whole).flatten(1).all(1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], whole, 0.0))
    size = values.abs()
    cutoff = 10 * (n + rows) * torch.finfo(values.dtype).eps * size.amax(1, keepdim=True)
    inverse = torch.where(size > cutoff, 1 / values, 0.0)
    return order, (vectors * inverse.unsqueeze(1)) @ vectors.mT


def beyond_rounding(left: Tensor, Q: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The length of a residual Q u + C'v - r (batch,), without what rounding the products may have added to it.

    Where they cancel and nothing else pulls at u, that is all there is.
    """
    largest = Q.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    return (norms(left) - 8 * torch.finfo(u.dtype).eps * (largest * norms(u) + norms(v))).clamp_min(0)


def inactive(active: Tensor, dtype: torch.dtype) -> Tensor:
    """W of rows that are equations where `active`, and take no part elsewhere."""
    return torch.where(active, 0.0, math.inf).to(dtype)
