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


class ReversibleMethod(Method):
    """A method whose step, as a map of state and carry, has an inverse that is as cheap as itself."""

    @abc.abstractmethod
    def undo(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Undone:
        """Where the step of length h from t began that ended in `y` and `carry`."""


Undone = tuple[Tensor, Carry, Any]
"""State and carry before a step, and the method's memory."""


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
        bare = _bare(type(self.base))
        forth = bare.step(rhs, t, other, h, bare.init(rhs, t, other), spaces[0])
        kept = self._kept(h, y)
        before = (y - (forth.y - other) - (1 - kept) * other) / kept
        return before, (other,), (forth.memory, space)

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """The base method's from the second state, and the distance of the two, which shrinks along the step."""
        other, forth = step.stages
        coefficients = self.base.dense(rhs, t, other, h, forth)
        apart = y - other
        shift = torch.stack((apart, (self._kept(h, y) - 1) * apart))
        return torch.cat((coefficients[:2] + shift, coefficients[2:]))

    def _back(self, rhs: Rhs, t: Time, y: Tensor, h: Time, space: Any) -> tuple[Tensor, Any]:
        """Psi_{-h}(t + h, y), and the work space."""
        bare = _bare(type(self.base))
        step = bare.step(rhs, t + h, y, -h, bare.init(rhs, t + h, y), space)
        return step.y - y, step.memory

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

