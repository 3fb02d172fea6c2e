"""Conjugate gradients, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true
from .restart import Cycle, iterate_in_cycles
from .solver import IterativeSolver, Result, System


@options
class CG(IterativeSolver):
    """Conjugate gradients, for symmetric positive definite matrices.

    The cheapest of the Krylov methods: one application a step, and four vectors of memory. The true residual is
    computed where the recursion claims convergence, for one application more. With a preconditioner, which must be
    symmetric positive definite too, the residual is still that of A x = b.

    A direction p with p^T A p <= 0 shows that the matrix is not positive definite: the sample ends as STAGNATED, with
    the iterate that it had reached. A matrix that is not symmetric is not noticed as such, but the residual it ends
    with is the true one.

    Args:
        rtol: tolerance relative to |b|; None takes 1e-10 in float64 and 1e-5 otherwise.
        atol: absolute tolerance.
        max_steps: budget of steps of every sample.

    Raises:
        ValueError: a negative tolerance; max_steps below one.

    Source: Hestenes and Stiefel 1952, section 3; Saad 2003, algorithms 6.18 and 9.1.
    """

    def _run(self, system: System) -> Result:
        return iterate_in_cycles(system, _cycle, self._tolerance(system), self.max_steps)


def _cycle(system: System, tolerance: Tensor, r: Tensor, norm: Tensor, active: Tensor, budget: Tensor) -> Cycle:
    tiny = torch.finfo(r.dtype).tiny
    x = p = torch.zeros_like(r)
    before = torch.ones_like(norm)
    steps = torch.zeros_like(norm, dtype=torch.int64)
    evaluations = steps
    ended = curved = torch.zeros_like(active)
    while any_true(active):
        z = system.precondition(r) if system.precondition else r
        rz = torch.linalg.vecdot(r, z)
        p = torch.addcmul(z, (rz / before.clamp_min(tiny)).unsqueeze(1), p)
        ap = system.apply(p)
        curvature = torch.linalg.vecdot(p, ap)
        evaluations = evaluations + active
        # A NaN is no curvature either, and shows in the true residual.
        flat = active & ~((curvature > 0) & (rz > 0))
        curved = curved | flat
        active = active & ~flat
        # Zero in samples that are done: they do not move.
        alpha = (active * rz / curvature.clamp_min(tiny)).unsqueeze(1)
        x = torch.addcmul(x, alpha, p)
        r = torch.addcmul(r, alpha, ap, value=-1)
        before = rz
        steps = steps + active
        done = active & ~(torch.linalg.vector_norm(r, dim=1) > tolerance)
        ended = ended | done
        active = active & ~done & (steps < budget)
    return Cycle(x, steps, evaluations, ended, curved)
