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
from ..shared_steps import CALM, RETREAT, STABLE, STRAINED, STRETCH, UNDERFLOW

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
        capacity: accepted steps in a chunk of memory, a multiple of `CALM`, so that every chunk counts alike.
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
        accepted: steps in this chunk, int64 as all that follow.
        rejected: attempts in this chunk.
        filled: dense outputs in this chunk.
        phase: RUNNING, ARRIVED or TROUBLE.
        steady: whether the last attempt was accepted.
        strained: whether the next attempt is to be looked at for stability in any case.
        budget: attempts that may be made in this chunk.
        y: the state (batch, n).
        carry: what the method hands from step to step.
        history: what the controller does, float64.
    """

    t: Tensor
    h: Tensor
    ratio: Tensor
    accepted: Tensor
    rejected: Tensor
    filled: Tensor
    phase: Tensor
    steady: Tensor
    strained: Tensor
    budget: Tensor
    y: Tensor
    carry: tuple[Tensor, ...]
    history: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        """In few tensors, each of which costs time in every attempt: numbers, counts, state and carry."""
        states = [part.contiguous() for part in (self.y, *self.carry)]
        return [torch.stack([*self[:3], *self.history]), torch.stack(self[3:10]), *states]

    @staticmethod
    def of(tensors: Sequence[Tensor], plan: Plan) -> Position:
        """The inverse of `flat`."""
        t, h, ratio, *history = tensors[0].unbind()
        carry = tuple(tensors[3 : 3 + plan.carries])
        return Position._make((t, h, ratio, *tensors[1].unbind(), tensors[2], carry, tuple(history)))


class Setting(NamedTuple):
    """What stays the same; tensors of shape () in float64 but for the output times.

    Attributes:
        end: the last time.
        span: the last time minus the first one.
        rtol, atol: tolerances.
        inner: output times in between (T - 2,), and infinities at the end of them.
    """

    end: Tensor
    span: Tensor
    rtol: Tensor
    atol: Tensor
    inner: Tensor

    @staticmethod
    def of(numbers: Tensor) -> Setting:
        """From a vector of all of them."""
        return Setting._make((*numbers[:4].unbind(), numbers[4:]))


class Chunk(NamedTuple):
    """Memory for the accepted steps, with one more row for what is not to be kept.

    Attributes:
        log: where they start, how long they are, and which dense output is theirs, -1 for none; (capacity + 1, 3) in
            float64.
        y: the states they start from (capacity + 1, batch, n).
        carry: what they are handed, each (capacity + 1, ...).
        dense: dense outputs (slots + 1, p + 1, batch, n), or nothing where none are wanted.
    """

    log: Tensor
    y: Tensor
    carry: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        """All tensors."""
        return [self.log, self.y, *self.carry, *self.dense]

    @staticmethod
    def of(tensors: Sequence[Tensor], plan: Plan) -> Chunk:
        """The inverse of `flat`."""
        last = 2 + plan.carries
        return Chunk(tensors[0], tensors[1], tuple(tensors[2:last]), tuple(tensors[last : last + (plan.slots > 0)]))


def goes_on(plan: Plan, here: Position) -> Tensor:
    """Whether another attempt is to be made within this chunk."""
    tries = here.accepted + here.rejected
    return (here.phase == RUNNING) & (here.accepted < plan.capacity) & (tries < here.budget)


def attempt(plan: Plan, rhs: Rhs, here: Position, setting: Setting, chunk: Chunk) -> Position:
    """The position after one attempt; none is made, and the position stays, where `goes_on` does not hold."""
    control = plan.controller
    active, steady = goes_on(plan, here), here.steady > 0
    sign = setting.span.sign()
    left = setting.end - here.t
    lands = left.abs() <= here.h.abs() * (1 + STRETCH)
    h = torch.where(lands, left, here.h)
    step, dense = plan.step(rhs, here.t, here.y, h, here.carry)
    history, ratio, strained = here.history, here.ratio, here.strained
    if control.adaptive:
        strain, strained = _strain(plan, step, h, here)
        ratio = _ratio(plan, step, here.y, setting)
        finite = ratio.isfinite()
        good = (ratio <= 1) | ((h.abs() <= control.min_step) & finite)
        change, following = control.factor(ratio, history, plan.order)
        factor = torch.as_tensor(change)
        factor = torch.where(steady & good, factor, factor.clamp(max=1.0))
        grown = h * factor
        wish = torch.where(lands & good, torch.maximum(here.h.abs(), grown.abs()), grown.abs())
        if strain is not None:
            wish = torch.where(good & (strain > 0), torch.minimum(wish, h.abs() * STABLE / strain), wish)
        wish = wish.clamp(control.min_step, control.max_step) * sign
        wish = torch.where(finite, wish, h * RETREAT)
        # What is ended for want of a step that time resolves is left to the other driver.
        t = torch.where(good, torch.where(lands, setting.end, here.t + h), here.t)
        size = torch.maximum(torch.maximum(t.abs(), (t + wish).abs()), 1e-6 * setting.span.abs())
        trouble = (wish.abs() < UNDERFLOW * size) & ~(good & lands)
        trouble = trouble | (ratio.isnan() & (setting.rtol < torch.finfo(here.y.dtype).eps))
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
        accepted=here.accepted + keeps,
        rejected=here.rejected + (active & ~good),
        filled=here.filled + (keeps & wanted),
        phase=torch.where(active, phase, here.phase),
        steady=torch.where(active, good, steady).long(),
        strained=torch.where(active, strained, here.strained),
        budget=here.budget,
        y=torch.where(keeps, step.y, here.y),
        carry=tuple(torch.where(keeps, new, old) for new, old in zip(step.carry, here.carry)),
        history=tuple(
            torch.where(keeps, torch.as_tensor(new, dtype=old.dtype), old) for new, old in zip(following, history)
        ),
    )


def _strain(plan: Plan, step: Step, h: Tensor, here: Position) -> tuple[Tensor | None, Tensor]:
    """The step's length in units of the longest stable one, 0 where it is not looked at, and whether to look again."""
    strain = plan.method.strain(h, step)
    if strain is None:
        return None, here.strained
    looks = (here.strained > 0) | (here.accepted % CALM == 0)
    strain = torch.where(looks, strain.max().double(), 0.0)
    return strain, (strain > STRAINED).long()


