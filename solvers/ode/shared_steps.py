"""The driver that takes one step for the whole batch: times and steps are Python floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..solution import Status
from .problem import END, FORCED, FREE, Keeper, Problem, Run, Taken

# A step that would leave less than this fraction of itself before a time to land on is stretched to reach it.
_STRETCH = 1e-3
_EPSILON = 2.0**-52
# Of a step in which the field became NaN or infinite this fraction is tried next.
_RETREAT = 0.1


class SharedSteps:
    """State of one batch-wide solve."""

    def __init__(self, problem: Problem, keeper: Keeper | None) -> None:
        self.problem, self.keeper = problem, keeper
        self.rhs, self.method, self.control = problem.rhs, problem.method, problem.controller
        self.tolerance = problem.tolerance
        assert problem.times.listed is not None
        self.outputs = problem.times.listed
        self.start, self.end = self.outputs[0], self.outputs[-1]
        self.sign = math.copysign(1.0, self.end - self.start)
        self.adaptive = self.control.adaptive and self.method.error_order is not None
        self.stops = self._stops()
        self.mesh: list[Taken] = []
        self.slots: list[Tensor] = []

    def _stops(self) -> list[tuple[float, int, float | None]]:
        """(time to land on, FORCED or END, where to restart after a jump), in the direction of time."""
        stops: dict[float, tuple[int, float | None]] = {}
        for t in self.control.step_t:
            stops[t] = (FORCED, None)
        for t in self.control.jump_t:
            stops[self._beside(t, -self.sign)] = (FORCED, self._beside(t, self.sign))
        stops[self.end] = (END, None)
        inside = [t for t in stops if 0 < (t - self.start) * self.sign <= (self.end - self.start) * self.sign]
        return [(t, *stops[t]) for t in sorted(inside, key=lambda t: t * self.sign)]

    def _beside(self, t: float, direction: float) -> float:
        """The neighbour of `t` in the type in which the field sees it."""
        here = torch.tensor(t, dtype=self.rhs.spec.dtype)
        return float(torch.nextafter(here, torch.full_like(here, math.copysign(math.inf, direction))))

    def run(self) -> Run:
        """Integrate to the last output time."""
        problem, rhs, method, control, tolerance = self.problem, self.rhs, self.method, self.control, self.tolerance
        order = method.error_order or 1
        y, t = problem.y0, self.start
        batch = len(y)
        size = y.abs()
        handed, memory = (), None
        carry = method.init(rhs, t, y)
        h = self._first_step(t, y, carry)
        stop, output = 0, 1
        accepted = rejected = 0
        restart, grow, history = True, True, ()
        ratio = 0.0
        status = Status.MAX_STEPS
        while accepted + rejected < problem.max_steps:
            target, kind, jump = self.stops[stop]
            left = target - t
            lands = FREE
            step_h = h
            if abs(left) <= abs(h) * (1 + _STRETCH):
                step_h, lands = left, kind
            if not carry:
                carry = method.init(rhs, t, y)
            step = method.step(rhs, t, y, step_h, carry, memory)
            memory = step.memory
            new_size = step.y.abs()
            factor, history_if = 1.0, history
            if self.adaptive:
                assert step.error is not None
                ratio = tolerance.batch_ratio(step.error, torch.maximum(size, new_size))
                if not math.isfinite(ratio):
                    factor = _RETREAT
                else:
                    factor, history_if = control.factor(ratio, history, order)
                if not ratio <= 1.0 and abs(step_h) > control.min_step:
                    rejected += 1
                    grow = False
                    h = self._clip(step_h * factor)
                    if abs(h) < 16 * _EPSILON * max(abs(t), abs(t + h)):
                        status = Status.STEP_UNDERFLOW if math.isfinite(ratio) else Status.NON_FINITE
                        break
                    continue
            # The step is accepted.
            new_t = target if lands else t + step_h
            slot = -1
            last_output = output
            while last_output < len(self.outputs) - 1 and (self.outputs[last_output] - new_t) * self.sign <= 0:
                last_output += 1
            if last_output > output or problem.dense:
                slot = len(self.slots)
                self.slots.append(method.dense(rhs, t, y, step_h, step))
            if self.keeper is not None:
                self.keeper.offer(accepted, y, handed)
            self.mesh.append(Taken(t, step_h, lands, restart, slot, None))
            accepted += 1
            output = last_output
            t, y, size, history, restart = new_t, step.y, new_size, history_if, False
            carry = handed = step.carry
            if lands:
                # The step was cut short: the controller's next one starts from the longer step it had wished for.
                h = self._clip(max(abs(h), abs(step_h) * factor) * self.sign if self.adaptive else h)
                stop += 1
                if stop == len(self.stops):
                    status = Status.CONVERGED
                    break
                if jump is not None:
                    t, carry, handed, restart = jump, (), (), True
            elif self.adaptive:
                h = self._clip(step_h * (factor if grow else min(factor, 1.0)))
            grow = True
        full = torch.full((batch,), 0, device=y.device)
        return Run(
            y=y,
            mesh=self.mesh,
            dense=torch.stack(self.slots) if self.slots else None,
            reached=torch.full((batch,), t, dtype=torch.float64, device=y.device),
            status=full + int(status),
            accepted=full + accepted,
            rejected=full + rejected,
            evaluations=full + rhs.calls,
            ratio=torch.full((batch,), ratio, dtype=rhs.spec.dtype, device=y.device),
        )

    def _clip(self, h: float) -> float:
        return math.copysign(min(max(abs(h), self.control.min_step), self.control.max_step), self.sign)

    def _first_step(self, t: float, y: Tensor, carry: tuple[Tensor, ...]) -> float:
        given = self.control.first_step
        if given is None:
            given = first_step(self.problem, t, y, carry, self.end - self.start)
        return self._clip(given)


def first_step(problem: Problem, t: float, y: Tensor, carry: tuple[Tensor, ...], span: float) -> float:
    """A first step for which an explicit Euler step would be about as accurate as the tolerance.

    Source: Hairer, Norsett, Wanner 1993, section II.4.
    """
    rhs, tolerance, order = problem.rhs, problem.tolerance, problem.method.error_order or 1
    slope, size = problem.method.derivative(rhs, t, y, carry), y.abs()
    d0, d1 = tolerance.batch_ratio(y, size), tolerance.batch_ratio(slope, size)
    guess = 1e-6 if min(d0, d1) < 1e-5 or not math.isfinite(d0 + d1) else 0.01 * d0 / d1
    guess = min(guess, abs(span))
    h = math.copysign(guess, span)
    change = rhs(t + h, y + h * slope) - slope
    d2 = tolerance.batch_ratio(change, size) / guess
    largest = max(d1, d2)
    if not math.isfinite(largest):
        return guess
    second = max(1e-6, guess * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / order)
    return min(100 * guess, second, abs(span))
