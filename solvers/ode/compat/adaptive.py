"""The driver whose steps are torchdiffeq's: the same first step, the same factors, the same reasons to fail."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...transforms import plain
from ..mesh import END, FORCED, FREE, Mesh, Taken
from ..method import Carry
from ..problem import Keeper, Problem, Run
from .layout import ErrorNorm
from .methods import Adaptive, rounding

# Of a step in which the field became NaN or infinite this fraction is tried next, if no smallest step is given.
_RETREAT = 0.1

# Called with the time, the matrix and the length of a step.
Hook = Callable[[float, Tensor, float], None]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the caller's function wants to be told."""

    step: Hook | None = None
    accept: Hook | None = None
    reject: Hook | None = None


class AdaptiveSteps:
    """One solve, to the last output time or to an event.

    The last step is shortened to end at the last output time, where torchdiffeq goes on to interpolate.
    """

    def __init__(
        self,
        problem: Problem,
        stepping: Adaptive,
        norm: ErrorNorm,
        hooks: Hooks,
        keeper: Keeper | None,
        event: Callable[[float, Tensor], float] | None,
    ) -> None:
        """`event` maps a time and a matrix to a number whose sign is watched."""
        assert problem.times.listed is not None
        self.problem, self.stepping, self.norm, self.hooks = problem, stepping, norm, hooks
        self.keeper, self.event = keeper or Keeper(1), event
        self.rhs, self.method = problem.rhs, stepping.method
        self.rounded = rounding(stepping.dtype)
        self.outputs = problem.times.listed
        self.sign = math.copysign(1.0, self.outputs[-1] - self.outputs[0])
        self.stops = self._stops()
        self.steps: list[Taken] = []
        self.picks: list[int] = []
        self.dense: list[Tensor] = []
        self.places: list[int] = []
        self.rejected = 0
        self.located: float | None = None

    def _stops(self) -> list[tuple[float, int, float | None]]:
        """(time to step to, why, where to go on after a jump), the nearest last."""
        start, end = self.outputs[0], math.inf * self.sign if self.event else self.outputs[-1]
        stops: dict[float, tuple[float, int, float | None]]
        stops = {t: (t, FORCED, None) for t in self.stepping.step_t}
        stops |= {t: (self._beside(t, -1), FORCED, self._beside(t, 1)) for t in self.stepping.jump_t}
        ahead = [stop for t, stop in stops.items() if (t - start) * self.sign > 0 and (t - end) * self.sign < 0]
        if self.event is None:
            ahead.append((end, END, None))
        return sorted(ahead, key=lambda stop: -stop[0] * self.sign)

    def _beside(self, t: float, side: int) -> float:
        """The neighbour of `t`, in the type in which the field sees it, before (-1) or after (1) it."""
        here = torch.tensor(t, dtype=self.rhs.spec.dtype)
        return float(torch.nextafter(here, torch.full_like(here, side * self.sign * math.inf)))

    def run(self) -> Run:
        """Integrate.

        Raises:
            AssertionError: the step became too short, or the budget of steps ran out, as in torchdiffeq.
        """
        problem, rhs, method, control, norm, hooks = (
            self.problem,
            self.rhs,
            self.method,
            self.stepping,
            self.norm,
            self.hooks,
        )
        y, t, sign = problem.y0, self.rounded(self.outputs[0]), self.sign
        keeper = self.keeper
        self._check_finite(y)
        keeper.renew()
        carry = method.init(rhs, t, y)
        handed: tuple[Tensor, Carry] = (y, ())
        size, memory = norm.size(y), None
        h = self._first_step(t, y, size, carry) if control.first_step is None else control.first_step
        before = self.event(t, y) if self.event else 1.0
        if before == 0:
            self.located = t
        restart, moves, count = True, True, 0
        while self.located is None and self.stops_ahead():
            if count >= control.max_num_steps:
                raise AssertionError(
                    f"max_num_steps exceeded ({count}>={control.max_num_steps}) at t = {t:.6g}, steps of {h:.3g}"
                )
            h = self.rounded(control.clipped(h if math.isfinite(h) else control.min_step))
            if hooks.step is not None:
                hooks.step(t, y, h)
            if self.rounded(t + sign * h) == t:
                raise AssertionError(self._underflow(t, y, h))
            step_h, new_t, lands, jump = sign * h, self.rounded(t + sign * h), FREE, None
            if self.stops and (new_t - self.stops[-1][0]) * sign >= 0:
                new_t, lands, jump = self.stops[-1]
                step_h = new_t - t
            if not carry:
                keeper.renew()
                carry = method.init(rhs, t, y)
            keeper.attempt()
            step = method.step(rhs, t, y, step_h, carry, memory)
            memory, new_size = step.memory, norm.size(step.y)
            assert step.error is not None
            ratio = norm.ratio(step.error, torch.maximum(size, new_size))
            # A step that only the last output time cut short is no shorter than allowed.
            length = h if lands == END else abs(step_h)
            count += 1
            if not ratio <= 1 and not length <= control.min_step:
                self.rejected += 1
                if hooks.reject is not None:
                    hooks.reject(t, y, abs(step_h))
                h = control.following(abs(step_h), ratio) if ratio > 1 else control.min_step or _RETREAT * abs(step_h)
                continue
            if hooks.accept is not None:
                hooks.accept(t, y, abs(step_h))
            if not ratio <= 1:
                self._check_finite(step.y)
            passed = self._passed(new_t)
            after = self.event(new_t, step.y) if self.event else before
            happened = (after > 0) - (after < 0) != (before > 0) - (before < 0)
            if passed or happened:
                self.picks.append(len(self.steps))
                self.dense.append(method.dense(rhs, t, y, step_h, step))
                count = 0
            if happened:
                self.located = self._locate(t, step_h, before)
            keeper.offer(len(self.steps), *handed, restart)
            self.steps.append(Taken(t, step_h, lands, moves, restart, passed or happened))
            t, y, size, carry, restart = new_t, step.y, new_size, step.carry, False
            handed = (y, carry)
            h = control.following(abs(step_h), ratio) if ratio >= 0 else control.min_step
            if lands:
                moves = False
                self.stops.pop()
                if jump is not None:
                    t, carry, restart = jump, (), True
        keeper.close(*handed)
        return found(problem, y, self.steps, self.picks, self.dense, self.places, self.rejected)

    def stops_ahead(self) -> bool:
        """Whether there is still a way to go."""
        return self.event is not None or bool(self.stops)

    def _first_step(self, t: float, y: Tensor, size: Tensor, carry: Carry) -> float:
        """Hairer, Norsett, Wanner 1993, section II.4."""
        rhs, norm, order = self.rhs, self.norm, self.method.error_order
        assert order is not None
        slope = self.method.derivative(rhs, t, y, carry)
        d0, d1 = norm.ratio(y, size), norm.ratio(slope, size)
        guess = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        if self.event is None:
            guess = min(guess, abs(self.outputs[-1] - t))
        if not math.isfinite(guess):
            return math.nan
        ahead = self.sign * guess
        change = rhs(t + ahead, y + ahead * slope) - slope
        largest = max(d1, norm.ratio(change, size) / guess)
        second = max(1e-6, guess * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / order)
        return min(100 * guess, second)

    def _passed(self, new_t: float) -> bool:
        """Whether there are output times, but the last, up to `new_t`; they are noted."""
        known = len(self.places)
        while (
            self.event is None
            and len(self.places) + 2 < len(self.outputs)
            and (new_t - self.outputs[len(self.places) + 1]) * self.sign >= 0
        ):
            self.places.append(len(self.picks))
        return len(self.places) > known

    def _locate(self, t: float, h: float, before: float) -> float:
        """Where in the last step the event's sign changes, by bisection to within atol."""
        assert self.event is not None
        return locate(self.dense[-1], t, h, before, self.event, self.norm.atol)

    def _check_finite(self, y: Tensor) -> None:
        if not math.isfinite(float(plain(y).sum())) and not bool(plain(y).isfinite().all()):
            raise AssertionError(f"non-finite values in state `y`: {self.norm.layout.unpack(y)}")

    def _underflow(self, t: float, y: Tensor, h: float) -> str:
        message = f"underflow in dt {h}: no step from t = {t:.9g} is short enough for the tolerance. "
        if bool(plain(self.rhs(t, y)).isfinite().all()):
            return message + "Loosen rtol or atol, compute in float64, or take an implicit solver if it is stiff."
        return message + "The field is NaN or infinite there."


