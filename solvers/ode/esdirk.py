"""Diagonally implicit Runge-Kutta methods with an explicit first stage, for stiff problems."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

from ..options import options, require
from ..transforms import inside_transform, no_derivatives, recording_tangents
from . import implicit_tableaus as tableaus
from .explicit import weighted
from .method import Carry, Method, Rhs, Step, Time, column
from .newton import Linearisation, StageNewton, Stages
from .stage_root import attach
from .tableau import Row, Tableau

# Of the polynomial in time through earlier stages that a later one is guessed from.
_DEGREE = 2


@options
class ESDIRK(Method):
    """A singly diagonally implicit Runge-Kutta method with an explicit first stage, given by its tableau.

    Its stages are the roots z_i = h k_i of z = h f(t + c_i h, base_i + gamma z), found one after another by a
    simplified Newton iteration that starts from the earlier stages. A step whose stages are not found is rejected.

    Derivatives are those of the exact roots, by the implicit function theorem at each stage, and not of the
    iterations that found them.

    Attributes:
        newton: how the stage equations are solved.
    """

    newton: StageNewton = StageNewton()

    # Whether the error estimate is multiplied by (I - h gamma J)^-1, which keeps one that is not stiffly accurate from
    # growing with the stiffness.
    filtered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.newton, StageNewton, "newton")

    @property
    @abc.abstractmethod
    def tableau(self) -> Tableau:
        """The coefficients, a class attribute of every method."""

    @property
    def order(self) -> int:
        """Derived from the tableau."""
        return self.tableau.order

    @property
    def error_order(self) -> int | None:
        """One more than the lower of the pair's orders."""
        return min(self.tableau.order, self.tableau.embedded_order) + 1

    def tuned(self, rtol: float, atol: float) -> Method:
        """With stage equations solved as closely as these tolerances ask."""
        return dataclasses.replace(self, newton=self.newton.tuned(rtol, atol))

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """The derivative at the start, the first stage."""
        return (rhs(t, y),)

    def derivative(self, rhs: Rhs, t: Time, y: Tensor, carry: Carry) -> Tensor:
        """The first stage."""
        return carry[0]

    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: object = None) -> Step:
        """All stages, the solution and the error estimate."""
        with no_derivatives():
            known = memory if isinstance(memory, Linearisation) and memory.holds(t, y) else None
            step = self._search(rhs, _number(t), y, _number(h), carry[0], known)
        if torch.is_grad_enabled() or recording_tangents():
            return self._record(rhs, t, y, h, carry[0], step)
        return step

    def _search(self, rhs: Rhs, t: Time, y: Tensor, h: Time, first: Tensor, known: Linearisation | None) -> Step:
        tableau, newton, gamma = self.tableau, self.newton, self.tableau.a[-1][-1]
        linearisation = known or Linearisation.of(newton, rhs, t, y)
        system = linearisation.shifted(h * gamma, newton.krylov)
        equations = Stages(newton, rhs, system, y, h, gamma)
        stages = [column(h, y) * first]
        for row, c, guess in zip(tableau.a[1:], tableau.c[1:], predictors(tableau)):
            base = y + weighted(stages, row, 1.0)
            stages.append(equations.solve(t + c * h, base, weighted(stages, guess, 1.0)))
            if equations.hopeless:
                stages += stages[-1:] * (tableau.stages - len(stages))
                break
        solution, carry = self._end(y, h, stages)
        assert tableau.error is not None
        error = weighted(stages, tableau.error, 1.0)
        if self.filtered:
            error = torch.where(error.isfinite().all(1, keepdim=True), system.solve(error), error)
        return Step(solution, error, carry, linearisation, equations.failed, stages)

    def _record(self, rhs: Rhs, t: Time, y: Tensor, h: Time, first: Tensor, found: Step) -> Step:
        """The step that was found, as a function of all that it depends on."""
        tableau, gamma = self.tableau, self.tableau.a[-1][-1]
        stages = [column(h, y) * first]
        for row, c, root in zip(tableau.a[1:], tableau.c[1:], found.stages[1:]):
            base = y + weighted(stages, row, 1.0)
            stages.append(attach(rhs, t + c * h, base, gamma, h, root, self.newton.dense_size))
        solution, carry = self._end(y, h, stages)
        return Step(solution, found.error, carry, None, found.failed, stages)

    def _end(self, y: Tensor, h: Time, stages: list[Tensor]) -> tuple[Tensor, Carry]:
        """The solution, and its derivative as the last stage knows it."""
        # Samples that wait take steps of no length; what becomes of their carry is not used.
        length = torch.where(h == 0, 1.0, h) if isinstance(h, Tensor) and h.ndim else h
        return y + weighted(stages, self.tableau.b, 1.0), (stages[-1] / column(length, y),)

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """By the tableau's interpolant, at no further evaluation."""
        return torch.stack([y] + [weighted(step.stages, row, 1.0) for row in self.tableau.interpolant])


def _number(time: Time) -> Time:
    """A time of the whole batch as a float, so that a replay that records it repeats the search to the last bit."""
    if isinstance(time, Tensor) and not time.ndim and not inside_transform():
        return float(time)
    return time


@functools.cache
def predictors(tableau: Tableau) -> tuple[Row, ...]:
    """For every stage but the first, the weights of earlier stages that guess it.

    The polynomial through the earlier stages, of degree two at most where they are more than that determine: the
    weights of least norm that are exact for it.
    """
    nodes = torch.tensor(tableau.c[: tableau.stages], dtype=torch.float64)
    rows = []
    for i in range(1, tableau.stages):
        powers = nodes[: i + 1] ** torch.arange(min(i, _DEGREE + 1), dtype=torch.float64).unsqueeze(1)
        rows.append(tuple((torch.linalg.pinv(powers[:, :i]) @ powers[:, i]).tolist()))
    return tuple(rows)


@options
class ImplicitEuler(ESDIRK):
    """The implicit Euler method: order 1, L-stable. For very low accuracy, and where nothing must overshoot.

    The error is estimated by the difference to the trapezoidal rule, filtered so that it stays bounded where the
    problem is stiff.
    """

    tableau = tableaus.IMPLICIT_EULER
    filtered = True


@options
class Kvaerno3(ESDIRK):
    """Kvaerno's pair of order 3(2), three implicit stages, both L-stable and stiffly accurate. For low accuracy.

    Source: Kvaerno 2004, "Singly diagonally implicit Runge-Kutta methods with an explicit first stage".
    """

    tableau = tableaus.KVAERNO3


@options
class Kvaerno5(ESDIRK):
    """Kvaerno's pair of order 5(4), six implicit stages, both stiffly accurate, the solution L-stable.

    The one to start with where a problem is stiff. It has a dense output of order 4 of its own.

    Source: Kvaerno 2004, "Singly diagonally implicit Runge-Kutta methods with an explicit first stage".
    """

    tableau = tableaus.KVAERNO5
