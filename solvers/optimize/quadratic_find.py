"""Finding the optimum of a batch of quadratic programmes: no derivatives, statuses, certificates, torch.func.vmap."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solution import Status
from .central_path import follow_to
from .infeasible import descent_ray, empty_set
from .interior_point import InteriorPoint
from .quadratic_attach import fold, saddle_factor
from .quadratic_problem import Found, Limits, Programme, QPSolver, scaled

CACHED = 200_000
"""Numbers of C in a piece of the batch that is solved by itself on a CPU: larger ones leave the cache."""


@dataclasses.dataclass(frozen=True)
class Request:
    """How to solve: the method, its limits, the barrier of a smoothed programme or zero, the inputs' resolution."""

    solver: QPSolver
    limits: Limits
    barrier: float
    resolution: float


class Optimum(NamedTuple):
    """In the units of the programme, all of it constant.

    x (batch, n), v (batch, rows); W of the derivative, its factor and scales; proved, steps, status,
    residual (batch,); certificate of an empty feasible set (batch, rows), of an unbounded objective (batch, n), zero
    where there is none.
    """

    x: Tensor
    v: Tensor
    W: Tensor
    factor: Tensor
    rows: Tensor
    objective: Tensor
    proved: Tensor
    steps: Tensor
    status: Tensor
    residual: Tensor
    farkas: Tensor
    ray: Tensor


