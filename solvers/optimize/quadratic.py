"""The problem function of quadratic programmes."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import require
from ..solution import Solution, Stats
from ..transforms import all_true, any_true, autocast_to, not_compiled
from .central_path import CentralPath
from .interior_point import InteriorPoint
from .quadratic_attach import objective_at, saddle_solve
from .quadratic_find import Optimum, Request, find
from .quadratic_inputs import Inputs, check_inputs
from .quadratic_kkt import times
from .quadratic_problem import Limits, QPSolver


class Duals(NamedTuple):
    """Lagrange multipliers: of the inequalities (batch, m), not negative, and of the equations (batch, p)."""

    inequality: Tensor
    equality: Tensor


class Certificate(NamedTuple):
    """Proofs that samples have no optimum; zero in the others.

    `inequality` z (batch, m) >= 0 and `equality` y (batch, p): G'z + A'y = 0 and h'z + b'y < 0, so no x is feasible.
    `ray` d (batch, n): Qd = 0, Gd <= 0, Ad = 0 and q'd < 0, so the objective falls without end along it.
    """

    inequality: Tensor
    equality: Tensor
    ray: Tensor


@dataclasses.dataclass
class QPSolution(Solution[Tensor]):
    """The result of a quadratic or linear programme; `value` is x (batch, n).

    Everything but the statistics and the certificate is differentiable. Samples that are infeasible, unbounded or not
    finite are NaN, and no gradient passes through them.

    Attributes:
        duals: the Lagrange multipliers; d(objective)/dh is minus those of the inequalities, d(objective)/db minus those
            of the equations.
        slack: h - G x (batch, m).
        objective: 1/2 x'Qx + q'x at the optimum (batch,).
        active: which inequalities hold as equations, with a proof (batch, m); all False in samples without one.
        certificate: why there is no optimum where there is none.
    """

    duals: Duals = dataclasses.field(kw_only=True)
    slack: Tensor = dataclasses.field(kw_only=True)
    objective: Tensor = dataclasses.field(kw_only=True)
    active: Tensor = dataclasses.field(kw_only=True)
    certificate: Certificate = dataclasses.field(kw_only=True, repr=False)


@not_compiled
def quadratic_program(
    Q: Tensor,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: QPSolver | None = None,
    adjoint: CentralPath | None = None,
    rtol: float = 1e-10,
    atol: float = 0.0,
    max_steps: int | None = None,
    throw: bool | str = False,
    start: Solution[Tensor] | None = None,
) -> QPSolution:
    """Minimise 1/2 x'Qx + q'x subject to Gx <= h and Ax = b, for every sample of a batch, differentiably.

    Every argument may have the batch in front or be shared by all samples; gradients of shared ones are sums over the
    batch. Derivatives in all six are exact to any order, also under torch.func: once the active set is found, the
    optimum is the solution of a linear system. Where constraints repeat each other, their multipliers are not unique,
    and the least ones are taken. Where no active set can be proved, derivatives are those of the barrier problem.

    float32 and half-precision programmes are solved in float64, and rounded.

    Args:
        Q: symmetric positive semidefinite (batch, n, n) or (n, n). Derivatives want a unique optimum.
        q: the linear part of the objective (batch, n) or (n,).
        G: inequality constraints (batch, m, n) or (m, n), or None.
        h: their upper bounds (batch, m) or (m,); an infinite one leaves its row out.
        A: equality constraints (batch, p, n) or (p, n), or None. They may repeat each other.
        b: their right-hand sides (batch, p) or (p,).
        solver: None takes `InteriorPoint()`.
        adjoint: None differentiates the optimum; `CentralPath(barrier)` solves and differentiates a smoothed programme.
        rtol: a sample has converged where the residual of each optimality condition is at most atol + rtol times the
            size of its terms, after scaling. A proved active set leaves residuals of rounding errors, whatever rtol.
        atol: see rtol.
        max_steps: the largest number of steps; None takes what suits the solver.
        throw: raise `SolverError` if some sample does not converge; "warn" warns instead.
        start: an earlier solution of a similar programme.

    Returns:
        The `QPSolution`; x is (batch, n), with a batch of one where every argument is shared.

    Raises:
        TypeError: an argument is no tensor; `solver` or `adjoint` is not one.
        ValueError: shapes, dtypes or devices do not fit; Q is not symmetric, or indefinite; a tolerance is negative.
        SolverError: see `throw`.

    Source: Amos and Kolter 2017, OptNet (the layer); Magoon et al. 2025, dQP (the active set's system).
    """
    inputs = check_inputs(Q, q, G, h, A, b)
    solution = solve_program(inputs, solver, adjoint, rtol, atol, max_steps, start)
    solution.check(throw, "quadratic_program")
    return solution


def solve_program(
    inputs: Inputs, solver: QPSolver | None, adjoint: CentralPath | None, rtol: float, atol: float,
    max_steps: int | None, start: Solution[Tensor] | None,
) -> QPSolution:  # fmt: skip
    """The solution of checked inputs."""
    solver = InteriorPoint() if solver is None else solver
    require(solver, QPSolver, "solver")
    if adjoint is not None:
        require(adjoint, CentralPath, "adjoint")
    limits = make_limits(rtol, atol, solver.budget if max_steps is None else max_steps)
    with autocast_to(None, inputs.q.device):
        barrier = 0.0 if adjoint is None else adjoint.barrier
        return _solve(inputs, Request(solver, limits, barrier, torch.finfo(inputs.dtype).eps), start)


def make_limits(rtol: float, atol: float, max_steps: int) -> Limits:
    """Limits of a solve.

    Raises:
        ValueError: a tolerance is negative, rtol is zero, max_steps is below one.
    """
    if not (isinstance(rtol, (int, float)) and 0 < rtol < math.inf):
        raise ValueError(f"rtol must be a positive finite number; got {rtol!r}.")
    if not (isinstance(atol, (int, float)) and 0 <= atol < math.inf):
        raise ValueError(f"atol must be a finite number that is not negative; got {atol!r}.")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be an integer of at least 1; got {max_steps!r}.")
    return Limits(float(rtol), atol / rtol, max_steps)


def _solve(inputs: Inputs, request: Request, start: Solution[Tensor] | None) -> QPSolution:
    Q, q, m = inputs.Q, inputs.q, inputs.m
    C, d = inputs.rows()
    x0, v0 = _start(start, q, d)
    with torch.no_grad():
        found = Optimum(*find(Q.detach(), q.detach(), C.detach(), d.detach(), m, request, x0, v0))
    lost = ~torch.isfinite(found.x).all(1)
    some_lost = any_true(lost)
    if some_lost:
        # Constants in their place, so that no NaN of theirs reaches what all samples share.
        eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
        if Q.ndim == 3:
            Q = torch.where(lost[:, None, None], eye, Q)
        if C.ndim == 3:
            C = torch.where(lost[:, None, None], 0.0, C)
        q, d = torch.where(lost[:, None], 0.0, q), torch.where(lost[:, None], 0.0, d)
    x, v = _attach(Q, q, C, d, m, found, lost)
    proved = found.proved | lost
    objective = objective_at(x, v, Q, q, C, d)
    if not all_true(proved):
        objective = torch.where(proved, objective, (x * (times(Q, x) / 2 + q)).sum(1))
    slack = (d - times(C, x))[:, :m]
    if some_lost:
        x, v, slack = (torch.where(lost[:, None], math.nan, t) for t in (x, v, slack))
        objective = torch.where(lost, math.nan, objective)
    # An unbounded row is never in the way.
    slack = torch.where(d[:, :m] == math.inf, math.inf, slack)
    steps = found.steps
    stats = Stats(steps, steps, found.residual, found.status)
    dtype = inputs.dtype
    return QPSolution(
        value=x.to(dtype),
        stats=stats,
        warm=(x.detach(), v.detach()),
        duals=Duals(v[:, :m].to(dtype), v[:, m:].to(dtype)),
        slack=slack.to(dtype),
        objective=objective.to(dtype),
        active=(found.W[:, :m] == 0) & found.proved.unsqueeze(1),
        certificate=Certificate(found.farkas[:, :m].to(dtype), found.farkas[:, m:].to(dtype), found.ray.to(dtype)),
    )


def _attach(Q: Tensor, q: Tensor, C: Tensor, d: Tensor, m: int, found: Optimum, lost: Tensor) -> tuple[Tensor, Tensor]:
    """x and v with derivatives: Newton's step from the optimum, whose value is known to be zero."""
    x0, v0 = torch.where(lost[:, None], 0.0, found.x), torch.where(lost[:, None], 0.0, found.v)
    scales = (found.factor, found.rows, found.objective)
    finite = torch.isfinite(d)
    d = torch.where(finite, d, 0.0)
    C = C if all_true(finite) else torch.where(finite.unsqueeze(2), C.expand(len(d), *C.shape[-2:]), 0.0)
    proved = found.proved | lost
    # Slacks take part where the barrier's derivative is wanted: C x - W v = d - 2 s, with s v constant.
    slack = torch.where(proved[:, None] | ~torch.isfinite(found.W), 0.0, found.W * v0)
    x, v = saddle_solve(Q, C, found.W, -q, d - 2 * slack, *scales, x0, v0)
    if all_true(proved):
        return x, v
    # s = mu / v bends, which second derivatives feel: one more step, at the matrix of the first.
    held = proved[:, None] | (slack == 0)
    inner = torch.where(held, 1.0, v)
    moved = torch.where(held, 0.0, slack * v0 / inner)
    W = torch.where(held, found.W, moved / inner)
    return saddle_solve(Q, C, W, -q, d - 2 * moved, *scales, x0, v0)


def _start(start: Solution[Tensor] | None, q: Tensor, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if start is None:
        return None, None
    warm = start.warm
    fits = isinstance(warm, tuple) and len(warm) == 2 and warm[0].shape == q.shape and warm[1].shape == d.shape
    if not fits:
        raise ValueError(
            f"start: expected the solution of a programme of the same shape, x {tuple(q.shape)} and {d.shape[1]} "
            f"constraints; got {tuple(start.value.shape)}."
        )
    return warm
