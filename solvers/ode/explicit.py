"""Explicit Runge-Kutta methods."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..options import options
from . import tableaus
from .method import Carry, Method, Rhs, Step, Time, column
from .tableau import Row, Tableau
from .tableau_dopri8 import DOPRI8

# Differences of so many times the resolution of the state are no more than rounding.
_ROUNDING = 100.0


def _least(y: Tensor) -> tuple[float, float]:
    """What differences that tell something are larger than: a number, and a share of the state."""
    kind = torch.finfo(y.dtype)
    return kind.tiny**0.5, _ROUNDING * kind.eps


class ExplicitRungeKutta(Method):
    """An explicit Runge-Kutta method, given by its tableau.

    Under no_grad the stages lie first in one buffer (stages, batch * n), and each combination of stages is one
    matrix-vector product with it; otherwise they are a list and each combination a chain of additions.
    """

    tableau: ClassVar[Tableau]

    @property
    def order(self) -> int:
        """Derived from the tableau."""
        return self.tableau.order

    @property
    def error_order(self) -> int | None:
        """One more than the embedded method's order."""
        return None if self.tableau.error is None else self.tableau.embedded_order + 1

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """The derivative at the start, the first stage."""
        return (rhs(t, y),)

    def derivative(self, rhs: Rhs, t: Time, y: Tensor, carry: Carry) -> Tensor:
        """The first stage."""
        return carry[0]

    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Step:
        """All stages, the solution and the error estimate."""
        if rhs.functional:
            return self._recorded_step(rhs, t, y, h, carry[0])
        return self._fast_step(rhs, t, y, h, carry[0], memory or Workspace(self.tableau, y))

    def _fast_step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, first: Tensor, space: Workspace) -> Step:
        tableau = self.tableau
        space.start(t, y, h)
        solution, stage = space.evaluate(rhs, first, tableau.stages)
        carry: Carry = ()
        if tableau.fsal:
            # The field may write its next result over it.
            carry = (stage.clone(),)
        else:
            solution = space.combine(tableau.end)
        return Step(solution, space.error(), carry, space, stages=space)

    def _recorded_step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, first: Tensor) -> Step:
        tableau = self.tableau
        stages, solution = [first], y
        for row, c in zip(tableau.a[1:], tableau.c[1:]):
            solution = y + weighted(stages, row, h)
            stages.append(rhs(t + c * h, solution))
        if not tableau.fsal:
            solution = y + weighted(stages, tableau.b, h)
        error = None if tableau.error is None else weighted(stages, tableau.error, h)
        return Step(solution, error, (stages[-1],) if tableau.fsal else (), None, stages=stages)

    def strain(self, h: Time, step: Step) -> Tensor | None:
        """h |k_j - k_i| / |Y_j - Y_i| over the method's reach, for two stages i, j at the same time.

        Source: Hairer, Wanner 1996, section IV.2, equation 2.28.
        """
        if self.tableau.twins is None:
            return None
        if isinstance(step.stages, Workspace):
            parts = step.stages.twins(step.y)
            apart, change, least = torch.linalg.vector_norm(parts, dim=-1).unbind(0)
            return change / torch.maximum(apart, least)
        first, second = self.tableau.twins
        change = (step.stages[second] - step.stages[first]) * column(h, step.y)
        apart = weighted(step.stages, self.tableau.apart, h) * self.tableau.reach
        floor, share = _least(step.y)
        # Sums of squares, which the compiler fuses.
        apart, change, least = (part.square().sum(-1) for part in (apart, change, floor + share * step.y))
        return (change / torch.maximum(apart, least)).sqrt()

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """By the tableau's interpolant; its extra stages are evaluated here."""
        tableau = self.tableau
        if isinstance(step.stages, Workspace):
            space = step.stages
            for i in range(tableau.stages, len(tableau.rows)):
                stage = rhs(space.time(i), space.combine(i))
                space.put(i, stage)
                if i == tableau.end:
                    step.carry = (stage.clone(),)
            return space.polynomial()
        stages = step.stages
        for row, c in zip(tableau.rows[len(stages) :], tableau.c[len(stages) :]):
            stages.append(rhs(t + c * h, y + weighted(stages, row, h)))
        step.carry = (stages[tableau.end],)
        return torch.stack([y] + [weighted(stages, row, h) for row in tableau.interpolant])