class _Find(torch.autograd.Function):
    """(Q, q, C, d, m, request, start x, start v) -> `Optimum`, as a tuple."""

    @staticmethod
    def forward(
        Q: Tensor, q: Tensor, C: Tensor, d: Tensor, m: int, request: Request, x0: Tensor | None, v0: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(_find(Programme(Q, q, C, d, m), request, x0, v0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * 12

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = fold(args, dims, (3, 2, 3, 2, 0, 0, 2, 2), info.batch_size)
        found = _Find.apply(*folded)
        size = info.batch_size
        return tuple(t.reshape(size, t.shape[0] // size, *t.shape[1:]) for t in found), (0,) * len(found)


def _find(programme: Programme, request: Request, x0: Tensor | None, v0: Tensor | None) -> Optimum:
    m, batch, n = programme.m, programme.batch, programme.q.shape[1]
    # A row without a bound is no constraint.
    C, d = programme.C, programme.d
    free = torch.zeros_like(d, dtype=torch.bool)
    free[:, :m] = d[:, :m] == math.inf
    if bool(free.any()):
        C = torch.where(free.unsqueeze(2), 0.0, C.expand(batch, *C.shape[-2:]))
        d = torch.where(free, 1.0, d)
    healthy = _finite(programme.Q, batch) & _finite(C, batch) & torch.isfinite(programme.q).all(1)
    healthy = healthy & torch.isfinite(d).all(1)
    Q, root = _convex(programme.Q, healthy, request.resolution)
    whole = dataclasses.replace(programme, Q=Q, C=C, d=d, root=root)
    rows = healthy.nonzero().flatten()
    everything = len(rows) == batch
    problem, scale = scaled(whole if everything else whole.select(rows))
    limits = request.limits
    start = None
    if x0 is not None and v0 is not None:
        start = (x0, v0) if everything else (x0[rows], v0[rows])
        start = (start[0], start[1] * scale.rows / scale.objective.unsqueeze(1))
    if len(rows) == 0:
        return _nothing(programme)
    if request.barrier > 0:
        found = follow_to(problem, request.barrier / scale.objective, limits)
    else:
        found = _run_in_pieces(problem, request.solver, limits, start)
    farkas, ray = torch.zeros_like(problem.d), torch.zeros_like(problem.q)
    failed = (found.status != Status.CONVERGED).nonzero().flatten()
    if len(failed):
        _certify(problem, failed, found.status, farkas, ray, limits)
    lost = (found.status == Status.INFEASIBLE) | (found.status == Status.UNBOUNDED)
    v = torch.where(lost.unsqueeze(1), math.nan, scale.multipliers(found.v))
    x = torch.where(lost.unsqueeze(1), math.nan, found.x)
    W = torch.where(lost.unsqueeze(1), math.inf, found.W * scale.rows**2 / scale.objective.unsqueeze(1))
    factor = found.factor
    unsure = (~found.proved).nonzero().flatten()
    if factor is None:
        factor = problem.q.new_zeros(len(rows), n, n)
    if len(unsure):
        part = problem.select(unsure)
        some = torch.where(lost[unsure].unsqueeze(1), math.inf, found.W[unsure])
        one = torch.ones_like(scale.objective[unsure])
        factor[unsure] = saddle_factor(part.Q, part.C, some, torch.ones_like(part.d), one)
    # In the units of the programme, Farkas' vector is divided by the rows, whatever its length.
    farkas = farkas / scale.rows
    result = Optimum(
        x, v, W, factor, scale.rows, scale.objective, found.proved, found.steps, found.status, found.residual,
        farkas, ray,
    )  # fmt: skip
    if everything:
        return result
    return Optimum(*[none.index_copy(0, rows, some) for none, some in zip(_nothing(programme), result, strict=True)])


def _run_in_pieces(problem: Programme, solver: QPSolver, limits: Limits, start: tuple[Tensor, Tensor] | None) -> Found:
    """Run the method on as many samples at once as a processor's cache holds."""
    size = max(problem.C.shape[-2], 1) * problem.q.shape[1]
    count = max(CACHED // size, 16)
    if problem.q.device.type != "cpu" or problem.batch <= count:
        return solver.run(problem, limits, start)
    pieces = []
    for rows in torch.arange(problem.batch).split(count):
        piece = None if start is None else (start[0][rows], start[1][rows])
        pieces.append(solver.run(problem.select(slice(int(rows[0]), int(rows[-1]) + 1)), limits, piece))
    return Found.join(pieces)


def _nothing(programme: Programme) -> Optimum:
    """Of samples with a NaN."""
    q, d, n = programme.q, programme.d, programme.q.shape[1]
    batch = len(q)
    zeros = torch.zeros(batch, dtype=torch.int64, device=q.device)
    return Optimum(
        torch.full_like(q, math.nan), torch.full_like(d, math.nan), torch.full_like(d, math.inf),
        torch.eye(n, dtype=q.dtype, device=q.device).repeat(batch, 1, 1),
        torch.ones_like(d), q.new_ones(batch), zeros.bool(), zeros, zeros + int(Status.NON_FINITE),
        q.new_full((batch,), math.nan), torch.zeros_like(d), torch.zeros_like(q),
    )  # fmt: skip


def _finite(matrix: Tensor, batch: int) -> Tensor:
    # A sum is finite where all of its terms are, and costs no mask.
    return torch.isfinite(matrix.flatten(-2).sum(-1)).expand(batch)


def _convex(Q: Tensor, healthy: Tensor, resolution: float) -> tuple[Tensor, Tensor | None]:
    """Q without eigenvalues that rounding made negative, and its Cholesky factor, or None where some sample has none.

    Raises:
        ValueError: a sample's Q has a negative eigenvalue, beyond rounding.
    """
    if not bool((Q != 0).any()) or not bool(healthy.any()):
        return Q, None
    n = Q.shape[-1]
    eye = torch.eye(n, dtype=Q.dtype, device=Q.device)
    some = healthy if Q.ndim == 3 else healthy.new_ones(1)
    matrix = Q if Q.ndim == 3 else Q.unsqueeze(0)
    if not bool(some.all()):
        matrix = torch.where(some[:, None, None], matrix, eye)
    root, info = torch.linalg.cholesky_ex(matrix)
    failed = (info != 0).nonzero().flatten()
    if len(failed) == 0:
        return Q, root if Q.ndim == 3 else root[0]
    values = torch.linalg.eigvalsh(matrix[failed])
    least = values[:, 0]
    negative = least < -max(1e-9, 10 * n * resolution) * values.abs().amax(1)
    if bool(negative.any()):
        worst = int(torch.where(negative, least, 0.0).argmin())
        where = f" in sample {int(failed[worst])}" if Q.ndim == 3 else ""
        raise ValueError(
            f"Q is indefinite{where}: its smallest eigenvalue is {float(least[worst]):.3g}. A quadratic programme "
            "with such a Q is not convex; use minimize, or add a multiple of the identity."
        )
    shift = torch.zeros_like(matrix[:, 0, 0]).index_copy(0, failed, least.clamp_max(0).neg())
    matrix = matrix + shift[:, None, None] * eye
    return torch.where(some[:, None, None], matrix, Q) if Q.ndim == 3 else matrix[0], None


def _certify(problem: Programme, failed: Tensor, status: Tensor, farkas: Tensor, ray: Tensor, limits: Limits) -> None:
    """Find out why samples failed; writes into the last four tensors."""
    solver = InteriorPoint()
    limits = Limits(1e-9, 0.0, max(limits.max_steps, 50))
    if problem.d.shape[1]:
        vector, empty = empty_set(problem.select(failed), solver, limits)
        farkas[failed] = torch.where(empty.unsqueeze(1), vector, 0.0)
        status[failed[empty]] = int(Status.INFEASIBLE)
        failed = failed[~empty]
    if len(failed):
        direction, endless = descent_ray(problem.select(failed), solver, limits)
        ray[failed] = torch.where(endless.unsqueeze(1), direction, 0.0)
        status[failed[endless]] = int(Status.UNBOUNDED)


find = _Find.apply
