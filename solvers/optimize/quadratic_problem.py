"""A batch of quadratic programmes as the methods see it: checked, stacked and scaled."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..solution import Status
from ..tree import norms
from .quadratic_kkt import times

if TYPE_CHECKING:
    from .active_set import Polished

TINY = 1e-12
"""Slacks and multipliers of scaled programmes below this are taken for it where one is divided by the other."""

UNIT = 1e-8
"""Size, in a scaled programme, of terms that nothing needs to be exact relative to: 0 / 0 is no residual."""


@dataclasses.dataclass(frozen=True)
class Programme:
    """Minimise 1/2 x'Qx + q'x subject to C x <= d in the first `m` rows and C x = d in the others.

    Attributes:
        Q: (batch, n, n), or (n, n) where all samples share it.
        q: (batch, n).
        C: (batch, m + p, n), or (m + p, n).
        d: (batch, m + p).
        m: the number of inequalities.
        softness: W of every row: rows may be violated by W times their multiplier; None is zero.
        root: Cholesky factor of Q, where that is positive definite in every sample.
    """

    Q: Tensor
    q: Tensor
    C: Tensor
    d: Tensor
    m: int
    softness: Tensor | None = None
    root: Tensor | None = None

    def select(self, rows: Tensor | slice) -> Programme:
        """The programmes of some samples."""
        return dataclasses.replace(
            self,
            Q=self.Q if self.Q.ndim == 2 else self.Q[rows],
            q=self.q[rows],
            C=self.C if self.C.ndim == 2 else self.C[rows],
            d=self.d[rows],
            softness=None if self.softness is None else self.softness[rows],
            root=self.root if self.root is None or self.root.ndim == 2 else self.root[rows],
        )

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.q)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Back from a scaled programme: x is the same, multipliers are divided by `rows` and multiplied by `objective`."""

    rows: Tensor
    objective: Tensor

    def multipliers(self, v: Tensor) -> Tensor:
        """In the units of the original programme."""
        return v * self.objective.unsqueeze(1) / self.rows


def scaled(programme: Programme) -> tuple[Programme, Scaling]:
    """Rows of C of unit length, and an objective whose curvature or slope is about one."""
    rows = torch.linalg.vector_norm(programme.C, dim=-1)
    rows = torch.where(rows > 0, rows, 1.0)
    d = programme.d / rows
    C = programme.C / rows.unsqueeze(-1)
    # The length that x is likely to have: a slope over a length is a curvature.
    length = torch.linalg.vector_norm(d, ord=float("inf"), dim=1).clamp_min(1.0) if d.shape[1] else d.new_ones(len(d))
    curvature = programme.Q.diagonal(dim1=-2, dim2=-1).mean(-1).abs()
    slope = norms(programme.q) / (length * programme.q.shape[1] ** 0.5)
    if programme.Q.ndim == 2:
        # A shared Q stays shared, and no sample has a part in the scale of another.
        objective = torch.where(curvature > 0, curvature, slope)
        Q = programme.Q / torch.where(curvature > 0, curvature, 1.0)
    else:
        objective = torch.where(curvature > 1e-6 * slope, curvature, slope)
        objective = torch.where(objective > 0, objective, 1.0)
        Q = programme.Q / objective[:, None, None]
    objective = torch.where(objective > 0, objective, 1.0)
    small = dataclasses.replace(programme, Q=Q, q=programme.q / objective.unsqueeze(1), C=C, d=d)
    if programme.root is not None:
        size = (curvature if Q.ndim == 2 else objective).sqrt()
        small = dataclasses.replace(small, root=programme.root / size.reshape(*size.shape, 1, 1))
    return small, Scaling(rows.expand_as(d), objective)


@dataclasses.dataclass
class Found:
    """What a method found, of scaled programmes.

    Attributes:
        x: (batch, n).
        v: multipliers (batch, rows), those of inequalities first.
        W: what the derivative is to take (batch, rows): zero where active, infinite where not, slack over multiplier
            where neither is certain.
        proved: the active set is certain (batch,).
        steps, status: (batch,).
        residual: relative (batch,).
        factor: of `Saddle`, where the active set is certain (batch, n, n).
    """

    x: Tensor
    v: Tensor
    W: Tensor
    proved: Tensor
    steps: Tensor
    status: Tensor
    residual: Tensor
    factor: Tensor | None = None

    @classmethod
    def empty(cls, problem: Programme) -> Found:
        """Nothing yet."""
        d, batch = problem.d, problem.batch
        zeros = torch.zeros(batch, dtype=torch.int64, device=d.device)
        return cls(
            torch.full_like(problem.q, math.nan),
            torch.full_like(d, math.nan),
            torch.full_like(d, math.inf),
            zeros.bool(),
            zeros,
            zeros + int(Status.MAX_STEPS),
            torch.full_like(problem.q[:, 0], math.inf),
        )

    @classmethod
    def join(cls, parts: list[Found]) -> Found:
        """The parts, one behind the other."""
        if all(part.factor is None for part in parts):
            factor = None
        else:
            n = parts[0].x.shape[1]
            factors = [p.x.new_zeros(len(p.x), n, n) if p.factor is None else p.factor for p in parts]
            factor = torch.cat(factors)
        names = [f.name for f in dataclasses.fields(cls) if f.name != "factor"]
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names}, factor=factor)

    def prove(self, rows: Tensor, result: Polished, which: Tensor, steps: int | Tensor) -> None:
        """Note the optimum of some `rows`, the samples `which` of a polished result."""
        factor = result.saddle.factor
        if len(which) == len(self.x):
            self.factor = factor
        elif len(which):
            self.factor = factor.new_zeros(len(self.x), *factor.shape[1:]) if self.factor is None else self.factor
            self.factor[rows] = factor[which]
        self.x[rows], self.v[rows], self.W[rows] = result.x[which], result.v[which], result.saddle.W[which]
        self.proved[rows] = True
        self.steps[rows] = steps
        self.status[rows] = int(Status.CONVERGED)
        self.residual[rows] = result.error[which]

    def accept(self, rows: Tensor, problem: Programme, x: Tensor, v: Tensor, status: Tensor, residual: Tensor) -> None:
        """Note points of some `rows`, whose programmes are `problem`, without a proof of their active sets."""
        m = problem.m
        slack = (problem.d - times(problem.C, x))[:, :m].clamp_min(TINY)
        self.x[rows], self.v[rows], self.status[rows], self.residual[rows] = x, v, status, residual
        self.W[rows] = torch.cat([slack / v[:, :m].clamp_min(TINY), torch.zeros_like(v[:, m:])], 1)


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to stop: residuals are measured relative to their terms plus `floor`, atol / rtol of a scaled programme."""

    rtol: float
    floor: float
    max_steps: int


class QPSolver(abc.ABC):
    """The base of methods for quadratic programmes."""

    @property
    def budget(self) -> int:
        """Steps where the caller names no number."""
        return 100

    @abc.abstractmethod
    def run(self, problem: Programme, limits: Limits, start: tuple[Tensor, Tensor] | None) -> Found:
        """Solve scaled programmes, from a start x and v; nothing is recorded for differentiation."""
