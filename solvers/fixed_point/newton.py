"""Newton's method, dense for small states and matrix-free otherwise."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..linear import Auto, LinearSolver
from ..options import options, require
from ..transforms import any_true, inside_transform, recording_tangents, solve_ex
from .method import Evaluated, FixedPointSolver, Proposal
from .problem import Problem

SHORTEST = 2.0**-10
"""The smallest share of a step that the line search tries."""


@dataclasses.dataclass(frozen=True)
class NewtonMemory:
    """The last accepted iterate and the step that was taken from it; None before the first.

    Attributes:
        z, step: (rows, n).
        norm: of the residual at z (rows,).
        length: share of the step that is being tried (rows,).
    """

    z: Tensor | None = None
    step: Tensor | None = None
    norm: Tensor | None = None
    length: Tensor | None = None

    def select(self, rows: Tensor) -> NewtonMemory:
        """The memory of some rows."""
        kept = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return NewtonMemory(*[None if t is None else t.index_select(0, rows) for t in kept])


@options
class Newton(FixedPointSolver):
    """z <- z + A^{-1} r(z) with A = -dr/dz, and a step that is halved per row while the residual grows.

    Quadratic near the rest point. The Jacobian is assembled and factorised for small states, and only applied,
    inside GMRES, for large ones (Newton-Krylov). Choose it for small stiff problems, and where a high accuracy is
    wanted from a function that is far from contractive.

    Attributes:
        linear_solver: solves A step = r.
        line_search: halve a row's step while its residual is larger than before, or not finite, up to ten times.

    Raises:
        TypeError: `linear_solver` is not a linear solver.
        ValueError (from the solve): a large state, and a function without a second derivative, which applying its
            Jacobian to a vector takes; or one whose Jacobian has to be assembled, since derivatives of the steps are
            recorded.

    Source: Kelley 1995, Iterative methods for linear and nonlinear equations, chapters 5, 6 and 8.
    """

    linear_solver: LinearSolver = Auto()
    line_search: bool = True

    def __post_init__(self) -> None:
        require(self.linear_solver, LinearSolver, "linear_solver")

    def init(self, z: Tensor) -> NewtonMemory:
        """Nothing known yet."""
        return NewtonMemory()

    def retries(self, memory: NewtonMemory) -> Tensor | None:
        """Those whose step can be halved once more."""
        return None if memory.length is None or not self.line_search else memory.length > SHORTEST

    def propose(self, problem: Problem, at: Evaluated, memory: NewtonMemory) -> Proposal:
        """The Newton step, or for a row whose residual grew half of the last one."""
        step, cost = self._solve(problem, at)
        # A singular Jacobian gives no step; a Picard step moves on to where it may be regular.
        sound = torch.isfinite(step).all(dim=1, keepdim=True)
        step = torch.where(sound, step, at.residual)
        one = torch.ones_like(at.norm)
        after = NewtonMemory(at.z, step, at.norm, one)
        if self.line_search and memory.z is not None:
            assert memory.step is not None and memory.norm is not None and memory.length is not None
            refused = ~(at.norm <= memory.norm) & (memory.length > SHORTEST)
            if any_true(refused):
                rows = refused.unsqueeze(1)
                z = torch.where(rows, memory.z, at.z)
                step = torch.where(rows, memory.step, step)
                length = torch.where(refused, memory.length / 2, one)
                after = NewtonMemory(z, step, torch.where(refused, memory.norm, at.norm), length)
                return Proposal(torch.addcmul(z, step, length.unsqueeze(1).to(z.dtype)), after, cost)
        return Proposal(at.z + step, after, cost)

    def _solve(self, problem: Problem, at: Evaluated) -> tuple[Tensor, int]:
        """The step and the number of derivative products that it cost."""
        if torch.is_grad_enabled() or inside_transform() or recording_tangents():
            # A taped step must itself be differentiable, which a linear solver's loop is not.
            matrix = problem.jacobian(at.z)
            # No half-precision factorisation exists.
            matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
            step = solve_ex(matrix, at.residual.to(matrix.dtype).unsqueeze(2))[0].squeeze(2)
            return step.to(at.z.dtype), matrix.shape[1]
        operator = problem.linearize(at.z)
        solved = self.linear_solver.solve(operator, at.residual.to(operator.dtype))
        return solved.value.to(at.z.dtype), int(solved.stats.evaluations.max())
