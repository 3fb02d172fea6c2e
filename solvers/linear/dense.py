"""Direct solvers: LU and Cholesky of the assembled matrices."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from ..options import options
from ..solution import Status
from ..transforms import inside_vmap
from ..tree import norms
from .solver import LinearSolver, Map, Result, System

_back = torch.linalg.solve_triangular


class DirectSolver(LinearSolver):
    """The base of solvers that factorise the matrices; one step, and n applications where they must be assembled."""

    @abc.abstractmethod
    def _factorise(self, matrix: Tensor) -> tuple[Map, Map, Tensor]:
        """Solve with A and with A^T, (batch, n, k) to (batch, n, k), and a mask (batch,) of failed samples."""

    def _run(self, system: System) -> Result:
        if system.precondition is not None:
            raise ValueError(f"{type(self).__name__} is a direct solver and takes no preconditioner.")
        b, n = system.b, system.operator.size
        eps = torch.finfo(b.dtype).eps
        matrix = system.operator.dense().to(b.dtype)
        solve, solve_transposed, failed = self._factorise(matrix)
        x = solve(b.unsqueeze(2)).squeeze(2)
        residual = norms(b - torch.bmm(x.unsqueeze(1), matrix.mT).squeeze(1))
        # Where the residual is more than rounding errors, the factors are those of another matrix: a Cholesky factor
        # reads the lower triangle alone.
        size = torch.linalg.matrix_norm(matrix, 1)
        exact = residual <= 10 * n * eps * (size * norms(x) + system.norm)
        regular = size * inverse_norm(solve, solve_transposed, b) < 1 / (2 * eps)
        status = torch.full_like(failed, Status.CONVERGED, dtype=torch.int64)
        status = status.masked_fill(failed | ~(regular & exact), Status.STAGNATED)
        # An entry of the matrix or of b, or the overflow of x.
        finite = (size < math.inf) & (system.norm < math.inf) & (failed | (residual < math.inf))
        status = status.masked_fill(~finite, Status.NON_FINITE)
        lost = failed | ~finite
        x = x.masked_fill(lost.unsqueeze(1), math.nan)
        residual = system.relative(residual).masked_fill(lost, math.nan)
        # As in the iterative solvers, and whatever the matrix: where b is zero, so is x.
        zero = system.norm == 0
        return Result(
            x.masked_fill(zero.unsqueeze(1), 0.0),
            residual.masked_fill(zero, 0.0),
            (~zero).to(torch.int64),
            torch.full_like(status, 0 if system.operator.assembled else n),
            status.masked_fill(zero, Status.CONVERGED),
        )


@options
class LU(DirectSolver):
    """Gaussian elimination with partial pivoting: for any nonsingular matrix, small enough to be assembled.

    A sample whose matrix is singular, or so near to it that its estimated condition number exceeds half the inverse of
    the machine epsilon, is STAGNATED; its value is NaN where a pivot was exactly zero. Everything else is solved with
    a residual of rounding errors relative to |A| |x| + |b|.

    Source: Higham 2002, theorem 9.4 (backward stability) and algorithm 15.1 (the condition estimate).
    """

    def _factorise(self, matrix: Tensor) -> tuple[Map, Map, Tensor]:
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        if inside_vmap():
            # Mapped over the right-hand sides inside a map over both, lu_solve pairs them with other matrices' factors.
            order, lower, upper = torch.lu_unpack(factors, pivots)
            return (
                lambda v: _back(upper, _back(lower, order.mT @ v, upper=False, unitriangular=True), upper=True),
                lambda v: order @ _back(lower.mT, _back(upper.mT, v, upper=False), upper=True, unitriangular=True),
                info != 0,
            )
        return (
            lambda v: torch.linalg.lu_solve(factors, pivots, v),
            lambda v: torch.linalg.lu_solve(factors, pivots, v, adjoint=True),
            info != 0,
        )


@options
class Cholesky(DirectSolver):
    """A = L L^T: for symmetric positive definite matrices, in half the operations of `LU`.

    A sample is STAGNATED, with the value NaN, where its matrix is not positive definite; and with whatever value came
    out where the matrix is not symmetric or too near to singular, as in `LU`.

    Source: Higham 2002, theorems 10.3 and 10.4.
    """

    def _factorise(self, matrix: Tensor) -> tuple[Map, Map, Tensor]:
        factor, info = torch.linalg.cholesky_ex(matrix)

        def solve(v: Tensor) -> Tensor:
            return torch.cholesky_solve(v, factor)

        return solve, solve, info != 0


def inverse_norm(solve: Map, solve_transposed: Map, like: Tensor) -> Tensor:
    """A lower bound, mostly sharp, on the 1-norm of A^-1 (batch,): two steps of Hager's ascent.

    Args:
        solve: v -> A^-1 v for (batch, n, k).
        solve_transposed: v -> A^-T v.
        like: a tensor (batch, n) of the dtype and device to work in.

    Source: Hager 1984; Higham 2002, algorithm 15.1.
    """
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
