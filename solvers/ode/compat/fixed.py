"""Steps of given lengths, along a grid or until an event."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mesh import FREE, Taken
from ..method import Carry, Rhs
from ..problem import Keeper, Problem, Run
from ..tableau import Row
from .adaptive import Hooks, found, horner, locate
from .methods import Fixed

_MOST_STEPS_TO_EVENT = 20000


def make_grid(fixed: Fixed, field: Any, y0: Any, t: Tensor) -> Tensor:
    """The times that steps lead from and to.

    Args:
        fixed: how to make it.
        field, y0: what a caller's own constructor is given.
        t: the output times.

    Raises:
        AssertionError: a caller's grid has other ends than the output times.
    """
    if fixed.step_size is not None:
        sign = 1.0 if t[0] <= t[-1] else -1.0
        start, end = sign * t[0], sign * t[-1]
        count = torch.ceil((end - start) / fixed.step_size + 1).item()
        times = torch.arange(0, count, dtype=t.dtype, device=t.device) * fixed.step_size + start
        return sign * torch.cat([times[:-1], end.reshape(1)])
    if fixed.grid_constructor is None:
        return t
    grid = fixed.grid_constructor(field, y0, t)
    assert grid[0] == t[0] and grid[-1] == t[-1], "the grid must begin and end where t does"
    return grid


class FixedSteps:
    """One solve along a grid."""

    def __init__(self, problem: Problem, fixed: Fixed, grid: Tensor, hooks: Hooks, keeper: Keeper | None) -> None:
        self.problem, self.fixed, self.hooks, self.keeper = problem, fixed, hooks, keeper or Keeper(1)
        self.times: list[float] = grid.tolist()
        self.lengths: list[float] = grid.diff().tolist()

    def run(self) -> Run:
        """Take all steps."""
        problem, rhs, method, outputs = self.problem, self.problem.rhs, self.problem.method, self.problem.times.listed
        assert outputs is not None
        sign = math.copysign(1.0, outputs[-1] - outputs[0])
        carry: Carry = ()
        y, memory, restart = problem.y0, None, True
        steps: list[Taken] = []
        dense: list[Tensor] = []
        picks: list[int] = []
        places: list[int] = []
        moments = [(t, new_t, h) for t, new_t, h in zip(self.times, self.times[1:], self.lengths) if h]
        for i, (t, new_t, h) in enumerate(moments):
            if self.hooks.step is not None:
                self.hooks.step(t, y, abs(h))
            handed = (y, carry)
            if not carry:
                self.keeper.renew()
                carry = method.init(rhs, t, y)
            self.keeper.attempt()
            step = method.step(rhs, t, y, h, carry, memory)
            memory, wanted = step.memory, False
            while len(places) + 2 < len(outputs) and (new_t - outputs[len(places) + 1]) * sign >= 0:
                places.append(len(picks))
                wanted = True
            if wanted:
                picks.append(i)
                dense.append(method.dense(rhs, t, y, h, step))
            self.keeper.offer(i, *handed, restart)
            steps.append(Taken(t, h, FREE, False, restart, wanted))
            y, carry, restart = step.y, step.carry, False
        self.keeper.close(y, carry)
        return found(problem, y, steps, picks, dense, places, 0)


class FixedStepsToEvent:
    """One solve until an event, by steps of one length."""

    def __init__(
        self,
        problem: Problem,
        fixed: Fixed,
        keeper: Keeper | None,
        event: Callable[[float, Tensor], float],
        tolerance: Any,
    ) -> None:
        """`event` maps a time and a matrix to a number whose sign is watched; `tolerance` is how exactly in time."""
        assert fixed.step_size is not None, "an event under a method of fixed steps needs `step_size` in options"
        self.problem, self.keeper, self.event, self.tolerance = problem, keeper or Keeper(1), event, tolerance
        self.length = float(fixed.step_size)
        self.located: float | None = None

    def run(self) -> Run:
        """Step to the event.

        Raises:
            RuntimeError: there is none within 20000 steps.
        """
        problem, rhs, method, outputs = self.problem, self.problem.rhs, self.problem.method, self.problem.times.listed
        assert outputs is not None
        h = math.copysign(self.length, outputs[-1] - outputs[0])
        carry: Carry = ()
        y, t, memory, restart = problem.y0, outputs[0], None, True
        before = self.event(t, y)
        steps: list[Taken] = []
        for i in itertools.count():
            if i == _MOST_STEPS_TO_EVENT:
                raise RuntimeError(f"Reached maximum number of iterations {i}: no event up to t = {t:.6g}.")
            handed = (y, carry)
            if not carry:
                self.keeper.renew()
                carry = method.init(rhs, t, y)
            self.keeper.attempt()
            step = method.step(rhs, t, y, h, carry, memory)
            after = self.event(t + h, step.y)
            happened = (after > 0) - (after < 0) != (before > 0) - (before < 0)
            dense = [method.dense(rhs, t, y, h, step)] if happened else []
            self.keeper.offer(i, *handed, restart)
            steps.append(Taken(t, h, FREE, True, restart, happened))
            if happened:
                self.keeper.close(step.y, step.carry)
                self.located = locate(dense[0], t, h, before, self.event, self.tolerance)
                return found(problem, step.y, steps, [i], dense, [], 0)
            t, y, carry, memory, restart = t + h, step.y, step.carry, step.memory, False
        raise AssertionError


def recorded(rhs: Rhs, fixed: Fixed, grid: Tensor, y: Tensor, t: Tensor, hooks: Hooks) -> list[Tensor]:
    """The matrices at the output times `t`, in operations that autograd records, derivatives of the grid included."""
    outputs, times = t.tolist(), grid.tolist()
    sign = math.copysign(1.0, outputs[-1] - outputs[0])
    rows = [y]
    # As in torchdiffeq a straight line is not asked for at its end, and a cubic is: its value there moves with `t`.
    cubic = len(fixed.tableau.interpolant) > 1
    for i, (start, end) in enumerate(itertools.pairwise(grid)):
        if times[i] == times[i + 1]:
            continue
        if hooks.step is not None:
            hooks.step(times[i], y, abs(times[i + 1] - times[i]))
        step = _RecordedStep(rhs, fixed, start, end, y)
        while len(rows) < len(outputs) and (times[i + 1] - outputs[len(rows)]) * sign >= 0:
            inside = cubic or (len(rows) + 1 < len(outputs) and outputs[len(rows)] != times[i + 1])
            rows.append(step.at(t[len(rows)]) if inside else step.last)
        y = step.last
    return rows


class _RecordedStep:
    """One step between two times that may require gradients.

    Attributes:
        last: the matrix at its end.
    """

    def __init__(self, rhs: Rhs, fixed: Fixed, start: Tensor, end: Tensor, y: Tensor) -> None:
        self._rhs, self._tableau, self._perturb = rhs, fixed.tableau, fixed.perturb
        self._start, self._end, self._h, self._y = start, end, end - start, y
        self._stages: list[Tensor] = []
        for i in range(self._tableau.stages):
            self._evaluate(i)
        self.last = y + self._combined(self._tableau.b)

    def at(self, t: Tensor) -> Tensor:
        """The matrix at a time inside, interpolated."""
        tableau = self._tableau
        if len(self._stages) == tableau.stages and any(any(row[tableau.stages :]) for row in tableau.interpolant):
            self._evaluate(tableau.end)
        dense = torch.stack([self._y] + [self._combined(row) for row in tableau.interpolant])
        return horner(dense, ((t - self._start) / self._h).to(self._y.dtype))

    def _evaluate(self, i: int) -> None:
        argument = self._y + self._combined(self._tableau.rows[i])
        self._stages.append(self._rhs(self._time(self._tableau.c[i]), argument))

    def _combined(self, row: Row) -> Tensor:
        """h sum_j row_j stages_j."""
        terms = [stage * weight for stage, weight in zip(self._stages, row) if weight]
        if not terms:
            return torch.zeros_like(self._y)
        return self._h.to(terms[0].dtype) * sum(terms[1:], terms[0])

    def _time(self, c: float) -> Tensor:
        """When a stage is evaluated; with `perturb` just inside of the step where that is at one of its ends."""
        exact = self._start if c == 0 else self._end if c == 1 else self._start + c * self._h
        exact = exact.to(self._rhs.spec.dtype)
        if not self._perturb or c not in (0, 1):
            return exact
        here = exact.detach()
        inward = torch.full_like(here, math.inf) * (self._h if c == 0 else -self._h).detach().sign().to(here.dtype)
        return exact + (torch.nextafter(here, inward) - here)
