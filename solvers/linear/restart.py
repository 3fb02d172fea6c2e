"""Methods in cycles: what a cycle claims is held against the true residual."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..solution import Status
from ..transforms import all_true, any_true
from ..tree import norms
from .solver import Result, System


@dataclasses.dataclass
class Cycle:
    """What one cycle did.

    Attributes:
        update: (batch, n) to be added to x.
        steps: (batch,) steps that the sample took.
        evaluations: (batch,) applications of the operator that it took part in.
        ended: (batch,) True where the recursion claims convergence or broke down, False where the cycle was merely
            full.
        stop: (batch,) True where another cycle is not worth trying.
    """

    update: Tensor
    steps: Tensor
    evaluations: Tensor
    ended: Tensor
    stop: Tensor


def iterate_in_cycles(
    system: System,
    cycle: Callable[[System, Tensor, Tensor, Tensor, Tensor, Tensor], Cycle],
    tolerance: Tensor,
    max_steps: int,
) -> Result:
    """Run cycles until every sample's true residual is small, or will not become so.

    A cycle that does not reduce a sample's residual (by 0.1 %) is undone: no sample ends with a larger residual than
    it began with, nor with an x that a singular matrix has blown up. Such a sample is STAGNATED, and so is one whose
    recursion claimed convergence, or broke down, in a cycle that did not halve its residual: rounding allows no better.

    Args:
        system: the systems.
        cycle: (system, tolerance, r, |r|, active, budget) -> Cycle, from the residual r (batch, n), for the samples in
            `active`, with at most `budget` (batch,) steps each.
        tolerance: (batch,) for |b - A x|.
        max_steps: budget of steps of a sample over all cycles.
    """
    x, r = system.x0, system.b
    norm = system.norm
    steps = torch.zeros_like(norm, dtype=torch.int64)
    evaluations = steps
    if x is not None:
        r = system.b - system.apply(x)
        norm, evaluations = norms(r), evaluations + 1
    finite = norm < math.inf
    converged = norm <= tolerance
    stagnated = torch.zeros_like(converged)
    active = finite & ~converged
    while any_true(active):
        done = cycle(system, tolerance, r, norm, active, max_steps - steps)
        candidate = done.update if x is None else x + done.update
        r_new = system.b - system.apply(candidate)
        norm_new = norms(r_new)
        close = norm_new <= tolerance
        better = active & (close | (norm_new < 0.999 * norm))
        steps = steps + done.steps
        evaluations = evaluations + done.evaluations + active
        finite = finite & ((norm_new < math.inf) | ~active)
        converged = converged | (better & close)
        exhausted = steps >= max_steps
        stuck = ~better | (done.ended & ~(norm_new < 0.5 * norm))
        stagnated = stagnated | (active & ~converged & (done.stop | (stuck & ~exhausted)))
        norm = torch.where(better, norm_new, norm)
        active = active & finite & ~converged & ~stagnated & ~exhausted
        # Selecting rows is several times slower than arithmetic, and mostly there is nothing to select.
        if all_true(better):
            x, r = candidate, r_new
        else:
            column = better.unsqueeze(1)
            x, r = torch.where(column, candidate, 0.0 if x is None else x), torch.where(column, r_new, r)
    status = torch.full_like(steps, Status.MAX_STEPS).masked_fill(stagnated, Status.STAGNATED)
    status = status.masked_fill(converged, Status.CONVERGED).masked_fill(~finite, Status.NON_FINITE)
    return Result(torch.zeros_like(r) if x is None else x, system.relative(norm), steps, evaluations, status)
