"""The methods by torchdiffeq's names, and what their options mean."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import warnings
from collections.abc import Callable
from fractions import Fraction as F
from typing import Any

import torch
from torch import Tensor

from ...options import options
from .. import tableaus
from ..explicit import Bosh3, Dopri8, ExplicitRungeKutta, Heun
from ..tableau import Tableau


def _dopri5() -> Tableau:
    """Dormand and Prince's method with the interpolant that torchdiffeq takes.

    It is the quartic with the right values at both ends and in the middle and slopes at both ends.

    Source: Shampine 1986, "Some practical Runge-Kutta formulas".
    """
    base = tableaus.DOPRI5
    middle: tuple[F | int, ...] = (
        F(6025192743, 30085553152),
        0,
        F(51252292925, 65400821598),
        F(-2691868925, 45128329728),
        F(187940372067, 1594534317056),
        F(-1776094331, 19743644256),
        F(11237099, 235043384),
    )
    weights: tuple[list[float], ...] = ([], [], [], [])
    for i, (b, m) in enumerate(zip(base.b, middle)):
        start, end, half = float(i == 0), float(i == 6), float(F(m)) / 2
        weights[0].append(start)
        weights[1].append(end - 4 * start - 5 * b + 16 * half)
        weights[2].append(5 * start - 3 * end + 14 * b - 32 * half)
        weights[3].append(2 * (end - start) - 8 * b + 16 * half)
    return dataclasses.replace(base, weights=tuple(tuple(row) for row in weights))


# Fehlberg's pair of orders 2(1), which needs the derivative at no further point.
_FEHLBERG2 = Tableau(
    a=((), (0.5,), (1 / 256, 255 / 256)), b=(1 / 512, 255 / 256, 1 / 512), error=(-1 / 512, 0.0, 1 / 512)
)
# Heun's method of third order.
_HEUN3 = Tableau(a=((), (1 / 3,), (0.0, 2 / 3)), b=(0.25, 0.0, 0.75))
# Kutta 1901: the "3/8 rule", which is torchdiffeq's "rk4".
_THREE_EIGHTHS = Tableau(
    a=((), (float(F(1, 3)),), (float(F(-1, 3)), 1.0), (1.0, -1.0, 1.0)), b=(0.125, 0.375, 0.375, 0.125)
)


@options
class Given(ExplicitRungeKutta):
    """The method of any explicit tableau."""

    tableau: Tableau  # type: ignore[misc]


# In the order in which an unknown name is answered; the class that torchdiffeq's warnings name.
CLASSES = {
    "dopri8": "Dopri8Solver",
    "dopri5": "Dopri5Solver",
    "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2",
    "adaptive_heun": "AdaptiveHeunSolver",
    "euler": "Euler",
    "midpoint": "Midpoint",
    "heun2": "Heun2",
    "heun3": "Heun3",
    "rk4": "RK4",
    "explicit_adams": "AdamsBashforth",
    "implicit_adams": "AdamsBashforthMoulton",
    "fixed_adams": "AdamsBashforthMoulton",
    "scipy_solver": "ScipyWrapperODESolver",
}
ADAPTIVE: dict[str, ExplicitRungeKutta] = {
    "dopri8": Dopri8(),
    "dopri5": Given(_dopri5()),
    "bosh3": Bosh3(),
    "fehlberg2": Given(_FEHLBERG2),
    "adaptive_heun": Heun(),
}
FIXED = {
    "euler": tableaus.EULER,
    "midpoint": tableaus.MIDPOINT,
    "heun2": tableaus.HEUN,
    "heun3": _HEUN3,
    "rk4": _THREE_EIGHTHS,
}
FOREIGN = ("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """An adaptive method and how its steps are chosen.

    Attributes:
        method: the integrator.
        min_step, max_step: bounds of a step's length.
        first_step: the length of the first step; None estimates it.
        step_t: times to step to, sorted in the direction of time.
        jump_t: times at which the field jumps, likewise.
        safety: aim at this fraction of the step that would just be accepted.
        ifactor, dfactor: the largest and smallest factor from one step to the next.
        max_num_steps: a budget for each output time.
        dtype: of the times.
    """

    method: ExplicitRungeKutta
    min_step: float
    max_step: float
    first_step: float | None
    step_t: tuple[float, ...]
    jump_t: tuple[float, ...]
    safety: float
    ifactor: float
    dfactor: float
    max_num_steps: int
    dtype: torch.dtype

    def following(self, h: float, ratio: float) -> float:
        """The length of the step after one of length `h` whose error was `ratio` times the tolerance."""
        if ratio == 0:
            return self.clipped(h * self.ifactor)
        least = 1.0 if ratio < 1 else self.dfactor
        order = self.method.error_order
        assert order is not None
        return self.clipped(h * min(self.ifactor, max(self.safety * ratio ** (-1 / order), least)))

    def clipped(self, h: float) -> float:
        """`h` within the bounds."""
        return min(max(h, self.min_step), self.max_step)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A method of fixed steps.

    Attributes:
        tableau: the integrator's, whose dense output is the interpolation that was asked for.
        step_size: the length of all steps but the last, or None.
        grid_constructor: makes the grid from the field, the initial value and the output times, or None.
        perturb: the field is evaluated just inside of every step at its ends.
    """

    tableau: Tableau
    step_size: Any
    grid_constructor: Callable[[Any, Any, Tensor], Tensor] | None
    perturb: bool


