"""BiCGSTAB, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true
from .restart import Cycle, iterate_in_cycles
from .solver import IterativeSolver, Result, System


@options
class BiCGSTAB(IterativeSolver):
    """Stabilised biconjugate gradients, for any nonsingular matrix, in the memory of eight vectors.

    Two applications a step and no basis to store: choose it over GMRES where GMRES would need more vectors than fit
    in memory. It needs more applications than GMRES, its residual is not monotone, and it can break down: a sample
    whose recursion breaks down starts again from where it is, and is STAGNATED if that does not help, as with a
    skew-symmetric matrix, for which r^T A r = 0. A preconditioner is applied from the right.

    Args:
        rtol: tolerance relative to |b|; None takes 1e-10 in float64 and 1e-5 otherwise.
        atol: absolute tolerance.
        max_steps: budget of steps of every sample, of two applications each.

    Raises:
        ValueError: a negative tolerance; max_steps below one.

    Source: van der Vorst 1992; Sleijpen and van der Vorst 1995 for the bound on the second half of a step, which
        keeps it from vanishing with a spectrum far from the real axis.
    """

    def _run(self, system: System) -> Result:
        return iterate_in_cycles(system, _cycle, self._tolerance(system), self.max_steps)


def _cycle(system: System, tolerance: Tensor, r: Tensor, norm: Tensor, active: Tensor, budget: Tensor) -> Cycle:
    eps, tiny = torch.finfo(r.dtype).eps, torch.finfo(r.dtype).tiny
    precondition = system.precondition or (lambda u: u)
    shadow, shadow_norm = r, norm
    p, x = r, torch.zeros_like(r)
    rho = torch.linalg.vecdot(shadow, r)
    steps = torch.zeros_like(norm, dtype=torch.int64)
    evaluations = steps
    ended = torch.zeros_like(active)
    while any_true(active):
        # First half: a step of biconjugate gradients.
        p_hat = precondition(p)
        v = system.apply(p_hat)
        evaluations = evaluations + active
        pivot = torch.linalg.vecdot(shadow, v)
        broken = active & ~(pivot.abs() > eps * shadow_norm * torch.linalg.vector_norm(v, dim=1))
        ended = ended | broken
        active = active & ~broken
        alpha = (rho / torch.where(active, pivot, torch.inf)).unsqueeze(1)
        s = torch.addcmul(r, alpha, v, value=-1)
        s_norm = torch.linalg.vector_norm(s, dim=1)
        x = torch.addcmul(x, alpha, p_hat)
        steps = steps + active
        done = active & ~(s_norm > tolerance)
        ended = ended | done
        active = active & ~done
        if not any_true(active):
            break
        # Second half: a step of minimal residual along s, but never a vanishing one, which would end the recursion.
        s_hat = precondition(s)
        t = system.apply(s_hat)
        evaluations = evaluations + active
        t_norm = torch.linalg.vector_norm(t, dim=1)
        cosine = torch.linalg.vecdot(t, s) / (t_norm * s_norm).clamp_min(tiny)
        broken = active & ~(t_norm > eps * s_norm)
        ended = ended | broken
        active = active & ~broken
        bounded = torch.where(cosine < 0, cosine.clamp_max(-0.7), cosine.clamp_min(0.7))
        omega = bounded * s_norm / torch.where(active, t_norm, torch.inf)
        x = torch.addcmul(x, omega.unsqueeze(1), s_hat)
        r = torch.addcmul(s, omega.unsqueeze(1), t, value=-1)
        norm = torch.linalg.vector_norm(r, dim=1)
        before, rho = rho, torch.linalg.vecdot(shadow, r)
        broken = ~(rho.abs() > eps * shadow_norm * norm)
        ended = ended | (active & (broken | ~(norm > tolerance)))
        active = active & ~ended & (steps < budget)
        beta = torch.where(active, rho / before * alpha.squeeze(1) / omega, 0.0)
        p = torch.addcmul(r, beta.unsqueeze(1), torch.addcmul(p, omega.unsqueeze(1), v, value=-1))
    return Cycle(x, steps, evaluations, ended, torch.zeros_like(ended))
