"""One attempt at a step, with the control of its length, in operations on tensors alone.

It does what a pass through the loop of `SharedSteps` does, for a batch none of whose samples breaks. Accepted steps are
written to a chunk of memory, as long as it lasts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..control import Controller
from ..method import Carry, Method, Rhs, Step
from ..shared_steps import RETREAT, STRETCH, UNDERFLOW

RUNNING, ARRIVED, TROUBLE = 0, 1, 2


class FunctionalRhs(Rhs):
    """The right-hand side for methods that must not write in place."""

    __slots__ = ()

    @property
    def functional(self) -> bool:
        """Always."""
        return True


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the loops of one compiled solve do.

    Attributes:
        method: the integrator.
        controller: of its steps.
        columns: those that are controlled; None for all.
        capacity: accepted steps in a chunk of memory.
        slots: dense outputs in a chunk of memory; 0 where none is wanted.
        every: whether all dense outputs are wanted, and not those around output times alone.
        carries: tensors that a step hands to the next one.
        memories: numbers that the controller does.
    """

    method: Method
    controller: Controller
    columns: Tensor | None
    capacity: int
    slots: int
    every: bool
    carries: int
    memories: int

    @property
    def order(self) -> int:
        """Of the error estimate."""
        return self.method.error_order or 1

    def step(self, rhs: Rhs, t: Tensor, y: Tensor, h: Tensor, carry: Carry) -> tuple[Step, Tensor | None]:
        """A step and its dense output, if wanted."""
        step = self.method.step(rhs, t, y, h, carry or self.method.init(rhs, t, y))
        return step, self.method.dense(rhs, t, y, h, step) if self.slots else None


class Position(NamedTuple):
    """Where a solve is; tensors of shape () but for the state and what is handed over with it.

    Attributes:
        t: the time, float64.
        h: the length of the next step, float64.
        ratio: the last accepted error in units of the tolerance, float64.
        steady: whether the last attempt was accepted.
        accepted: steps in this chunk.
        rejected: attempts in this chunk.
        filled: dense outputs in this chunk.
        phase: RUNNING, ARRIVED or TROUBLE.
        y: the state (batch, n).
        carry: what the method hands from step to step.
        history: what the controller does, float64.
    """

    t: Tensor
    h: Tensor
    ratio: Tensor
    steady: Tensor
    accepted: Tensor
    rejected: Tensor
    filled: Tensor
    phase: Tensor
    y: Tensor
    carry: tuple[Tensor, ...]
    history: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        """All tensors."""
        return [*self[:9], *self.carry, *self.history]

    @staticmethod
    def of(tensors: Sequence[Tensor], plan: Plan) -> Position:
        """The inverse of `flat`."""
        parts, rest = tensors[:9], tensors[9 : 9 + plan.carries + plan.memories]
        return Position._make((*parts, tuple(rest[: plan.carries]), tuple(rest[plan.carries :])))


class Setting(NamedTuple):
    """What stays the same in a chunk; tensors of shape () but for the output times.

    Attributes:
        end: the last time, float64.
        span: the last time minus the first one, float64.
        rtol, atol: tolerances, float64.
        budget: attempts that are left.
        inner: output times in between (T - 2,), and infinities at the end of them.
    """

    end: Tensor
    span: Tensor
    rtol: Tensor
    atol: Tensor
    budget: Tensor
    inner: Tensor


class Chunk(NamedTuple):
    """Memory for the accepted steps, with one more row for what is not to be kept.

    Attributes:
        t: where they start (capacity + 1,), float64.
        h: how long they are, likewise.
        slot: which dense output is theirs, likewise, int64; -1 for none.
        y: the states they start from (capacity + 1, batch, n).
        carry: what they are handed, each (capacity + 1, ...).
        dense: dense outputs (slots + 1, p + 1, batch, n); empty where none are wanted.
    """

    t: Tensor
    h: Tensor
    slot: Tensor
    y: Tensor
    carry: tuple[Tensor, ...]
    dense: Tensor

    def flat(self) -> list[Tensor]:
        """All tensors."""
        return [*self[:4], *self.carry, self.dense]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Chunk:
        """The inverse of `flat`."""
        return Chunk._make((*tensors[:4], tuple(tensors[4:-1]), tensors[-1]))


def goes_on(plan: Plan, here: Position, setting: Setting) -> Tensor:
    """Whether another attempt is to be made within this chunk."""
    tries = here.accepted + here.rejected
    return (here.phase == RUNNING) & (here.accepted < plan.capacity) & (tries < setting.budget)


