"""Any fixed-point method as a linear solver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..options import options, require
from ..solution import Status
from ..tree import norms
from .solver import IterativeSolver, Result, System

if TYPE_CHECKING:
    from ..fixed_point import FixedPointSolver


@options
class FixedPointLinear(IterativeSolver):
    """The rest point of x -> x + M (b - A x), with M the identity or a preconditioner.

    Lets a backward solve use the method of its forward solve. Anderson acceleration of this map is, to first order,
    GMRES restarted in a sliding window, and Picard iteration of it the Neumann series.

    Args:
        rtol: tolerance relative to |b|; None takes 1e-10 in float64 and 1e-5 otherwise.
        atol: absolute tolerance.
        max_steps: budget of steps of every sample.
        solver: the fixed-point method; None takes `Anderson()`.

    Raises:
        ValueError: a negative tolerance; max_steps below one.
        TypeError: `solver` is not a fixed-point method.

    Source: Walker and Ni 2011, theorem 2.2, for Anderson acceleration and GMRES.
    """

    solver: FixedPointSolver | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver is not None:
            # The fixed-point methods are built on this package: imported when it is complete.
            from ..fixed_point import FixedPointSolver

            require(self.solver, FixedPointSolver, "solver")

    def _run(self, system: System) -> Result:
        from ..adjoint import UnrollAdjoint
        from ..fixed_point import Anderson, fixed_point

        tolerance = self._tolerance(system)
        endless = self.rtol == 0 and self.atol == 0
        # The driver knows one absolute tolerance for all samples: they are scaled so that one is the tolerance of each.
        scale = tolerance.masked_fill(tolerance == 0, 1.0).unsqueeze(1)
        b = system.b / scale

        def step(x: Tensor) -> Tensor:
            residual = b - system.apply(x)
            return x + (system.precondition(residual) if system.precondition else residual)

        found = fixed_point(
            step,
            torch.zeros_like(b) if system.x0 is None else system.x0 / scale,
            solver=Anderson() if self.solver is None else self.solver,
            # Nothing is recorded here, so there is nothing to attach either.
            adjoint=UnrollAdjoint(),
            rtol=0.0,
            atol=0.0 if endless else 1.0,
            max_steps=self.max_steps,
        )
        x = found.value * scale
        norm = norms(system.b - system.apply(x))
        # The method measured the residual as the difference of two iterates, and a preconditioned one at that.
        exact = norm <= tolerance + 4 * torch.finfo(b.dtype).eps * norms(x)
        status = found.stats.status
        status = status.masked_fill((status == Status.CONVERGED) & ~exact, Status.STAGNATED)
        status = status.masked_fill((status == Status.MAX_STEPS) & exact, Status.CONVERGED)
        status = status.masked_fill(~(norm < torch.inf), Status.NON_FINITE)
        return Result(x, system.relative(norm), found.stats.steps, found.stats.evaluations + 1, status)