def locate(
    dense: Tensor, t: float, h: float, before: float, event: Callable[[float, Tensor], float], tolerance: float | Tensor
) -> float:
    """The time within a step at which `event`, whose sign was that of `before`, changes it.

    Args:
        dense: coefficients (p + 1, rows, n) of the step's interpolant.
        t, h: where the step starts and its length.
        before: a number with the event's sign at the start.
        event: of time and matrix.
        tolerance: how exactly it is located, by bisection.
    """
    low, high, sign = 0.0, 1.0, (before > 0) - (before < 0)
    tolerance = float(tolerance.min()) if isinstance(tolerance, Tensor) else float(tolerance)
    halvings = 60 if tolerance <= 0 else min(math.ceil(math.log2(max(abs(h) / tolerance, 1.0))), 60)
    for _ in range(halvings):
        middle = (low + high) / 2
        value = event(t + middle * h, horner(dense, middle))
        if (value > 0) - (value < 0) == sign:
            low = middle
        else:
            high = middle
    return t + (low + high) / 2 * h


def horner(coefficients: Tensor, theta: float | Tensor) -> Tensor:
    """sum_p theta^p coefficients_p."""
    value = coefficients[-1]
    for coefficient in coefficients.flip(0).unbind()[1:]:
        value = coefficient + theta * value
    return value


def found(
    problem: Problem,
    y: Tensor,
    steps: list[Taken],
    picks: list[int],
    dense: list[Tensor],
    places: list[int],
    rejected: int,
) -> Run:
    """A driver's findings."""
    one = torch.zeros(1, dtype=torch.long, device=y.device)
    real = torch.zeros(1, dtype=torch.float64, device=y.device)
    return Run(
        y=y,
        mesh=Mesh(steps, picks),
        dense=torch.stack(dense) if dense else None,
        places=torch.tensor(places, dtype=torch.long, device=y.device),
        reached=real,
        status=one,
        accepted=one + len(steps),
        rejected=one + rejected,
        evaluations=one + problem.rhs.calls,
        ratio=real,
        step=real,
        wish=real,
        component=one,
        hits=[],
    )