def attempt(plan: Plan, rhs: Rhs, here: Position, setting: Setting, chunk: Chunk) -> Position:
    """The position after one attempt; none is made, and the position stays, where `goes_on` does not hold."""
    control = plan.controller
    active = goes_on(plan, here, setting)
    sign = setting.span.sign()
    left = setting.end - here.t
    lands = left.abs() <= here.h.abs() * (1 + STRETCH)
    h = torch.where(lands, left, here.h)
    step, dense = plan.step(rhs, here.t, here.y, h, here.carry)
    history, ratio = here.history, here.ratio
    if control.adaptive:
        ratio = _ratio(plan, step, here.y, setting)
        finite = ratio.isfinite()
        good = (ratio <= 1) | ((h.abs() <= control.min_step) & finite)
        change, following = control.factor(ratio, history, plan.order)
        factor = torch.as_tensor(change)
        factor = torch.where(here.steady & good, factor, factor.clamp(max=1.0))
        grown = h * factor
        wish = torch.where(lands & good, torch.maximum(here.h.abs(), grown.abs()), grown.abs())
        wish = wish.clamp(control.min_step, control.max_step) * sign
        wish = torch.where(finite, wish, h * RETREAT)
        # What is ended for want of a step that time resolves is left to the other driver.
        t = torch.where(good, torch.where(lands, setting.end, here.t + h), here.t)
        size = torch.maximum(torch.maximum(t.abs(), (t + wish).abs()), 1e-6 * setting.span.abs())
        trouble = (wish.abs() < UNDERFLOW * size) & ~(good & lands)
    else:
        good = step.y.sum().isfinite()
        following, wish, trouble = (), here.h, ~good
    keeps = good & active
    then = torch.where(lands, setting.end, here.t + h)
    wanted = _wanted(plan, here.t, then, setting, sign)
    _write(chunk, here, h, dense, wanted)
    phase = torch.where(trouble, TROUBLE, torch.where(good & lands, ARRIVED, RUNNING))
    return Position(
        t=torch.where(keeps, then, here.t),
        h=torch.where(active, wish, here.h),
        ratio=torch.where(keeps, ratio, here.ratio),
        steady=torch.where(active, good, here.steady),
        accepted=here.accepted + keeps,
        rejected=here.rejected + (active & ~good),
        filled=here.filled + (keeps & wanted),
        phase=torch.where(active, phase, here.phase),
        y=torch.where(keeps, step.y, here.y),
        carry=tuple(torch.where(keeps, new, old) for new, old in zip(step.carry, here.carry)),
        history=tuple(
            torch.where(keeps, torch.as_tensor(new, dtype=old.dtype), old) for new, old in zip(following, history)
        ),
    )


def _ratio(plan: Plan, step: Step, y: Tensor, setting: Setting) -> Tensor:
    """The error in units of the tolerance, root mean square, float64."""
    assert step.error is not None
    scaled = step.error / (torch.maximum(y.abs(), step.y.abs()) * setting.rtol + setting.atol)
    if plan.columns is not None:
        scaled = scaled.index_select(-1, plan.columns)
    return torch.linalg.vector_norm(scaled).double() / math.sqrt(max(scaled.numel(), 1))


def _wanted(plan: Plan, t: Tensor, then: Tensor, setting: Setting, sign: Tensor) -> Tensor:
    """Whether the dense output between two times is asked for."""
    if plan.every or not plan.slots:
        return torch.full((), plan.every, dtype=torch.bool, device=t.device)
    times = setting.inner * sign
    return ((times > t * sign) & (times <= then * sign)).any()


def _write(chunk: Chunk, here: Position, h: Tensor, dense: Tensor | None, wanted: Tensor) -> None:
    """Write an attempt to where the next accepted step belongs; a rejected one is overwritten by the next."""
    row = here.accepted.unsqueeze(0)
    slot = torch.where(wanted, here.filled, -1)
    rows = zip((chunk.t, chunk.h, chunk.slot, chunk.y, *chunk.carry), (here.t, h, slot, here.y, *here.carry))
    for memory, value in rows:
        memory.index_copy_(0, row, value.unsqueeze(0))
    if dense is not None:
        chunk.dense.index_copy_(0, here.filled.unsqueeze(0), dense.unsqueeze(0))


def flat_attempt(plan: Plan, rhs: Rhs) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The condition and the body of the loop as functions of flat tensors: position, setting, chunk and any others."""
    width, fixed = 9 + plan.carries + plan.memories, len(Setting._fields)
    end = width + fixed + 5 + plan.carries

    def condition(*tensors: Tensor) -> Tensor:
        return goes_on(plan, Position.of(tensors, plan), Setting(*tensors[width : width + fixed]))

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        setting = Setting(*tensors[width : width + fixed])
        return tuple(
            attempt(plan, rhs, Position.of(tensors, plan), setting, Chunk.of(tensors[width + fixed : end])).flat()
        )

    return condition, body
