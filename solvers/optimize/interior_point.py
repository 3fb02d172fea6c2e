"""A primal-dual interior point method on the condensed system, batched."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..options import options
from ..solution import Status
from ..tree import norms
from .active_set import polish
from .complementarity import guess_active, to_boundary
from .quadratic_kkt import PRIMAL, PROXIMAL, beyond_rounding, factorise, solve_factor, times, times_transposed
from .quadratic_problem import UNIT, Found, Limits, Programme, QPSolver

BOUNDARY = 0.99
"""Share of the way to the boundary of the positive orthant that a step may go."""

EXHAUSTED = 1e-13
"""Complementarity of a scaled programme below which further steps only move rounding errors."""

LARGE = 1e4
"""Size of the variables or multipliers of a scaled programme from which on it may have no optimum."""

PROOF = 1e-13
"""Relative residual of the active set's equations that is one of rounding."""

EQUATION = 1e-10
"""Regularisation of an equation's multiplier in a step, which nothing takes out again but the next step."""


@options
class InteriorPoint(QPSolver):
    """Mehrotra's predictor and corrector, which hands over to the active set as soon as that can be proved optimal.

    Each step factorises Q + G' diag(z / s) G, an n x n matrix a sample, whatever the number of constraints; equations
    and semidefinite Q are regularised by proximal terms. From the direction of a step the active set is guessed, the
    equations that it makes of the constraints are solved to the last digit, and if the signs of all slacks and
    multipliers are right, that is the optimum and the sample is done.

    The default. Choose `ADMM()` for very many constraints at a moderate accuracy, or where one matrix serves many
    programmes.

    Attributes:
        polish: hand over to the active set. Without it, the result is as exact as `rtol` says, derivatives are those
            of the barrier problem, and weakly active constraints count half.

    Source: Mehrotra 1992; Pougkakiotis and Gondzio 2021 (the proximal terms); Magoon et al. 2025, dQP (the handover).
    """

    polish: bool = True

    def run(self, problem: Programme, limits: Limits, start: tuple[Tensor, Tensor] | None) -> Found:
        """Solve scaled programmes; of a start, only the active set is of use."""
        return _Run(problem, self, limits).run(start)


@dataclasses.dataclass
class _Rows:
    """The iterates of the samples that are still running."""

    x: Tensor
    s: Tensor
    v: Tensor
    guess: Tensor
    tried: Tensor

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(*[getattr(self, f.name)[rows] for f in dataclasses.fields(self)])