def read_method(method: str, given: dict[str, Any], dtype: torch.dtype, sign: float, start: float) -> Adaptive | Fixed:
    """A native method with its options.

    Args:
        method: its name.
        given: the caller's options without the norm.
        dtype: the state's real dtype.
        sign: of the direction of time.
        start: the first time; times before it are dropped from step_t and jump_t.

    Raises:
        ValueError: options that exclude each other.
    """
    left = dict(given)
    chosen = _read_adaptive(method, left, dtype, sign, start) if method in ADAPTIVE else _read_fixed(method, left)
    if left:
        warnings.warn(f"{CLASSES[method]}: Unexpected arguments {left}", stacklevel=5)
    return chosen


def _read_adaptive(method: str, left: dict[str, Any], real: torch.dtype, sign: float, start: float) -> Adaptive:
    times = {name: _times(left.pop(name, None), sign, start) for name in ("step_t", "jump_t")}
    together = times["step_t"] + times["jump_t"]
    if len(set(together)) < len(together):
        raise ValueError("`step_t` and `jump_t` must not have any repeated elements between them.")
    first = left.pop("first_step", None)
    return Adaptive(
        method=ADAPTIVE[method],
        min_step=float(left.pop("min_step", 0.0)),
        max_step=float(left.pop("max_step", math.inf)),
        first_step=None if first is None else float(first),
        step_t=times["step_t"],
        jump_t=times["jump_t"],
        safety=float(left.pop("safety", 0.9)),
        ifactor=float(left.pop("ifactor", 10.0)),
        dfactor=float(left.pop("dfactor", 0.2)),
        max_num_steps=int(left.pop("max_num_steps", 2**31 - 1)),
        dtype=torch.promote_types(left.pop("dtype", torch.float64), real),
    )


def _times(times: Any, sign: float, start: float) -> tuple[float, ...]:
    listed = [] if times is None else torch.as_tensor(times, dtype=torch.float64).reshape(-1).tolist()
    return tuple(sorted((t for t in listed if (t - start) * sign >= 0), key=lambda t: t * sign))


def _read_fixed(method: str, left: dict[str, Any]) -> Fixed:
    step_size, grid_constructor = left.pop("step_size", None), left.pop("grid_constructor", None)
    if step_size is not None and grid_constructor is not None:
        raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
    interp, tableau = left.pop("interp", "linear"), FIXED[method]
    if interp not in ("linear", "cubic"):
        raise ValueError(f"Unknown interpolation method {interp}")
    if interp == "linear":
        tableau = dataclasses.replace(tableau, weights=(tableau.b,))
    return Fixed(tableau, step_size, grid_constructor, bool(left.pop("perturb", False)))


def rounding(dtype: torch.dtype) -> Callable[[float], float]:
    """What storing a time in `dtype` does to it."""
    if dtype == torch.float64:
        return float
    if dtype == torch.float32:
        return lambda x: ctypes.c_float(x).value
    return lambda x: torch.tensor(x, dtype=dtype).item()
