"""Events: where a condition on the solution changes sign, located on the dense output and differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true, inside_transform, recording_tangents
from ..tree import StateError
from .interpolation import polynomial
from .method import Rhs

T = TypeVar("T")

# The bracket of an event's place within its step, as a fraction of the step, is closed to this width.
_WIDTH = 1e-14
_ITERATIONS = 100
# A condition is zero at the last time if so many roundings of what it is computed from would make it so.
_ROUNDINGS = 100


@options
class Event:
    """Something that happens where a condition changes its sign.

    An event is noticed where the signs at the two ends of an accepted step differ; pairs of changes within one step
    cancel, against which a `max_step` of the controller helps. A condition that is zero at the start does not count
    until it has left zero. One that comes to zero at the last time does count, also where rounding keeps it from being
    computed as zero: if the last step takes it down to what a hundred roundings of t and of the state make of it. The
    error of the solve is larger than that, so whether an event happens at the last time is known where the solution
    is exact but for rounding, as it is for a condition on time alone, and elsewhere by chance: end the solve later.

    Attributes:
        condition: a function of (t, y, *args) with one real number per sample (batch,); t is (batch,).
        terminal: the event ends its sample, whose value stays what it is there.
        direction: 1 for changes from negative to positive as the solve runs, -1 for the others, 0 for both.
    """

    condition: Callable[..., Tensor]
    terminal: bool = True
    direction: int = 0

    def __post_init__(self) -> None:
        """Check the knobs.

        Raises:
            TypeError: the condition cannot be called.
            ValueError: another direction than -1, 0 and 1.
        """
        if not callable(self.condition):
            raise TypeError(f"Event: condition must be a function of (t, y, *args); got {self.condition!r}.")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"Event: direction must be -1, 0 or 1; got {self.direction!r}.")


@dataclasses.dataclass
class EventInfo(Generic[T]):
    """Which events happened where; times and states carry derivatives by the implicit function theorem.

    Attributes:
        index: (batch,) which event ended the sample; -1 for none.
        t: (batch,) when, float64; NaN for none.
        value: the state there, of the initial value's structure (batch, ...); NaN for none.
        times: for each event all its occurrences (occurrences, batch), float64, in order; NaN behind a sample's last.
        values: for each event the states there (occurrences, batch, ...) per tensor.
    """

    index: Tensor
    t: Tensor
    value: T
    times: list[Tensor]
    values: list[T]


@dataclasses.dataclass(frozen=True)
class Hit:
    """Occurrences of one event within one accepted step.

    Attributes:
        event: which one.
        pick: the index of the step's dense output among the mesh's picks.
        samples: (batch,) for which samples.
        theta: (batch,) where in the step, float64.
    """

    event: int
    pick: int
    samples: Tensor
    theta: Tensor


class EventTracker:
    """Watches the conditions along a solve.

    Attributes:
        hits: what happened so far.
    """

    def __init__(self, events: Sequence[Event], rhs: Rhs) -> None:
        self.events, self.rhs = events, rhs
        self.hits: list[Hit] = []
        self._values: list[Tensor] = []

    def start(self, t: Tensor, y: Tensor) -> None:
        """Note the conditions at the start."""
        self._values = [self._condition(event, t, y) for event in self.events]

    def crossings(self, t: Tensor, y: Tensor, moved: Tensor, final: Tensor | None) -> list[tuple[int, Tensor]]:
        """Which events (index, samples (batch,)) the samples that `moved` met on their way to `y` at `t` (batch,).

        `final` are those for which this is the last time, None if it is for none.
        """
        found: list[tuple[int, Tensor]] = []
        for i, event in enumerate(self.events):
            value, now = self._values[i], self._condition(event, t, y)
            before, after = value.sign(), now.sign()
            if final is not None:
                after = torch.where(final & self._vanishes(event, t, y, value, now), 0.0, after)
            crossed = moved & (before != 0) & (after != before)
            if event.direction:
                crossed = crossed & (before == -event.direction)
            self._values[i] = torch.where(moved, now, value)
            found.append((i, crossed))
        if not any_true(torch.stack([crossed for _, crossed in found])):
            return []
        return [(i, crossed) for i, crossed in found if any_true(crossed)]

    def locate(
        self, crossings: list[tuple[int, Tensor]], pick: int, dense: Tensor, t: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Note where in the step the events happened.

        Args:
            crossings: what `crossings` returned.
            pick: under which index the step's dense output is kept.
            dense: its coefficients (p + 1, batch, n).
            t, h: the step (batch,), float64.

        Returns:
            Which samples ended (batch,), and where in the step (batch,), 1 for those that did not.
        """
        places = [(i, crossed, self._root(self.events[i], dense, t, h)) for i, crossed in crossings]
        last = torch.ones_like(t)
        ended = torch.zeros_like(t, dtype=torch.bool)
        for i, crossed, theta in places:
            if self.events[i].terminal:
                last = torch.where(crossed, torch.minimum(last, theta), last)
                ended = ended | crossed
        for i, crossed, theta in places:
            counts = crossed & (theta <= last)
            if any_true(counts):
                self.hits.append(Hit(i, pick, counts, theta))
        return ended, last

    def _vanishes(self, event: Event, t: Tensor, y: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """For which samples (batch,) the condition came down to `now`, which is zero but for rounding."""
        eps = torch.finfo(self.rhs.spec.dtype).eps
        fell = now.abs() <= before.abs() * eps**0.5
        if not any_true(fell & (now != 0)):
            return fell & (now == 0)
        by_t, by_y = _slopes(event, self.rhs, t, y)
        size = (by_t * t).abs() + (by_y * y).abs().sum(-1)
        return fell & (now.abs() <= _ROUNDINGS * eps * size)

    def _condition(self, event: Event, t: Tensor, y: Tensor) -> Tensor:
        return evaluate(event, self.rhs, t, y)

    def _root(self, event: Event, dense: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Where the condition vanishes within the step, by the Illinois variant of false position."""

        def value(theta: Tensor) -> Tensor:
            y = polynomial(dense.unsqueeze(0), theta.unsqueeze(0))[0]
            return self._condition(event, t + theta * h, y).double()

        low, high = torch.zeros_like(t), torch.ones_like(t)
        at_low, at_high = value(low), value(high)
        for _ in range(_ITERATIONS):
            span = at_high - at_low
            middle = torch.where(span == 0, 0.5 * (low + high), (low * at_high - high * at_low) / span)
            middle = torch.where((middle > low) & (middle < high), middle, 0.5 * (low + high))
            at = value(middle)
            left, found = at.sign() == at_low.sign(), at == 0
            # The end that stays counts for half the next time.
            at_low, at_high = torch.where(left, at, 0.5 * at_low), torch.where(left, 0.5 * at_high, at)
            # Where it is found both ends meet, and it stays while others are looked for.
            low, high = torch.where(left | found, middle, low), torch.where(left & ~found, high, middle)
            if not any_true((high - low > _WIDTH) & (at.abs() > 0)):
                break
        return torch.where(at.abs() == 0, middle, high)


def evaluate(event: Event, rhs: Rhs, t: Tensor, y: Tensor) -> Tensor:
    """The condition (batch,) at matrix `y` and times `t` (batch,).

    Raises:
        StateError: it is not one real number per sample.
    """
    value = event.condition(rhs.time(t), rhs.spec.unflatten(y), *rhs.args)
    if not isinstance(value, Tensor) or value.shape != (rhs.batch,) or not value.dtype.is_floating_point:
        found = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise StateError(f"an event's condition: expected one real number per sample, ({rhs.batch},), got {found}.")
    return value


def attach(event: Event, rhs: Rhs, dense: Tensor, theta: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Time (batch,) and matrix (batch, n) of an event, with derivatives.

    `theta` is a constant. Two chord steps of Newton's method, whose slope is a constant too, do not change it, but
    give it its first and second derivatives by the implicit function theorem.

    Args:
        dense: the coefficients (p + 1, batch, n) of the step.
        theta: where in the step (batch,).
        t, h: the step (batch,), float64.
    """

    def state(place: Tensor) -> Tensor:
        return polynomial(dense.unsqueeze(0), place.unsqueeze(0))[0]

    if torch.is_grad_enabled() or inside_transform() or recording_tangents():
        slope = _slope(event, rhs, dense.detach(), theta.detach(), t.detach(), h.detach())
        for _ in range(2):
            theta = theta - evaluate(event, rhs, t + theta * h, state(theta)) / slope
    return t + theta * h, state(theta)


def _slopes(event: Event, rhs: Rhs, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The condition's derivatives (batch,) and (batch, n) with respect to time and state, constants."""

    def total(t: Tensor, y: Tensor) -> Tensor:
        return evaluate(event, rhs, t, y).sum()

    if inside_transform():
        by_t, by_y = torch.func.grad(total, (0, 1))(t.detach(), y.detach())
        return by_t.detach(), by_y.detach()
    with torch.inference_mode(False), torch.enable_grad():
        # Copies can be differentiated also where the solve runs in inference mode.
        leaves = t.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
        value = total(*leaves)
        if not value.requires_grad:
            return torch.zeros_like(t), torch.zeros_like(y)
        by_t, by_y = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return by_t, by_y


def _slope(event: Event, rhs: Rhs, dense: Tensor, theta: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """The condition's derivative (batch,) with respect to theta, a constant."""

    def total(place: Tensor) -> Tensor:
        y = polynomial(dense.unsqueeze(0), place.unsqueeze(0))[0]
        return evaluate(event, rhs, t + place * h, y).sum()

    if inside_transform():
        return torch.func.grad(total)(theta).detach()
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(total(leaf), leaf)
    return slope


def assemble(
    events: Sequence[Event],
    rhs: Rhs,
    hits: list[Hit],
    dense: Tensor | None,
    steps: Callable[[int], tuple[Tensor, Tensor]],
) -> tuple[EventInfo[Any], Tensor]:
    """All events of a solve, and the matrix (batch, n) at those that ended samples, NaN for the others.

    Args:
        events: that were watched.
        rhs: their problem's.
        hits: what the tracker noted.
        dense: the dense outputs (picks, p + 1, batch, n).
        steps: start and length (batch,) of the step of a pick.
    """
    batch, spec = rhs.batch, rhs.spec
    nothing = torch.full((batch,), torch.nan, dtype=torch.float64, device=spec.device)
    no_state = torch.full((batch, spec.size), torch.nan, dtype=spec.dtype, device=spec.device)
    index, t_end, y_end = torch.full_like(nothing, -1, dtype=torch.long), nothing, no_state
    times: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in events]
    for hit in hits:
        assert dense is not None
        # The others stand in for nothing: copies of a sample to which it happened, so that no NaN can arise in them.
        rows = torch.arange(batch, device=spec.device)
        rows = torch.where(hit.samples, rows, hit.samples.int().argmax())
        t, h = (x[rows] for x in steps(hit.pick))
        t, y = attach(events[hit.event], rhs, dense[hit.pick].index_select(1, rows), hit.theta[rows], t, h)
        times[hit.event].append((hit.samples, t, y))
        if events[hit.event].terminal:
            index = torch.where(hit.samples, hit.event, index)
            t_end = torch.where(hit.samples, t, t_end)
            y_end = torch.where(hit.samples.unsqueeze(-1), y, y_end)
    lists = [_pack(occurrences, nothing, no_state) for occurrences in times]
    values = [spec.unflatten(y) for _, y in lists]
    return EventInfo(index, t_end, spec.unflatten(y_end), [t for t, _ in lists], values), y_end


def _pack(occurrences: list[tuple[Tensor, Tensor, Tensor]], no_time: Tensor, no_state: Tensor) -> tuple[Tensor, Tensor]:
    """(occurrences, batch) times and (occurrences, batch, n) states, each sample's first in the first row."""
    if not occurrences:
        return no_time.new_zeros((0, *no_time.shape)), no_state.new_zeros((0, *no_state.shape))
    samples = torch.stack([s for s, _, _ in occurrences])
    t, y = torch.stack([t for _, t, _ in occurrences]), torch.stack([y for _, _, y in occurrences])
    order = (~samples).long().argsort(dim=0, stable=True)[: int(samples.sum(0).max())]
    there = samples.gather(0, order)
    t = torch.where(there, t.gather(0, order), no_time)
    y = y.gather(0, order.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
    return t, torch.where(there.unsqueeze(-1), y, no_state)
