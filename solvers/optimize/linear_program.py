"""The problem function of linear programmes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import require
from ..solution import Solution, Stats
from ..transforms import any_true, autocast_to, inside_transform, not_compiled
from .central_path import CentralPath
from .pdhg import PDHG, Constraints, iterate
from .quadratic import Certificate, Duals, QPSolution, make_limits, solve_program
from .quadratic_inputs import check_inputs
from .quadratic_problem import QPSolver

ASSEMBLED = 1024
"""Variables and constraints together up to which a sparse programme's active set is solved exactly, densely."""

NAMES = ("Q", "c", "G", "h", "A", "b")


@not_compiled
def linear_program(
    c: Tensor,
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
    """Minimise c'x subject to Gx <= h and Ax = b, for every sample of a batch, differentiably.

    The variables are free: bounds are rows of G. The optimum is a vertex, which moves with G, h, A and b, and these
    derivatives are exact. It does not move with c, until it jumps: asking `value` for a gradient towards c raises,
    since it would be zero. Ask for `CentralPath(barrier)` by name, which smooths the programme. The derivatives of
    `objective` and of `duals` are exact in all arguments: d(objective)/dc = x, d(objective)/dh = -duals.inequality.

    With a sparse G or A, which all samples share, the method is `PDHG`. Up to 1024 variables and rows together the
    vertex that it finds is then solved for exactly, and everything is differentiable. Above that nothing is factorised,
    the result is as exact as `rtol` says (choose 1e-4 to 1e-8), and only `objective` is differentiable, in c, h and b;
    one without an optimum ends as MAX_STEPS, without a certificate.

    Args:
        c: the objective (batch, n) or (n,).
        G: inequality constraints (batch, m, n) or (m, n), dense or sparse CSR, or None.
        h: their upper bounds (batch, m) or (m,); an infinite one leaves its row out.
        A: equality constraints (batch, p, n) or (p, n), dense or sparse CSR, or None.
        b: their right-hand sides (batch, p) or (p,).
        solver: None takes `InteriorPoint()`, or `PDHG()` where a matrix is sparse.
        adjoint: None differentiates the vertex; `CentralPath(barrier)` solves and differentiates a smoothed programme.
        rtol: as in `quadratic_program`.
        atol: see rtol.
        max_steps: the largest number of steps; None takes what suits the solver.
        throw: raise `SolverError` if some sample does not converge; "warn" warns instead.
        start: an earlier solution of a similar programme.

    Returns:
        The `QPSolution`; x is (batch, n).

    Raises:
        TypeError, ValueError, SolverError: as `quadratic_program`.
        ValueError: a sparse matrix requires a gradient; large ones come with a method other than `PDHG`.
        RuntimeError (in backward): `value` is asked for a gradient towards c.

    Source: Bertsimas and Tsitsiklis 1997, chapter 5 (sensitivity).
    """
    if any(isinstance(t, Tensor) and t.layout != torch.strided for t in (G, A)):
        solution = _solve_sparse(c, G, h, A, b, solver, adjoint, rtol, atol, max_steps, start)
    else:
        inputs = check_inputs(None, c, G, h, A, b, NAMES)
        solution = solve_program(inputs, solver, adjoint, rtol, atol, max_steps, start)
    if adjoint is None:
        solution.value = _Vertex.apply(solution.value, c)
        solution.slack = _Vertex.apply(solution.slack, c)
    solution.check(throw, "linear_program")
    return solution


class _Vertex(torch.autograd.Function):
    """The identity on a vertex, which refuses to be differentiated towards the objective."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, c: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            raise RuntimeError(_REFUSAL)
        return grads[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        if tangents[1] is not None and any_true(tangents[1] != 0):
            raise RuntimeError(_REFUSAL)
        return tangents[0]


_REFUSAL = (
    "linear_program: the optimum is a vertex, which does not move with c until it jumps: its gradient towards c is "
    "zero, and would silently train nothing. Ask for a smoothed one by name, adjoint=CentralPath(barrier); or take the "
    "gradient of solution.objective, which is exact; or pass c.detach(), if only the constraints are to be learned."
)


def _solve_sparse(
    c: Tensor, G: Tensor | None, h: Tensor | None, A: Tensor | None, b: Tensor | None, solver: QPSolver | None,
    adjoint: CentralPath | None, rtol: float, atol: float, max_steps: int | None, start: Solution[Tensor] | None,
) -> QPSolution:  # fmt: skip
    solver = PDHG() if solver is None else solver
    require(solver, QPSolver, "solver")
    for name, matrix in (("G", G), ("A", A)):
        if matrix is not None and (matrix.requires_grad or matrix.ndim != 2):
            what = "requires a gradient" if matrix.requires_grad else f"has shape {tuple(matrix.shape)}"
            raise ValueError(
                f"linear_program: where a matrix is sparse, both are constants that all samples share; {name} {what}."
            )
    rows = sum(len(matrix) for matrix in (G, A) if matrix is not None)
    if c.shape[-1] + rows <= ASSEMBLED:
        dense = [None if matrix is None else matrix.to_dense() for matrix in (G, A)]
        return solve_program(
            check_inputs(None, c, dense[0], h, dense[1], b, NAMES), solver, adjoint, rtol, atol, max_steps, start
        )
    if not isinstance(solver, PDHG) or adjoint is not None or inside_transform():
        raise ValueError(
            f"linear_program: sparse constraints of more than {ASSEMBLED} variables and rows together are for PDHG(), "
            "with adjoint=None and outside of torch.func; pass G.to_dense() and A.to_dense() for everything else."
        )
    limits = make_limits(rtol, atol, solver.budget if max_steps is None else max_steps)
    # What is not sparse is checked beside empty matrices of the right shapes.
    shapes = [None if matrix is None else c.new_empty(1, dtype=torch.float64).expand(matrix.shape) for matrix in (G, A)]
    inputs = check_inputs(None, c, shapes[0], h, shapes[1], b, NAMES)
    d = torch.cat([inputs.h, inputs.b], 1)
    with torch.no_grad(), autocast_to(None, c.device):
        C = torch.cat([_coo(matrix) for matrix in (G, A) if matrix is not None]).to_sparse_csr()
        constraints = Constraints.of_sparse(C)
        warm = None if start is None else start.warm
        point = iterate(
            constraints, inputs.q, d, inputs.m, solver.restart, limits.rtol, limits.floor, limits.max_steps, warm
        )
        left = d - (C @ point.x.mT).mT
    m, x, v = inputs.m, point.x, point.v
    # By the envelope theorem: d(objective) = x dc - v dd, where v is that of d - C x, not negative for inequalities.
    objective = (inputs.q * x).sum(1) - (v * (d - d.detach())).sum(1)
    dtype = torch.promote_types(c.dtype, (c if h is None else h).dtype)
    nothing = torch.zeros_like(v)
    return QPSolution(
        value=_Approximate.apply(x.to(dtype), inputs.q, d),
        stats=Stats(point.steps, point.steps, point.residual, point.status),
        warm=(x, v),
        duals=Duals(
            _Approximate.apply(v[:, :m].to(dtype), inputs.q, d), _Approximate.apply(v[:, m:].to(dtype), inputs.q, d)
        ),
        slack=_Approximate.apply(left[:, :m].to(dtype), inputs.q, d),
        objective=objective.to(dtype),
        active=torch.zeros_like(v[:, :m], dtype=torch.bool),
        certificate=Certificate(nothing[:, :m], nothing[:, m:], torch.zeros_like(x)),
    )


class _Approximate(torch.autograd.Function):
    """What was found without a proof of its active set, and is differentiable in nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "linear_program: of a large sparse programme only solution.objective is differentiable, in c, h and b. "
            "Pass dense matrices for a differentiable optimum."
        )


def _coo(matrix: Tensor) -> Tensor:
    return matrix.to(torch.float64).to_sparse_coo()
