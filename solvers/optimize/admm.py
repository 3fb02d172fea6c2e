"""The alternating direction method of multipliers for quadratic programmes: one factorisation, many cheap steps."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..options import options
from ..solution import Status
from ..tree import norms
from .active_set import polish
from .quadratic_kkt import factorise, solve_factor, times, times_transposed
from .quadratic_problem import Found, Limits, Programme, QPSolver

PROXIMAL = 1e-6
"""Weight of the variables' distance from where they were."""

RELAXATION = 1.6
"""How far a step goes beyond the plane that it projects onto."""

EQUATIONS = 1e3
"""The penalty of equations, relative to that of inequalities."""

EVERY = 20
"""Steps between two looks at the residuals."""

UNBALANCED = 5.0
"""Ratio of primal to dual residual from which on a new penalty is worth a new factorisation."""


@options
class ADMM(QPSolver):
    """Operator splitting: a linear system with one matrix, and a projection onto the bounds.

    A step costs a solve with a factor and two products, whatever the bounds, and the factor is kept while the penalty
    is: the method for many inequalities, and for moderate accuracies. It starts where an earlier solution ended. Like
    `InteriorPoint` it hands over to the active set as soon as that can be proved optimal, and is then exact, and
    differentiated there. Otherwise its fixed point is, as the barrier problem's with the same slacks and multipliers.

    Attributes:
        penalty: of the violated constraints of a scaled programme, at first.
        polish: hand over to the active set.

    Raises:
        ValueError: penalty is not positive.

    Source: Stellato et al. 2020, OSQP, algorithm 1 and section 5.
    """

    penalty: float = 0.1
    polish: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.penalty < float("inf"):
            raise ValueError(f"ADMM: penalty must be positive and finite; got {self.penalty!r}.")

    @property
    def budget(self) -> int:
        """Steps where the caller names no number."""
        return 10_000

    def run(self, problem: Programme, limits: Limits, start: tuple[Tensor, Tensor] | None) -> Found:
        """Solve scaled programmes."""
        found = Found.empty(problem)
        rows = torch.arange(problem.batch, device=problem.q.device)
        x = torch.zeros_like(problem.q) if start is None else start[0].nan_to_num()
        v = torch.zeros_like(problem.d) if start is None else start[1].nan_to_num()
        state = _State(x, times(problem.C, x), v, torch.full_like(x[:, :1], self.penalty), torch.zeros_like(v).bool())
        matrix = _Matrix.of(problem, state.penalty)
        for k in range(1, limits.max_steps + 1):
            state = _step(problem, matrix, state)
            if k % EVERY and k != limits.max_steps:
                continue
            residual, ratio = _measure(problem, state, limits.floor)
            found.steps[rows] = k
            fine, broken = residual <= limits.rtol, ~torch.isfinite(residual)
            over = fine | broken | (k == limits.max_steps)
            active = state.v > 0
            if self.polish:
                stable = (active == state.active)[:, : problem.m].all(1)
                ready = ((stable & (residual < 1e-2)) | over) & ~broken
                over = self._polish(found, problem, rows, state, ready, limits) | over
            state.active = active
            status = torch.where(fine, int(Status.CONVERGED), int(Status.MAX_STEPS))
            status = torch.where(broken, int(Status.NON_FINITE), status)
            at = (over & ~found.proved[rows]).nonzero().flatten()
            found.accept(rows[at], problem.select(at), state.x[at], state.v[at], status[at], residual[at])
            keep = (~over).nonzero().flatten()
            if len(keep) == 0:
                break
            if len(keep) < len(rows):
                problem, rows, state, ratio = problem.select(keep), rows[keep], state.select(keep), ratio[keep]
                matrix = matrix.select(keep)
            unbalanced = ((ratio > UNBALANCED) | (ratio < 1 / UNBALANCED)).unsqueeze(1)
            if k % (5 * EVERY) == 0 and bool(unbalanced.any()):
                better = (state.penalty * ratio.unsqueeze(1)).clamp(1e-6, 1e6)
                state.penalty = torch.where(unbalanced, better, state.penalty)
                matrix = _Matrix.of(problem, state.penalty)
        return found

    @staticmethod
    def _polish(found: Found, problem: Programme, rows: Tensor, state: _State, ready: Tensor, limits: Limits) -> Tensor:
        """Prove what can be proved; which samples that is."""
        proved = torch.zeros_like(ready)
        at = ready.nonzero().flatten()
        if len(at):
            m = problem.m
            result = polish(problem.select(at), state.v[at, :m] > 0, state.x[at], state.v[at], max(limits.rtol, 1e-13))
            done = result.proved.nonzero().flatten()
            steps = found.steps[rows[at[done]]]
            found.prove(rows[at[done]], result, done, 0)
            found.steps[rows[at[done]]] = steps
            proved[at[done]] = True
        return proved


@dataclasses.dataclass
class _State:
    """x (batch, n), z and the multipliers v (batch, rows), the penalty (batch, 1), and the last active rows."""

    x: Tensor
    z: Tensor
    v: Tensor
    penalty: Tensor
    active: Tensor

    def select(self, rows: Tensor) -> _State:
        return _State(*[getattr(self, f.name)[rows] for f in dataclasses.fields(self)])


@dataclasses.dataclass
class _Matrix:
    """The factor of Q + proximal I + C' diag(weight) C, and the weights."""

    factor: Tensor
    weight: Tensor

    @classmethod
    def of(cls, problem: Programme, penalty: Tensor) -> _Matrix:
        weight = penalty.expand(problem.d.shape).clone()
        weight[:, problem.m :] *= EQUATIONS
        return cls(factorise(problem.Q, problem.C, weight, PROXIMAL), weight)

    def select(self, rows: Tensor) -> _Matrix:
        return _Matrix(self.factor[rows], self.weight[rows])


def _step(problem: Programme, matrix: _Matrix, state: _State) -> _State:
    weight = matrix.weight
    right = PROXIMAL * state.x - problem.q + times_transposed(problem.C, weight * state.z - state.v)
    x = solve_factor(matrix.factor, right)
    z = torch.lerp(state.z, times(problem.C, x), RELAXATION)
    moved = z + state.v / weight
    m = problem.m
    bounded = torch.cat([torch.minimum(moved[:, :m], problem.d[:, :m]), problem.d[:, m:]], 1)
    return dataclasses.replace(state, x=torch.lerp(state.x, x, RELAXATION), z=bounded, v=weight * (moved - bounded))


def _measure(problem: Programme, state: _State, floor: float) -> tuple[Tensor, Tensor]:
    """The larger of the relative residuals (batch,), and the square root of their ratio."""
    Qx, Cx, Cv = times(problem.Q, state.x), times(problem.C, state.x), times_transposed(problem.C, state.v)
    primal = norms(Cx - state.z) / (torch.maximum(norms(Cx), norms(state.z)) + floor).clamp_min(1e-10)
    dual = norms(Qx + problem.q + Cv) / (norms(Qx) + norms(problem.q) + norms(Cv) + floor).clamp_min(1e-10)
    return torch.maximum(primal, dual), (primal / dual.clamp_min(1e-300)).sqrt()
