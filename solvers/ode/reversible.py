"""Methods whose steps can be undone exactly, which `ReversibleAdjoint` reconstructs states with."""

from __future__ import annotations

import abc
import functools
from typing import Any

import torch
from torch import Tensor

from ..options import options, require
from .explicit import ExplicitRungeKutta, Tsit5
from .method import Carry, Method, Rhs, Step, Time, column, hermite
from .tableau import Tableau
from .tracer import Tracer


class ReversibleMethod(Method):
    """A method whose step, as a map of state and carry, has an inverse that is as cheap as itself."""

    @abc.abstractmethod
    def undo(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Undone:
        """Where the step of length h from t began that ended in `y` and `carry`."""

    def retrace(self, rhs: Rhs, t: Time, h: Time, end: Point, bar: Point, record: Tracer, memory: Any) -> Retraced:
        """Undo a step and pull cotangents through it, evaluating the field once for both.

        Args:
            end: state and carry after the step.
            bar: their cotangents.
            record: records a function of a matrix.
            memory: what retracing the step after this one returned, or None.

        Returns:
            State and carry before the step, their cotangents, and memory; None from a method that has no better way
            than to undo the step and to record it again.
        """
        return None


Point = tuple[Tensor, Carry]
"""State and carry."""

Undone = tuple[Tensor, Carry, Any]
"""State and carry before a step, and the method's memory."""

Retraced = tuple[Point, Point, Any] | None


@options
class ReversibleHeun(ReversibleMethod):
    """The reversible Heun method: order 2, one evaluation a step.

    Beside the state it carries a second solution that leaps over it, y^_{n+1} = 2 y_n - y^_n + h f(y^_n), and the field
    there. The error is estimated by the difference to Euler's method.

    Its linear stability region is the segment [-i, i] of the imaginary axis: nothing is damped, and along decaying
    solutions the two may drift apart. Choose it for oscillations, short horizons and neural differential equations;
    `Reversible(Tsit5())` where the field is contracting or accuracy matters.

    Source: Kidger, Foster, Li and Lyons 2021, "Efficient and accurate gradients for neural SDEs", algorithm 1.
    """

    @property
    def order(self) -> int:
        """Two."""
        return 2

    @property
    def error_order(self) -> int:
        """Of Euler's method, embedded."""
        return 2

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """The second solution begins where the first does."""
        return y, rhs(t, y)

    def derivative(self, rhs: Rhs, t: Time, y: Tensor, carry: Carry) -> Tensor:
        """The field at the second solution."""
        return carry[1]

    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Step:
        """The second solution leaps, then the first one takes the mean of both slopes."""
        other, slope = carry
        length = column(h, y)
        ahead = 2 * y - other + length * slope
        rate = rhs(t + h, ahead)
        solution = y + 0.5 * length * (slope + rate)
        return Step(solution, 0.5 * length * (rate - slope), (ahead, rate), stages=(slope, rate))

    def undo(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Undone:
        """The same step backwards: the method is symmetric."""
        ahead, rate = carry
        length = column(h, y)
        other = 2 * y - ahead - length * rate
        slope = rhs(t, other)
        return y - 0.5 * length * (slope + rate), (other, slope), None

    def retrace(self, rhs: Rhs, t: Time, h: Time, end: Point, bar: Point, record: Tracer, memory: Any) -> Retraced:
        """The field at the second solution serves the step that starts there and the one that ends there."""
        (y, (ahead, rate)), (y_bar, (ahead_bar, rate_bar)) = end, bar
        length = column(h, y)
        at_end = memory or record(lambda x: rhs(t + h, x), ahead)
        other = 2 * y - ahead - length * rate
        at_start = record(lambda x: rhs(t, x), other)
        before = y - 0.5 * length * (at_start.value + rate)
        half_bar = 0.5 * length * y_bar
        ahead_bar = ahead_bar + at_end.pull(rate_bar + half_bar)
        bars = (y_bar + 2 * ahead_bar, (-ahead_bar, half_bar + length * ahead_bar))
        return (before, (other, at_start.value)), bars, at_start

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """The cubic with the slopes of the second solution, at no further evaluation."""
        return hermite(y, step.y, step.stages[0], step.stages[1], h)


@options
class AsynchronousLeapfrog(ReversibleMethod):
    """The asynchronous leapfrog method, the integrator of MALI: order 2, one evaluation a step.

    It carries a velocity v beside the state: half a step along v, the field u there, v <- v + 2 damping (u - v), and
    half a step along the new v. The error is estimated by the difference to Euler's method along v.

    Undamped its linear stability region is the segment [-i, i] of the imaginary axis: errors of v oscillate, and
    decaying solutions are unstable over long horizons. With damping below 1 the region has an interior, but the order
    is 1, and each step back amplifies rounding by 1 / (2 damping - 1).

    Attributes:
        damping: in (1/2, 1].

    Raises:
        ValueError: damping is out of range.

    Source: Mutze 2013, "An asynchronous leapfrog method II"; Zhuang, Dvornek, Tatikonda and Duncan 2021, "MALI: a
    memory efficient and reverse accurate integrator for neural ODEs".
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0.5 < self.damping <= 1:
            raise ValueError(f"AsynchronousLeapfrog: damping must lie in (1/2, 1]; got {self.damping}.")

    @property
    def order(self) -> int:
        """Two, or one with damping."""
        return 2 if self.damping == 1 else 1

    @property
    def error_order(self) -> int:
        """Of Euler's method, embedded."""
        return 2

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """The velocity."""
        return (rhs(t, y),)

    def derivative(self, rhs: Rhs, t: Time, y: Tensor, carry: Carry) -> Tensor:
        """The velocity."""
        return carry[0]

    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Step:
        """Half a step along the old velocity, half a step along the new one."""
        (velocity,) = carry
        half = 0.5 * column(h, y)
        middle = y + half * velocity
        pull = rhs(t + 0.5 * h, middle)
        after = velocity + 2 * self.damping * (pull - velocity)
        return Step(middle + half * after, half * (after - velocity), (after,), stages=(velocity, after))

    def undo(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Undone:
        """Back along the new velocity, and from the field there to the old one."""
        (after,) = carry
        half = 0.5 * column(h, y)
        middle = y - half * after
        pull = rhs(t + 0.5 * h, middle)
        velocity = (after - 2 * self.damping * pull) / (1 - 2 * self.damping)
        return middle - half * velocity, (velocity,), None

    def retrace(self, rhs: Rhs, t: Time, h: Time, end: Point, bar: Point, record: Tracer, memory: Any) -> Retraced:
        """The field in the middle of the step serves both."""
        (y, (after,)), (y_bar, (after_bar,)) = end, bar
        half, twice = 0.5 * column(h, y), 2 * self.damping
        middle = y - half * after
        pull = record(lambda x: rhs(t + 0.5 * h, x), middle)
        velocity = (after - twice * pull.value) / (1 - twice)
        after_bar = after_bar + half * y_bar
        middle_bar = y_bar + pull.pull(twice * after_bar)
        bars = (middle_bar, ((1 - twice) * after_bar + half * middle_bar,))
        return (middle - half * velocity, (velocity,)), bars, None

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """The cubic with the velocities as slopes, at no further evaluation."""
        return hermite(y, step.y, step.stages[0], step.stages[1], h)


@options
class Reversible(ReversibleMethod):
    """Any explicit Runge-Kutta method made reversible: its order, twice its evaluations, and a second state z.

    With Psi_h(t, y) the change that the base method makes in a step,

        y' = coupling y + (1 - coupling) z + Psi_h(t, z),    z' = z - Psi_{-h}(t + h, y').

    The error estimate and the dense output are the base method's from z.

    The coupling draws the two states together, which gives the method a linear stability region with an interior,
    unlike `ReversibleHeun` and `AsynchronousLeapfrog`; it shrinks as the coupling approaches 1, where there is none. A
    step back amplifies rounding by 1 / coupling: 0.999 costs one digit in 2300 steps. Not for stiff problems.

    Attributes:
        base: the method.
        coupling: in (0, 1].

    Raises:
        TypeError: base is no explicit Runge-Kutta method.
        ValueError: coupling is out of range.

    Source: McCallum and Foster 2024, "Efficient, accurate and stable gradients for neural ODEs".
    """

    base: ExplicitRungeKutta = Tsit5()
    coupling: float = 0.999

    def __post_init__(self) -> None:
        require(self.base, ExplicitRungeKutta, "base")
        if not 0 < self.coupling <= 1:
            raise ValueError(f"Reversible: coupling must lie in (0, 1]; got {self.coupling}.")

    @property
    def order(self) -> int:
        """The base method's."""
        return self.base.order

    @property
    def error_order(self) -> int | None:
        """The base method's."""
        return self.base.error_order

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """The second state begins where the first does."""
        return (y,)

    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Step:
        """The first state from the second, then the second from the first."""
        (other,) = carry
        spaces = memory or (None, None)
        forth = self.base.step(rhs, t, other, h, self.base.init(rhs, t, other), spaces[0])
        kept = self._kept(h, y)
        solution = kept * y + (1 - kept) * other + (forth.y - other)
        change, space = self._back(rhs, t, solution, h, spaces[1])
        return Step(solution, forth.error, (other - change,), (forth.memory, space), stages=(other, forth))

    def undo(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Undone:
        """The second state from the first, then the first from the second."""
        spaces = memory or (None, None)
        change, space = self._back(rhs, t, y, h, spaces[1])
        other = carry[0] + change
        forth, first_space = self._forth(rhs, t, other, h, spaces[0])
        kept = self._kept(h, y)
        return (y - forth - (1 - kept) * other) / kept, (other,), (first_space, space)

    def retrace(self, rhs: Rhs, t: Time, h: Time, end: Point, bar: Point, record: Tracer, memory: Any) -> Retraced:
        """Either change serves both."""
        (y, (z,)), (y_bar, (z_bar,)) = end, bar
        kept = self._kept(h, y)
        back = record(lambda x: self._back(rhs, t, x, h, None)[0], y)
        other = z + back.value
        forth = record(lambda x: self._forth(rhs, t, x, h, None)[0], other)
        before = (y - forth.value - (1 - kept) * other) / kept
        y_bar = y_bar + back.pull(-z_bar)
        bars = (kept * y_bar, (z_bar + (1 - kept) * y_bar + forth.pull(y_bar),))
        return (before, (other,)), bars, None

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """The base method's from the second state, and the distance of the two, which shrinks along the step."""
        other, forth = step.stages
        coefficients = self.base.dense(rhs, t, other, h, forth)
        apart = y - other
        shift = torch.stack((apart, (self._kept(h, y) - 1) * apart))
        return torch.cat((coefficients[:2] + shift, coefficients[2:]))

    def _forth(self, rhs: Rhs, t: Time, z: Tensor, h: Time, space: Any) -> tuple[Tensor, Any]:
        """Psi_h(t, z), and the work space."""
        bare = _bare(type(self.base))
        step = bare.step(rhs, t, z, h, bare.init(rhs, t, z), space)
        return step.y - z, step.memory

    def _back(self, rhs: Rhs, t: Time, y: Tensor, h: Time, space: Any) -> tuple[Tensor, Any]:
        """Psi_{-h}(t + h, y), and the work space."""
        return self._forth(rhs, t + h, y, -h, space)

    def _kept(self, h: Time, y: Tensor) -> float | Tensor:
        """The coupling; one for samples that wait, whose state must stay as it is."""
        if isinstance(h, Tensor) and h.ndim:
            return column(torch.where(h == 0, 1.0, self.coupling), y)
        return self.coupling


@functools.cache
def _bare(method: type[ExplicitRungeKutta]) -> ExplicitRungeKutta:
    """The same steps without the stages that only an error estimate or the next step would use."""
    tableau = method.tableau
    a, b = tableau.a, tableau.b
    while len(b) > 1 and b[-1] == 0:
        a, b = a[:-1], b[:-1]
    name = f"{method.__name__}WithoutEstimate"
    return type(name, (method,), {"tableau": Tableau(a=a, b=b), "__doc__": method.__doc__})()