class _Run:
    """One solve."""

    def __init__(self, problem: Programme, solver: InteriorPoint, limits: Limits) -> None:
        self.problem, self.polishing, self.limits, self.rtol = problem, solver.polish, limits, limits.rtol
        self.found = Found.empty(problem)
        # Of the samples that are still running, their indices in the whole batch.
        self.rows = torch.arange(problem.batch, device=problem.q.device)

    def run(self, start: tuple[Tensor, Tensor] | None) -> Found:
        problem, m = self.problem, self.problem.m
        if self.polishing and m > 0 and start is not None:
            x, v = start
            active = v[:, :m] > problem.d[:, :m] - times(problem.C, x)[:, :m]
            known = torch.isfinite(x).all(1) & torch.isfinite(v).all(1)
            problem = self._shortcut(problem, active, known, known.long())
        if self.polishing and 0 < m <= 2 * problem.q.shape[1] and problem.root is not None and len(self.rows):
            problem = self._shortcut(problem, *guess_active(problem))
        if len(self.rows) == 0:
            return self.found
        state = starting_rows(problem)
        if m == 0:
            problem, state = self._attempt(problem, state, torch.ones_like(self.rows, dtype=torch.bool), 0, hard=True)
            self._give_up(problem, state, 0)
            return self.found
        for k in range(1, self.limits.max_steps + 1):
            before = state.guess
            state, mu, primal, dual = step(problem, state, self.limits.floor)
            broken = ~torch.isfinite(state.x).all(1) | ~torch.isfinite(state.v).all(1)
            changed = (state.guess != before).sum(1)
            fresh = (state.guess != state.tried).any(1)
            small = (torch.maximum(primal, dual) <= self.rtol) & (mu <= self.rtol)
            spent = small & (mu <= EXHAUSTED) if self.polishing else small
            if self.polishing:
                ready = (k > 1) & (changed <= 1 + m // 20) & fresh & ~broken
                problem, state, kept = self._compact(problem, state, ready | spent, k, spent)
                primal, dual, broken, spent = primal[kept], dual[kept], broken[kept], spent[kept]
            suspect = broken | spent | _diverging(problem, state) if len(self.rows) else broken
            if bool(suspect.any()):
                self._record(problem, state, suspect, torch.maximum(primal, dual), k)
                keep = (~suspect).nonzero().flatten()
                problem, state, self.rows = problem.select(keep), state.select(keep), self.rows[keep]
            if len(self.rows) == 0:
                return self.found
        self._give_up(problem, state, self.limits.max_steps)
        return self.found

    def _shortcut(self, problem: Programme, active: Tensor, right: Tensor, steps: Tensor) -> Programme:
        """Prove the optimum of the samples whose active set is likely to be right; the samples that are left."""
        at = right.nonzero().flatten()
        if len(at) == 0:
            return problem
        everything = len(at) == problem.batch
        part = problem if everything else problem.select(at)
        result = polish(part, active if everything else active[at], None, None, PROOF)
        good = result.proved.nonzero().flatten()
        self.found.prove(self.rows[at[good]], result, good, steps[at[good]])
        left = torch.ones_like(right)
        left[at[good]] = False
        left = left.nonzero().flatten()
        self.rows = self.rows[left]
        return problem.select(left)

    def _compact(
        self, problem: Programme, state: _Rows, ready: Tensor, k: int, spent: Tensor
    ) -> tuple[Programme, _Rows, Tensor]:
        """Try the active set of some samples; without those that are solved, and which remain."""
        before = self.rows
        if bool(ready.any()):
            problem, state = self._attempt(problem, state, ready & ~spent, k)
            if bool(spent.any()):
                still = torch.isin(before[spent], self.rows)
                problem, state = self._attempt(
                    problem, state, torch.isin(self.rows, before[spent][still]), k, hard=True
                )
        return problem, state, torch.isin(before, self.rows).nonzero().flatten()

    def _attempt(
        self, problem: Programme, state: _Rows, ready: Tensor, k: int, hard: bool = False
    ) -> tuple[Programme, _Rows]:
        """Solve on the guessed active sets, and on what their signs suggest, while that is little else."""
        at = ready.nonzero().flatten()
        if len(at) == 0:
            return problem, state
        state.tried[at] = state.guess[at]
        part, guess, x, v = problem.select(at), state.guess[at], state.x[at], state.v[at]
        done = []
        for _ in range(3):
            result = polish(part, guess, x, v, max(self.rtol, PROOF) if hard else PROOF, hard)
            good = result.proved.nonzero().flatten()
            self.found.prove(self.rows[at[good]], result, good, k)
            done.append(at[good])
            turned = (result.next != guess).sum(1)
            again = (~result.proved & (turned > 0) & (turned <= 2 + problem.m // 20)).nonzero().flatten()
            if len(again) == 0:
                break
            at, part, guess = at[again], part.select(again), result.next[again]
            x, v = result.x[again], result.v[again]
        solved = torch.cat(done)
        if len(solved) == 0:
            return problem, state
        keep = torch.ones_like(self.rows, dtype=torch.bool)
        keep[solved] = False
        keep = keep.nonzero().flatten()
        self.rows = self.rows[keep]
        return problem.select(keep), state.select(keep)

    def _record(self, problem: Programme, state: _Rows, which: Tensor, residual: Tensor, k: int) -> None:
        """Note samples that end without a proof."""
        at = which.nonzero().flatten()
        rows, m = self.rows[at], problem.m
        found, s, z = self.found, state.s[at], state.v[at, :m]
        found.x[rows], found.v[rows] = state.x[at], state.v[at]
        found.W[rows, :m] = s / z
        found.W[rows, m:] = 0.0
        found.steps[rows] = k
        found.residual[rows] = residual[at]
        good = residual[at] <= self.rtol
        found.status[rows] = torch.where(good, int(Status.CONVERGED), int(Status.STAGNATED))

    def _give_up(self, problem: Programme, state: _Rows, k: int) -> None:
        if len(self.rows) == 0:
            return
        everything = torch.ones_like(self.rows, dtype=torch.bool)
        _, primal, dual = residuals_of(problem, state, self.limits.floor)[:3]
        self._record(problem, state, everything, torch.maximum(primal, dual), k)
        self.found.status[self.rows] = int(Status.MAX_STEPS)


def starting_rows(problem: Programme) -> _Rows:
    """The solution with constraints as springs, its slacks and multipliers moved into the positive."""
    m = problem.m
    weight = torch.ones_like(problem.d)
    weight[:, m:] = 1 / PROXIMAL
    factor = factorise(problem.Q, problem.C, weight, PRIMAL)
    x = solve_factor(factor, times_transposed(problem.C, weight * problem.d) - problem.q)
    left = problem.d - times(problem.C, x)
    s = left[:, :m]
    v = torch.cat([_positive(-s), -left[:, m:]], 1)
    nothing = torch.zeros_like(s, dtype=torch.bool)
    return _Rows(x, _positive(s), v, nothing, nothing.clone())


def _positive(t: Tensor) -> Tensor:
    if t.shape[1] == 0:
        return t
    least = t.amin(1, keepdim=True)
    return torch.where(least < 0, t - least + 1, t).clamp_min(1e-2)


def residuals_of(problem: Programme, state: _Rows, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Complementarity, relative primal and dual residuals (batch,), and the residuals themselves."""
    m, z = problem.m, state.v[:, : problem.m]
    Qx, Cx, Cv = times(problem.Q, state.x), times(problem.C, state.x), times_transposed(problem.C, state.v)
    below = problem.d - Cx
    below[:, :m] -= state.s
    if problem.softness is not None:
        below = below + problem.softness * state.v
    left = Qx + problem.q + Cv
    mu = (state.s * z).mean(1) if m else torch.zeros_like(left[:, 0])
    primal = norms(below) / (1 + floor + norms(problem.d) + norms(Cx))
    terms = norms(problem.q) + norms(Qx) + norms(Cv) + floor + UNIT
    dual = beyond_rounding(left, problem.Q, state.x, state.v) / terms
    return mu, primal, dual, below, left


def step(
    problem: Programme, state: _Rows, floor: float, barrier: Tensor | None = None
) -> tuple[_Rows, Tensor, Tensor, Tensor]:
    """One predictor, one corrector; the new iterate, and complementarity and residuals of the old one."""
    m, s, v = problem.m, state.s, state.v
    z = v[:, :m]
    mu, primal, dual, below, left = residuals_of(problem, state, floor)
    soft = 0.0 if problem.softness is None else problem.softness[:, :m]
    W = torch.full_like(v, EQUATION) if problem.softness is None else problem.softness.clamp_min(EQUATION)
    W[:, :m] = s / z + soft
    weight = 1 / W
    factor = factorise(problem.Q, problem.C, weight, PRIMAL)

    def direction(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Towards s z = s z + target."""
        right = below.clone()
        right[:, :m] -= target / z
        dx = solve_factor(factor, times_transposed(problem.C, weight * right) - left)
        dv = weight * (times(problem.C, dx) - right)
        return dx, (target - s * dv[:, :m]) / z, dv

    product = s * z
    _, ds, dv = direction(-product)
    dz = dv[:, :m]
    # In the affine direction ds / s + dz / z = -1: an active slack goes to zero, an inactive multiplier does.
    guess = dz / z > ds / s
    length = torch.minimum(to_boundary(s, ds), to_boundary(z, dz)).clamp_max(1.0)
    ahead = ((s + length * ds) * (z + length * dz)).mean(1)
    centring = (ahead / mu).clamp(0.0, 1.0) ** 3
    target = (centring * mu).unsqueeze(1)
    if barrier is None:
        target = target - product - ds * dz
    else:
        # The last steps are Newton's on the centred equations, without a corrector.
        far = target > barrier.unsqueeze(1)
        target = torch.where(far, target - ds * dz, barrier.unsqueeze(1)) - product
    dx, ds, dv = direction(target)
    length = torch.minimum(to_boundary(s, ds), to_boundary(z, dv[:, :m]))
    length = (BOUNDARY * length).clamp_max(1.0)
    following = _Rows(state.x + length * dx, s + length * ds, v + length * dv, guess, state.tried)
    return following, mu, primal, dual


def _diverging(problem: Programme, state: _Rows) -> Tensor:
    """Whether a sample's multipliers or variables all but prove that it has no optimum (batch,)."""
    size = norms(state.x)
    large = torch.linalg.vector_norm(state.v, ord=math.inf, dim=1).maximum(size) > LARGE
    if problem.softness is not None or not bool(large.any()):
        return torch.zeros_like(large)
    length = size + torch.linalg.vector_norm(problem.d, ord=math.inf, dim=1) + 1
    gain = -torch.linalg.vecdot(problem.d, state.v)
    empty = (gain > 0) & (norms(times_transposed(problem.C, state.v)) * length <= 1e-7 * gain)
    Cx = times(problem.C, state.x)
    Cx[:, : problem.m].clamp_min_(0)
    flat = (norms(times(problem.Q, state.x)) <= 1e-7 * size) & (norms(Cx) <= 1e-7 * size)
    down = torch.linalg.vecdot(problem.q, state.x) < -1e-7 * size * norms(problem.q)
    return large & (empty | (flat & down))