def _ratio(plan: Plan, step: Step, y: Tensor, setting: Setting) -> Tensor:
    """The error in units of the tolerance, root mean square, float64."""
    assert step.error is not None
    size, eps = torch.maximum(y.abs(), step.y.abs()), torch.finfo(y.dtype).eps
    scale = size * setting.rtol + setting.atol
    # As `Tolerance` has it.
    scale = torch.where((scale < size * eps) & (setting.rtol < eps), math.nan, scale)
    scaled = step.error / scale
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
    entry = torch.stack([here.t, h, torch.where(wanted, here.filled, -1).double()])
    for memory, value in zip((chunk.log, chunk.y, *chunk.carry), (entry, here.y, *here.carry)):
        memory.index_copy_(0, row, value.unsqueeze(0))
    if dense is not None:
        chunk.dense[0].index_copy_(0, here.filled.unsqueeze(0), dense.unsqueeze(0))


def flat_attempt(plan: Plan, rhs: Rhs) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The condition and the body of the loop as functions of flat tensors: position, setting and chunk."""
    width = 3 + plan.carries

    def condition(*tensors: Tensor) -> Tensor:
        return goes_on(plan, Position.of(tensors, plan))

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        here, setting = Position.of(tensors, plan), Setting.of(tensors[width])
        return tuple(attempt(plan, rhs, here, setting, Chunk.of(tensors[width + 1 :], plan)).flat())

    return condition, body