class Workspace:
    """Buffers and constants of one solve: the stages (stages, batch * n) and the tableau as tensors.

    With steps per sample the stages are kept multiplied by these, so that combinations of them are matrix-vector
    products in either case.

    Attributes:
        bars: cotangents of the stages in a backward pass, (stages, batch * n).
        bar_rows: the same, each (batch, n).
    """

    def __init__(self, tableau: Tableau, y: Tensor) -> None:
        count = len(tableau.rows)
        self._buffer = y.new_zeros((count, y.numel()))
        self._rows = self._buffer.view(-1, *y.shape).unbind(0)
        # Views take their shape from this tensor, which is cheaper than from a size.
        self._like = self._rows[0]
        self._y = y.reshape(-1)
        self._prefixes = [self._buffer[:i].t() for i in range(count + 1)]
        self._c = tableau.c
        self._nodes = torch.tensor(tableau.c, dtype=torch.float64, device=y.device).unsqueeze(1)
        self._t: Time = 0.0
        self._h = 0.0
        self._scale: Time | None = None
        self._times: Sequence[Time] = ()
        self._weights = [y.new_tensor(row[:i]) for i, row in enumerate(tableau.rows)]
        self._error = None if tableau.error is None else y.new_tensor(tableau.error)
        self._interpolant = y.new_tensor(tableau.interpolant)
        if tableau.twins is not None:
            first, second = tableau.twins
            change = [float(i == second) - float(i == first) for i in range(second + 1)]
            self._twins = y.new_tensor([[tableau.reach * x for x in (*tableau.apart, 0.0)], change])
            self._late = self._buffer[: second + 1]
            self._parts = y.new_empty((3, *y.shape))
            self._both = self._parts[:2].view(2, -1)
            floor, self._share = _least(y)
            self._floor = y.new_tensor(floor)

    def start(self, t: Time, y: Tensor, h: Time) -> None:
        """Begin a step of length h from `y` at t."""
        self._y, self._t = y.flatten(), t
        if isinstance(h, float):
            self._h, self._scale = h, None
            self._times = [t + c * h for c in self._c]
        else:
            self._h, self._scale = 1.0, column(h, y)
            self._times = (t + self._nodes * h).unbind(0)

    def time(self, i: int) -> Time:
        """When stage i is evaluated."""
        return self._times[i]

    def evaluate(self, rhs: Rhs, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Evaluate and keep stages 1 to `count` - 1 after the `first`; the last one and its argument."""
        self.put(0, first)
        argument, stage = self._y, first
        if self._scale is None:
            # The other branch without its calls, which cost as much as a small field.
            y, h, like, addmv = self._y, self._h, self._like, torch.addmv
            parts = zip(self._times[1:count], self._prefixes[1:], self._weights[1:], self._rows[1:])
            for time, prefix, weights, row in parts:
                argument = addmv(y, prefix, weights, alpha=h).view_as(like)
                stage = rhs(time, argument)
                row.copy_(stage)
        else:
            for i in range(1, count):
                argument = self.combine(i)
                stage = rhs(self._times[i], argument)
                self.put(i, stage)
        return argument, stage

    def put(self, i: int, stage: Tensor) -> None:
        """Keep the derivative at stage i."""
        if self._scale is None:
            self._rows[i].copy_(stage)
        else:
            torch.mul(stage, self._scale, out=self._rows[i])

    def combine(self, i: int) -> Tensor:
        """y + h sum_j a_ij k_j: the argument of stage i."""
        return torch.addmv(self._y, self._prefixes[i], self._weights[i], alpha=self._h).view_as(self._like)

    def error(self) -> Tensor | None:
        """h sum_i error_i k_i."""
        if self._error is None:
            return None
        prefix = self._prefixes[len(self._error)]
        return torch.addmv(self._y, prefix, self._error, beta=0, alpha=self._h).view_as(self._like)

    def twins(self, y: Tensor) -> Tensor:
        """The differences reach (Y_j - Y_i) and h (k_j - k_i) of two stages, and of what size rounding makes either,
        (3, batch, n), all of them over h where that is a float.
        """
        torch.mm(self._twins, self._late, out=self._both)
        torch.add(self._floor, y, alpha=self._share / self._h, out=self._parts[2])
        return self._parts

    def polynomial(self) -> Tensor:
        """Coefficients (degree + 1, batch, n) of the dense output."""
        out = self._y.new_empty((len(self._interpolant) + 1, len(self._y)))
        out[0] = self._y
        torch.addmm(out[1:], self._interpolant, self._buffer, beta=0, alpha=self._h, out=out[1:])
        return out.view(-1, *self._like.shape)

    @functools.cached_property
    def bars(self) -> Tensor:
        """Zeros to begin with."""
        return torch.zeros_like(self._buffer)

    @functools.cached_property
    def bar_rows(self) -> tuple[Tensor, ...]:
        """Views."""
        return self.bars.view(-1, *self._like.shape).unbind(0)

    @functools.cached_property
    def _bar_prefixes(self) -> list[Tensor]:
        return [self.bars[:i] for i in range(len(self.bars) + 1)]

    def pull(self, h: Time, i: int, bar: Tensor) -> None:
        """Add to the stages' cotangents what cotangent `bar` (batch, n) of the argument of stage i contributes."""
        if isinstance(h, float):
            self._bar_prefixes[i].addr_(self._weights[i], bar.flatten(), alpha=h)
        else:
            self._bar_prefixes[i].addr_(self._weights[i], (bar * column(h, bar)).flatten())

    def pull_polynomial(self, h: Time, bar: Tensor) -> None:
        """Likewise for a cotangent (degree, batch, n) of the dense output but for its constant coefficient."""
        if isinstance(h, float):
            self.bars.addmm_(self._interpolant.t(), bar.flatten(1), alpha=h)
        else:
            self.bars.addmm_(self._interpolant.t(), (bar * column(h, bar)).flatten(1))

    def stretch(self, h: Time, bars: Sequence[Tensor], stages: Sequence[Tensor]) -> Tensor:
        """Cotangent of h from those of the stages: every use of a stage in the step is multiplied by h."""
        product = sum((bar * stage for bar, stage in zip(bars, stages)), torch.zeros_like(stages[0])).double()
        if isinstance(h, float):
            return product.sum() / h
        return torch.where(h == 0, 0.0, product.sum(1) / h)


def weighted(stages: list[Tensor], row: Row, h: Time) -> Tensor:
    """h sum_j row_j stages_j, differentiable."""
    total: Tensor | None = None
    scale = 1.0 if isinstance(h, Tensor) else h
    for stage, weight in zip(stages, row):
        if weight:
            total = stage * (scale * weight) if total is None else torch.add(total, stage, alpha=scale * weight)
    if total is None:
        return torch.zeros_like(stages[0])
    return total * column(h, total) if isinstance(h, Tensor) else total


@options
class Euler(ExplicitRungeKutta):
    """Euler's method: order 1, one evaluation, fixed steps."""

    tableau = tableaus.EULER


@options
class Midpoint(ExplicitRungeKutta):
    """The explicit midpoint rule: order 2, two evaluations, fixed steps."""

    tableau = tableaus.MIDPOINT


@options
class Ralston(ExplicitRungeKutta):
    """Ralston's method: order 2 with the smallest bound on its truncation error; two evaluations, fixed steps.

    Source: Ralston 1962, "Runge-Kutta methods with minimum error bounds".
    """

    tableau = tableaus.RALSTON


@options
class RK4(ExplicitRungeKutta):
    """The classical Runge-Kutta method: order 4, four evaluations, fixed steps.

    Source: Kutta 1901.
    """

    tableau = tableaus.RK4


@options
class Heun(ExplicitRungeKutta):
    """Heun's method, order 2, with Euler's embedded; two evaluations. For rough right-hand sides.

    It has no two stages at one time by which its steps could be bounded by stability; step control alone bounds them.
    """

    tableau = tableaus.HEUN


@options
class Bosh3(ExplicitRungeKutta):
    """The pair of Bogacki and Shampine: order 3(2), three evaluations. For low accuracy.

    It has no two stages at one time by which its steps could be bounded by stability; step control alone bounds them.

    Source: Bogacki and Shampine 1989, "A 3(2) pair of Runge-Kutta formulas".
    """

    tableau = tableaus.BOSH3


@options
class Dopri5(ExplicitRungeKutta):
    """The pair of Dormand and Prince: order 5(4), six evaluations, dense output of order 4.

    Source: Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae".
    """

    tableau = tableaus.DOPRI5


@options
class Tsit5(ExplicitRungeKutta):
    """Tsitouras' pair: order 5(4), six evaluations, dense output of order 4. The one to start with.

    Source: Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption".
    """

    tableau = tableaus.TSIT5


@options
class Dopri8(ExplicitRungeKutta):
    """The pair of Prince and Dormand: order 8(7), 13 evaluations, dense output of order 6. For high accuracy.

    Source: Prince and Dormand 1981, "High order embedded Runge-Kutta formulae".
    """

    tableau = DOPRI8
