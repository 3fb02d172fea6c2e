"""Direct solvers: LU and Cholesky of the assembled matrices."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from ..options import options
from ..solution import Solution, Stats, Status
from ..tree import norms
from .operator import LinearOperator
from .solver import LinearSolver, Map


class DirectSolver(LinearSolver):
    """The base of solvers that factorise the matrices; one step, and n applications where they must be assembled."""

    @abc.abstractmethod
    def _factorise(self, matrix: Tensor) -> tuple[Map, Map, Tensor]:
        """Solve with A and with A^T, (batch, n, k) to (batch, n, k), and a mask (batch,) of failed samples."""

    def _solve(
        self, operator: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: Map | None
    ) -> Solution[Tensor]:
        if preconditioner is not None:
            raise ValueError(f"{type(self).__name__} is a direct solver and takes no preconditioner.")
        dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
        eps = torch.finfo(dtype).eps
        matrix, right = operator.dense().to(dtype), b.to(dtype)
        solve, solve_transposed, failed = self._factorise(matrix)
        x = solve(right.unsqueeze(2)).squeeze(2)
        size = torch.linalg.matrix_norm(matrix, 1)
        finite = size.isfinite() & right.isfinite().all(1)
        # Backward stable: a residual of rounding errors only, relative to |A| |x| + |b|. A Cholesky factor of a matrix
        # that is not symmetric fails here.
        residual = norms(right - torch.bmm(x.unsqueeze(1), matrix.mT).squeeze(1))
        scale = norms(right)
        bound = 10 * operator.size * eps * (size * norms(x) + scale)
        inverse_size = inverse_norm(solve, solve_transposed, right)
        regular = (size * inverse_size) < 1 / (2 * eps)
        status = torch.where(failed | ~(regular & (residual <= bound)), Status.STAGNATED, Status.CONVERGED)
        status = torch.where(finite, status, Status.NON_FINITE)
        lost = failed | ~finite | ~x.isfinite().all(1)
        x = x.masked_fill(lost.unsqueeze(1), math.nan)
        residual = (residual / scale).masked_fill(lost, math.nan)
        # As in the iterative solvers, and whatever the matrix: no right-hand side, no solution to look for.
        zero = scale == 0
        x = x.masked_fill(zero.unsqueeze(1), 0.0).to(b.dtype)
        residual, status = residual.masked_fill(zero, 0.0), status.masked_fill(zero, Status.CONVERGED)
        steps = (~zero).to(torch.int64)
        evaluations = torch.full_like(status, 0 if operator.assembled else operator.size)
        return Solution(x, Stats(steps, evaluations, residual, status))


@options
class LU(DirectSolver):
    """Gaussian elimination with partial pivoting."""

    def _factorise(self, matrix: Tensor) -> tuple[Map, Map, Tensor]:
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        return (
            lambda v: torch.linalg.lu_solve(factors, pivots, v),
            lambda v: torch.linalg.lu_solve(factors, pivots, v, adjoint=True),
            info != 0,
        )


@options
class Cholesky(DirectSolver):
    """A = L L^T."""

    def _factorise(self, matrix: Tensor) -> tuple[Map, Map, Tensor]:
        factor, info = torch.linalg.cholesky_ex(matrix)

        def solve(v: Tensor) -> Tensor:
            return torch.cholesky_solve(v, factor)

        return solve, solve, info != 0


def inverse_norm(solve: Map, solve_transposed: Map, like: Tensor) -> Tensor:
    """A lower bound, mostly sharp, on the 1-norm of A^-1 (batch,): two steps of Hager's ascent."""
    n = like.shape[1]
    x = torch.full_like(like, 1 / n)
    best = torch.zeros_like(like[:, 0])
    for _ in range(2):
        y = solve(x.unsqueeze(2)).squeeze(2)
        best = torch.fmax(best, y.abs().sum(1))
        z = solve_transposed(torch.where(y < 0, -1.0, 1.0).to(y.dtype).unsqueeze(2)).squeeze(2)
        # The unit vector of the steepest ascent.
        x = (torch.arange(n, device=like.device) == z.abs().argmax(1, keepdim=True)).to(like.dtype)
    return torch.fmax(best, solve(x.unsqueeze(2)).squeeze(2).abs().sum(1))
