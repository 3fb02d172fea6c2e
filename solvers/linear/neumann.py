"""The Neumann series."""

from __future__ import annotations

import math

import torch

from ..options import options
from ..solution import Status
from ..transforms import all_true, any_true
from ..tree import norms
from .solver import IterativeSolver, Result, System, check_count


@options
class Neumann(IterativeSolver):
    """The Neumann series, x <- x + M (b - A x), with M the identity or a preconditioner.

    It converges where the spectral radius of I - M A is below one, at that rate, and so suits the adjoint of a map that
    contracts well; elsewhere choose GMRES, whose residual falls at least as fast. From x0 = 0, with rtol=0, and while
    the residual falls, max_steps=k gives the truncated series of k terms, sum over i < k of (I - M A)^i M b.

    The iterate with the least residual is returned. A sample whose least residual is `patience` steps old, or was
    a millionth of the present one, is diverging and ends as STAGNATED.

    Args:
        rtol: tolerance relative to |b|; None takes 1e-10 in float64 and 1e-5 otherwise.
        atol: absolute tolerance.
        max_steps: budget of steps of every sample, of one application each.
        patience: for how many steps in a row the residual may be no smaller than it was before them. A matrix far from
            normal makes the residual grow at first even where the series converges.

    Raises:
        ValueError: a negative tolerance; max_steps or patience below one.

    Source: Neumann 1877; Lorraine, Vicol and Duvenaud 2020, section 4, for its use in implicit differentiation.
    """

    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "patience", self.patience)

    def _run(self, system: System) -> Result:
        tolerance = self._tolerance(system)
        x, r = system.x0, system.b
        steps = torch.zeros_like(system.norm, dtype=torch.int64)
        evaluations = steps
        if x is None:
            x, norm = torch.zeros_like(r), system.norm
        else:
            r = system.b - system.apply(x)
            norm, evaluations = norms(r), evaluations + 1
        best, least, age = x, norm, steps
        finite, converged = norm < math.inf, norm <= tolerance
        stagnated = torch.zeros_like(converged)
        active = finite & ~converged
        while any_true(active):
            direction = system.precondition(r) if system.precondition else r
            x = torch.addcmul(x, active.to(x.dtype).unsqueeze(1), direction)
            r = system.b - system.apply(x)
            norm = norms(r)
            steps, evaluations = steps + active, evaluations + active
            better = active & (norm < least)
            if all_true(better):
                best = x
            else:
                best = torch.where(better.unsqueeze(1), x, best)
            least = torch.where(better, norm, least)
            age = (age + 1) * ~better
            finite = finite & ((norm < math.inf) | ~active)
            converged = converged | (better & (norm <= tolerance))
            diverging = (age >= self.patience) | (norm > 1e6 * least)
            stagnated = stagnated | (active & ~converged & diverging)
            active = active & finite & ~converged & ~stagnated & (steps < self.max_steps)
        status = torch.full_like(steps, Status.MAX_STEPS).masked_fill(stagnated, Status.STAGNATED)
        status = status.masked_fill(converged, Status.CONVERGED).masked_fill(~finite, Status.NON_FINITE)
        return Result(best, system.relative(least), steps, evaluations, status)
