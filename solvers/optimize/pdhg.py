"""The primal-dual hybrid gradient method for linear programmes: products with the constraints, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..options import options
from ..solution import Status
from ..tree import norms
from .active_set import polish
from .quadratic_kkt import times, times_transposed
from .quadratic_problem import Found, Limits, Programme, QPSolver

EVERY = 40
"""Steps between two looks at the residuals, at which the method may start again from its average."""


@options
class PDHG(QPSolver):
    """Primal-dual hybrid gradient, preconditioned, with adaptive steps, restarts and a balanced primal weight.

    A step costs one product with the constraint matrix and one with its transpose, and so the method suits large sparse
    programmes, for which it needs no factorisation, at a moderate accuracy. Small ones are polished: the active
    set that it points to is solved exactly, as by `InteriorPoint`. Linear programmes only.

    Attributes:
        restart: fall of the residuals that makes it start again from the average, where that is better.

    Raises:
        ValueError: restart is not between 0 and 1.

    Source: Chambolle and Pock 2011; Applegate et al. 2021, Practical large-scale linear programming using PDHG.
    """

    restart: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.restart < 1:
            raise ValueError(f"PDHG: restart must be between 0 and 1; got {self.restart!r}.")

    @property
    def budget(self) -> int:
        """Steps where the caller names no number."""
        return 50_000

    def run(self, problem: Programme, limits: Limits, start: tuple[Tensor, Tensor] | None) -> Found:
        """Solve scaled programmes.

        Raises:
            ValueError: Q is not zero.
        """
        if bool((problem.Q != 0).any()):
            raise ValueError("PDHG solves linear programmes, and this one has a quadratic objective; use ADMM().")
        found = Found.empty(problem)
        rows = torch.arange(problem.batch, device=problem.q.device)
        state, spent = start, torch.zeros_like(rows)
        rtol = max(limits.rtol, 1e-4)
        while True:
            constraints = Constraints.of_dense(problem.C)
            rest = max(limits.max_steps - int(spent.min()), 1)
            point = iterate(constraints, problem.q, problem.d, problem.m, self.restart, rtol, limits.floor, rest, state)
            spent = spent + point.steps
            active = point.v[:, : problem.m] > 0
            result = polish(problem, active, point.x, point.v, max(limits.rtol, 1e-13), hard=True)
            done = result.proved.nonzero().flatten()
            found.prove(rows[done], result, done, 0)
            found.steps[rows] = spent
            over = (rtol <= limits.rtol) | (point.status != Status.CONVERGED)
            left = ~result.proved & over
            at = left.nonzero().flatten()
            found.accept(rows[at], problem.select(at), point.x[at], point.v[at], point.status[at], point.residual[at])
            keep = (~(result.proved | left)).nonzero().flatten()
            if len(keep) == 0:
                return found
            problem, rows, spent, rtol = problem.select(keep), rows[keep], spent[keep], max(rtol / 100, limits.rtol)
            state = (point.x[keep], point.v[keep])


@dataclasses.dataclass(frozen=True)
class Constraints:
    """C, scaled by rows and columns, as products.

    Attributes:
        times, transposed: x (batch, n) -> C x and v (batch, rows) -> C'v, of the scaled matrix.
        rows, columns: the scales: the scaled matrix is C divided by both.
    """

    times: Callable[[Tensor], Tensor]
    transposed: Callable[[Tensor], Tensor]
    rows: Tensor
    columns: Tensor

    @classmethod
    def of_dense(cls, C: Tensor) -> Constraints:
        """Those of (batch, rows, n), or (rows, n) shared."""
        rows, columns, size = torch.ones_like(C[..., 0]), torch.ones_like(C[..., 0, :]), C.abs()
        for _ in range(6):
            by_row = _root(size.amax(-1)) if size.shape[-1] else rows
            by_column = _root(size.amax(-2)) if size.shape[-2] else columns
            size = size / (by_row.unsqueeze(-1) * by_column.unsqueeze(-2))
            rows, columns = rows * by_row, columns * by_column
        scaled = C / (rows.unsqueeze(-1) * columns.unsqueeze(-2))
        return cls(lambda x: times(scaled, x), lambda v: times_transposed(scaled, v), rows, columns)

    @classmethod
    def of_sparse(cls, C: Tensor) -> Constraints:
        """Those of one sparse CSR matrix (rows, n) that all samples share."""
        coo = C.to_sparse_coo().coalesce()
        (i, j), values = coo.indices(), coo.values()
        rows, columns = values.new_ones(C.shape[0]), values.new_ones(C.shape[1])
        size = values.abs()
        for _ in range(6):
            by_row = _root(torch.zeros_like(rows).scatter_reduce(0, i, size, "amax"))
            by_column = _root(torch.zeros_like(columns).scatter_reduce(0, j, size, "amax"))
            size = size / (by_row[i] * by_column[j])
            rows, columns = rows * by_row, columns * by_column
        values = values / (rows[i] * columns[j])
        there = torch.sparse_coo_tensor(torch.stack([i, j]), values, C.shape, check_invariants=False).to_sparse_csr()
        back = torch.sparse_coo_tensor(
            torch.stack([j, i]), values, C.shape[::-1], check_invariants=False
        ).to_sparse_csr()
        return cls(lambda x: (there @ x.mT).mT, lambda v: (back @ v.mT).mT, rows, columns)


def _root(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0).sqrt()


@dataclasses.dataclass
class Point:
    """Where the method ended: x, multipliers v, and per sample steps, status and residual."""

    x: Tensor
    v: Tensor
    steps: Tensor
    status: Tensor
    residual: Tensor


def iterate(
    constraints: Constraints, c: Tensor, d: Tensor, m: int, restart: float, rtol: float, floor: float, budget: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> Point:  # fmt: skip
    """Minimise c'x subject to C x <= d in the first m rows and C x = d in the others, for a batch of c and d.

    Samples that have converged are frozen.
    """
    cs, ds = c / constraints.columns, d / constraints.rows
    x = torch.zeros_like(c) if start is None else start[0] * constraints.columns
    v = torch.zeros_like(d) if start is None else start[1] * constraints.rows

    def project(v: Tensor) -> Tensor:
        return torch.cat([v[:, :m].clamp_min(0), v[:, m:]], 1)

    def measure(x: Tensor, v: Tensor, Cx: Tensor, Cv: Tensor) -> Tensor:
        """The largest of the relative primal and dual residuals and the gap, in the units of the programme (batch,)."""
        over = (Cx - ds) * constraints.rows
        over = torch.cat([over[:, :m].clamp_min(0), over[:, m:]], 1)
        value, bound = (cs * x).sum(1), -(ds * v).sum(1)
        gap = (value - bound).abs() / (1 + floor + value.abs() + bound.abs())
        primal = norms(over) / (1 + floor + norms(d))
        dual = norms((cs + Cv) * constraints.columns) / (1 + floor + norms(c))
        return torch.maximum(torch.maximum(primal, dual), gap)

    Cx, Cv = constraints.times(x), constraints.transposed(v)
    weight = (norms(cs).clamp_min(1e-8) / norms(ds).clamp_min(1e-8)).clamp(1e-4, 1e4).unsqueeze(1)
    # A row of the scaled matrix is at most one in every entry, so that its norm is at most this.
    step = torch.full_like(weight, 1 / max(c.shape[1], d.shape[1]) ** 0.5)
    mean_x, mean_v, mean_Cx, mean_Cv = x.clone(), v.clone(), Cx.clone(), Cv.clone()
    total = torch.zeros_like(step)
    base_x, base_v, base = x, v, measure(x, v, Cx, Cv)
    previous, length = base, torch.zeros_like(base)
    active = torch.ones_like(base, dtype=torch.bool)
    steps = torch.zeros_like(base, dtype=torch.int64)
    out = Point(x, v, steps, steps + int(Status.MAX_STEPS), base)
    for k in range(1, budget + 1):
        nx = x - step / weight * (cs + Cv)
        nCx = constraints.times(nx)
        nv = project(v + step * weight * (2 * nCx - Cx - ds))
        dx, dv = nx - x, nv - v
        moved = weight * dx.square().sum(1, keepdim=True) + dv.square().sum(1, keepdim=True) / weight
        crossed = 2 * (dv * (nCx - Cx)).sum(1, keepdim=True).abs()
        limit = torch.where(crossed > 0, moved / crossed.clamp_min(1e-300), torch.inf)
        taken = (step <= limit) & active.unsqueeze(1)
        used = step
        longer = torch.minimum((1 - (k + 1) ** -0.3) * limit, (1 + (k + 1) ** -0.6) * step)
        step = torch.where(crossed > 0, longer, step)
        x, v, Cx = torch.where(taken, nx, x), torch.where(taken, nv, v), torch.where(taken, nCx, Cx)
        Cv = constraints.transposed(v)
        share = torch.where(taken, used, 0.0)
        total = total + share
        share = share / total.clamp_min(1e-300)
        mean_x, mean_v = torch.lerp(mean_x, x, share), torch.lerp(mean_v, v, share)
        mean_Cx, mean_Cv = torch.lerp(mean_Cx, Cx, share), torch.lerp(mean_Cv, Cv, share)
        length = length + 1
        if k % EVERY and k != budget:
            continue
        here, there = measure(x, v, Cx, Cv), measure(mean_x, mean_v, mean_Cx, mean_Cv)
        average = (there < here).unsqueeze(1)
        best = torch.minimum(here, there)
        bx, bv = torch.where(average, mean_x, x), torch.where(average, mean_v, v)
        fine, broken = active & (best <= rtol), active & ~torch.isfinite(best)
        ended = fine | broken | (active if k == budget else torch.zeros_like(fine))
        pick = ended.unsqueeze(1)
        out.x, out.v = torch.where(pick, bx, out.x), torch.where(pick, bv, out.v)
        out.steps = torch.where(ended, k, out.steps)
        out.residual = torch.where(ended, best, out.residual)
        out.status = torch.where(fine, int(Status.CONVERGED), out.status)
        out.status = torch.where(broken, int(Status.NON_FINITE), out.status)
        active = active & ~ended
        if not bool(active.any()):
            break
        again = (best <= restart * base) | ((best <= 0.8 * base) & (best > previous)) | (length >= 0.36 * k)
        previous = best
        pick = again.unsqueeze(1)
        went_x, went_v = norms(bx - base_x), norms(bv - base_v)
        balanced = torch.exp(0.5 * torch.log(went_v / went_x) + 0.5 * torch.log(weight.squeeze(1)))
        sensible = again & (went_x > 1e-10) & (went_v > 1e-10) & torch.isfinite(balanced)
        weight = torch.where(sensible.unsqueeze(1), balanced.unsqueeze(1), weight)
        x, v = torch.where(pick, bx, x), torch.where(pick, bv, v)
        Cx, Cv = constraints.times(x), constraints.transposed(v)
        base_x, base_v, base = (
            torch.where(pick, x, base_x),
            torch.where(pick, v, base_v),
            torch.where(again, best, base),
        )
        mean_x, mean_v = torch.where(pick, x, mean_x), torch.where(pick, v, mean_v)
        mean_Cx, mean_Cv = torch.where(pick, Cx, mean_Cx), torch.where(pick, Cv, mean_Cv)
        total, length = torch.where(pick, 0.0, total), torch.where(again, 0.0, length)
    out.x, out.v = out.x / constraints.columns, out.v / constraints.rows
    return out
