"""Any fixed-point method as a linear solver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..options import options, require
from ..solution import Status
from ..transforms import plain
from ..tree import norms
from .restart import Cycle, iterate_in_cycles
from .solver import IterativeSolver, Result, System

if TYPE_CHECKING:
    from ..fixed_point import FixedPointSolver


@options
class FixedPointLinear(IterativeSolver):
    """The rest point of x -> x + M (b - A x), with M the identity or a preconditioner.

    Lets a backward solve use the method of its forward solve. Where the method claims convergence the true residual is
    computed, and if need be the method is started again on the correction that remains. Anderson acceleration of this
    map is GMRES, essentially, in a sliding window, and Picard iteration of it is the Neumann series.

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
        return iterate_in_cycles(system, self._cycle, self._tolerance(system), self.max_steps)

    def _cycle(
        self, system: System, tolerance: Tensor, r: Tensor, norm: Tensor, active: Tensor, budget: Tensor
    ) -> Cycle:
        from ..adjoint import UnrollAdjoint
        from ..fixed_point import Anderson, fixed_point

        r = r.masked_fill(~active.unsqueeze(1), 0.0)
        # The method will measure M r, and knows one absolute tolerance for all samples: every sample is scaled so that
        # one is its tolerance.
        shrink = norms(system.precondition(r)) / norm if system.precondition else 1.0
        target = tolerance * shrink
        scale = target.masked_fill(~active | (target == 0), 1.0).unsqueeze(1)
        r = r / scale

        def step(d: Tensor) -> Tensor:
            residual = r - system.apply(d)
            return d + (system.precondition(residual) if system.precondition else residual)

        found = fixed_point(
            step,
            torch.zeros_like(r),
            solver=Anderson() if self.solver is None else self.solver,
            # Nothing is recorded here, so there is nothing to attach either.
            adjoint=UnrollAdjoint(),
            rtol=0.0,
            # A little less than one: differences of iterates are rounded.
            atol=0.0 if self.rtol == 0 and self.atol == 0 else 0.9,
            max_steps=int(plain(budget.masked_fill(~active, self.max_steps)).min()),
        )
        stats = found.stats
        ended = stats.status != Status.MAX_STEPS
        return Cycle(
            found.value * scale, stats.steps * active, stats.evaluations * active, ended, torch.zeros_like(ended)
        )
