"""The driver in which every sample takes its own steps: times and steps are tensors (batch,)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch._C import _functorch

from ..solution import Status
from ..transforms import all_true, any_true, plain
from .control import History
from .events import EventTracker
from .first_step import first_steps
from .lined_up import LinedUp, Tried
from .mesh import END, FORCED, FREE, Mesh, take
from .method import Carry, Step, renewed
from .problem import Keeper, Problem, Run
from .shared_steps import GIVE_WAY, RETREAT, STABLE, STRETCH, UNDERFLOW
from .stand_in import own_args, standing_in

# So many iterations are looked through together for output times that lie inside their steps.
_CHUNK = 16


class SampleSteps:
    """One solve with a step for every sample.

    An iteration tries a step of every sample that has not ended; the others take steps of length zero. Afterwards the
    accepted steps are lined up, each sample's n-th in the mesh's n-th, so that a replay rejects nothing.
    """

    def __init__(self, problem: Problem, keeper: Keeper | None) -> None:
        self.problem, self.keeper = problem, keeper
        self.rhs, self.method, self.control = problem.rhs, problem.method, problem.controller
        self.tolerance = problem.tolerance
        batch = len(problem.y0)
        self.outputs = problem.times.values.expand(batch, -1)
        self.start, self.end = self.outputs[:, 0], self.outputs[:, -1]
        self.sign = (self.end - self.start).sign()
        self.stops, self.kinds, self.jumps = self._stops()
        self.tried: list[Tried] = []
        self.waiting: list[Tensor] = []
        self.dense: Tensor | None = None
        self.kept_dense: list[Tensor] = []
        self.tracker = EventTracker(problem.events, problem.rhs) if problem.events else None
        self.event_dense: list[Tensor] = []
        self.event_iterations: list[int] = []
        self.reached = torch.full_like(self.start, torch.nan)
        # The iteration that each output lies in, (T - 2, batch), -1 while it is not reached.
        self.steps_of_output = torch.full_like(self.outputs[:, 1:-1].T, -1, dtype=torch.long)
        self.status = torch.full_like(self.start, int(Status.MAX_STEPS), dtype=torch.long)
        self.component = torch.zeros_like(self.status)
        # The errors of every iteration, and the evaluations before the first one and up to the end of each.
        self.ratios: list[Tensor] = []
        self.calls: list[int] = []

    def _stops(self) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, stops): times to land on in each sample's order, how, and where to restart (NaN: no jump)."""
        dtype, device = self.rhs.spec.dtype, self.start.device
        ends, nan = self.end.unsqueeze(1), math.nan
        step_t = torch.tensor(self.control.step_t, dtype=torch.float64, device=device)
        jump_t = torch.tensor(self.control.jump_t, dtype=dtype, device=device)
        ahead = self.sign.unsqueeze(1).to(dtype) * math.inf
        before = torch.nextafter(jump_t, -ahead).double()
        after = torch.nextafter(jump_t, ahead).double()
        batch = len(ends)
        stops = torch.cat([step_t.expand(batch, -1), before, ends], dim=1)
        jumps = torch.cat([torch.full_like(step_t, nan).expand(batch, -1), after, torch.full_like(ends, nan)], dim=1)
        kinds = torch.full_like(stops, FORCED, dtype=torch.long)
        kinds[:, -1] = END
        sign, start = self.sign.unsqueeze(1), self.start.unsqueeze(1)
        outside = ((stops - start) * sign <= 0) | ((stops - ends) * sign > 0)
        order = torch.where(outside, math.inf, stops * sign).argsort(dim=1, stable=True)
        return stops.gather(1, order), kinds.gather(1, order), jumps.gather(1, order)

    def run(self) -> Run:
        """Integrate every sample to its last output time, or to where it breaks."""
        problem, rhs, method, control, tolerance = self.problem, self.rhs, self.method, self.control, self.tolerance
        order, adaptive, observe = method.error_order or 1, problem.adaptive, problem.observe
        interpolate = problem.dense or len(self.steps_of_output) > 0
        t, y, carry, active = self._begin()
        scale = tolerance.scale(y)
        handed: Carry = ()
        h, memory = self._first_steps(t, y, carry), None
        moves = steady = fresh = torch.ones_like(active)
        stop, breaks = torch.zeros_like(self.status), True
        # Whether samples have ended that are not where they land next, and whether there is more than one such time.
        halted, several = not all_true(active), self.stops.shape[1] > 1
        bounded = control.min_step > 0 or control.max_step < math.inf
        coarsest = self._resolution(torch.maximum(self.start.abs(), self.end.abs()), torch.zeros_like(h))
        self.calls.append(rhs.calls)
        if self.tracker is not None:
            self.tracker.start(t, y)
        history: History = ()
        target, kind, jump = self.stops[:, 0], self.kinds[:, 0], self.jumps[:, 0]
        for iteration in range(problem.max_steps if any_true(active) else 0):
            left = target - t
            lands = left.abs() <= h.abs() * (1 + STRETCH)
            step_h = torch.where(lands, left, h)
            if halted:
                step_h = torch.where(active, step_h, 0.0)
            if not carry:
                carry = method.init(rhs, t, y)
            step = method.step(rhs, t, y, step_h, carry, memory)
            memory, new_scale = step.memory, tolerance.scale(step.y)
            if adaptive:
                assert step.error is not None
                ratio = tolerance.sample_ratio(step.error, torch.maximum(scale, new_scale))
                accepted = ratio <= 1
                if control.min_step > 0:
                    accepted = accepted | ((step_h.abs() <= control.min_step) & (ratio < math.inf))
                if step.failed is not None:
                    accepted = accepted & ~step.failed
                accepted = accepted & active
                factor, wished = control.factor(ratio, history, order)
                history = _updated(history, wished, accepted)
                factor = torch.where(steady & accepted, factor, torch.clamp(torch.as_tensor(factor), max=1.0))
                strain = method.strain(step_h, step)
                if strain is not None:
                    factor = torch.minimum(factor, STABLE / strain)
                factor = torch.where(ratio < math.inf, factor, RETREAT)
                if step.failed is not None:
                    factor = torch.where(step.failed, GIVE_WAY, factor)
                self.ratios.append(ratio)
                steady = accepted
            else:
                accepted = step.y.isfinite().all(-1) & active
            arrived = accepted & lands
            self.tried.append(Tried(t, step_h, accepted, torch.where(arrived, kind, FREE), moves, fresh))
            if self.keeper is not None:
                self.keeper.offer(iteration, y, handed, breaks)
            bare, breaks = step.carry, False
            new_t = torch.where(lands, target, t + step_h)
            crossings = self.tracker.crossings(new_t, step.y, accepted, arrived & (kind == END)) if self.tracker else []
            dense = method.dense(rhs, t, y, step_h, step) if interpolate or observe or crossings else None
            if interpolate and dense is not None:
                self.waiting.append(dense)
            if observe is not None and dense is not None:
                observe(t, torch.where(accepted, step_h, 0.0), dense)
            if crossings and dense is not None:
                active = active & ~self._locate(crossings, iteration, dense, t, step_h)
                halted = True
            if adaptive:
                wish = self._clip(step_h * factor) if bounded else step_h * factor
                # A step that was cut short to land does not shorten the next one.
                keeps = arrived & (wish.abs() < h.abs()) if several else arrived
                h = torch.where(active & ~keeps, wish, h)
            keep, done = accepted.unsqueeze(-1), arrived & (kind == END) if several else arrived
            t = torch.where(accepted, new_t, t)
            y, scale = torch.where(keep, step.y, y), torch.where(keep, new_scale, scale)
            # A replay does not compute every dense output, so it cannot rely on what these hand over.
            handed = tuple(torch.where(keep, new, old) for new, old in zip(bare, carry))
            if bare is step.carry:
                carry = handed
            else:
                carry = tuple(torch.where(keep, new, old) for new, old in zip(step.carry, carry))
            fresh = fresh & ~accepted
            if several:
                moves = moves & ~arrived
                stop = stop + (arrived & ~done)
                leaps = arrived & ~jump.isnan()
                target, kind, jump = (x.gather(1, stop[:, None])[:, 0] for x in (self.stops, self.kinds, self.jumps))
                if any_true(leaps):
                    t = torch.where(leaps, self._leap(stop - 1), t)
                    fresh, breaks = fresh | leaps, True
                    carry = renewed(method, rhs, t, y, carry, leaps)
            self.calls.append(rhs.calls)
            active = active & ~done
            suspect = h.abs() < coarsest if adaptive else ~accepted
            spent = None
            if adaptive and tolerance.resolution:
                spent = ratio.isnan() & tolerance.spent(y)
                suspect = suspect | spent
            news = int(plain(active * (suspect + 1)).max())
            if news == 2:
                lost = active & (h.abs() < self._resolution(t, h) if adaptive else suspect)
                lost = lost if spent is None else lost | (active & spent)
                self._end_lost(lost, step, scale)
                active, halted = active & ~lost, True
            if len(self.waiting) == _CHUNK:
                self._flush(t)
            if news == 0 or (news == 2 and not any_true(active)):
                break
        self._flush(t)
        if self.keeper is not None:
            self.keeper.close(y, handed)
        return self._report(t, y, h)

    def _begin(self) -> tuple[Tensor, Tensor, Carry, Tensor]:
        """Initial times, states and carry, healthy ones standing in for those that are broken, and who is active."""
        t, y = self.start, self.problem.y0
        carry = self.method.init(self.rhs, t, y)
        slope = self.method.derivative(self.rhs, t, y, carry)
        if _mapped(slope):
            raise NotImplementedError(
                "solve_ode: steps per sample are not supported for what torch.func.vmap maps over. Make that part of "
                "the batch, or take one step for the batch: PIDController() and times of shape (T,)."
            )
        healthy = (y.isfinite() & slope.isfinite()).all(-1)
        self.replace: Tensor | None = None
        self.own: frozenset[int] = frozenset()
        if not all_true(healthy):
            self.replace = standing_in(healthy)
            y = y.index_select(0, self.replace)
            self.own = own_args(self.rhs, t, y, self.replace)
            self.rhs.stand_in(self.replace, self.own)
            carry = self.method.init(self.rhs, t, y)
            self.status = torch.where(healthy, self.status, int(Status.NON_FINITE))
            self.component = self.problem.y0.isfinite().int().argmin(-1)
        # A sample whose times are one has arrived.
        here = self.start == self.end
        self.status = torch.where(healthy & here, int(Status.CONVERGED), self.status)
        return t, y, carry, healthy & ~here

    def _clip(self, h: Tensor) -> Tensor:
        return h.abs().clamp(self.control.min_step, self.control.max_step) * self.sign

    def _resolution(self, t: Tensor, h: Tensor) -> Tensor:
        """The shortest step of those in the order of `h` that time resolves."""
        return UNDERFLOW * torch.maximum(torch.maximum(t.abs(), (t + h).abs()), 1e-6 * (self.end - self.start).abs())

    def _leap(self, stop: Tensor) -> Tensor:
        return self.jumps.gather(1, stop.clamp(min=0).unsqueeze(1)).squeeze(1)

    def _end_lost(self, lost: Tensor, step: Step, scale: Tensor) -> None:
        error = step.y if step.error is None else step.error
        status = torch.where(error.isfinite().all(-1), int(Status.STEP_UNDERFLOW), int(Status.NON_FINITE))
        self.status = torch.where(lost, status, self.status)
        component = self.tolerance.component(error, scale)
        self.component = torch.where(lost, component, self.component)

    def _locate(
        self, crossings: list[tuple[int, Tensor]], iteration: int, dense: Tensor, t: Tensor, h: Tensor
    ) -> Tensor:
        """Locate events within the steps just taken; which samples ended."""
        assert self.tracker is not None
        ended, theta = self.tracker.locate(crossings, len(self.event_dense), dense, t, h)
        self.event_dense.append(dense)
        self.event_iterations.append(iteration)
        self.reached = torch.where(ended, t + theta * h, self.reached)
        self.status = torch.where(ended, int(Status.EVENT), self.status)
        return ended

    def _first_steps(self, t: Tensor, y: Tensor, carry: Carry) -> Tensor:
        given: float | Tensor | None = self.control.first_step
        if self.problem.first_step is not None:
            given = self.problem.first_step
            given = given.abs() if isinstance(given, Tensor) else abs(given)
        h = first_steps(self.problem, t, y, carry, self.end - self.start) if given is None else given * self.sign
        h = self._clip(h)
        return torch.maximum(h.abs(), self._resolution(t, h)) * self.sign

    def _flush(self, t: Tensor) -> None:
        """Look through the iterations since the last call for those that the outputs lie in."""
        count = len(self.waiting)
        if not count:
            return
        dense = torch.stack(self.waiting)
        self.waiting = []
        if self.problem.dense:
            self.kept_dense.append(dense)
        if not len(self.steps_of_output):
            return
        first = len(self.tried) - count
        ends = torch.stack([tried.t for tried in self.tried[first + 1 :]] + [t], dim=1) * self.sign.unsqueeze(1)
        wanted = self.outputs[:, 1:-1] * self.sign.unsqueeze(1)
        found = torch.searchsorted(ends, wanted.contiguous()).T
        new = (found < count) & (self.steps_of_output < 0)
        self.steps_of_output = torch.where(new, found + first, self.steps_of_output)
        if self.problem.dense:
            return
        if self.dense is None:
            self.dense = dense.new_zeros((len(new), *dense.shape[1:]))
        output, sample = new.nonzero(as_tuple=True)
        self.dense[output, :, sample] = dense[found[output, sample], :, sample]

    def _report(self, t: Tensor, y: Tensor, h: Tensor) -> Run:
        self.rhs.stand_in(None, self.own)
        lined = LinedUp(self.tried, [entry[0] for entry in self.keeper.kept] if self.keeper else [], t)
        if self.keeper is not None:
            self.keeper.line_up(lined)
        places = lined.index_of(self.steps_of_output.clamp(min=0))
        if self.problem.dense:
            picks = torch.arange(lined.count, device=t.device).unsqueeze(1).expand(-1, len(t))
            if self.kept_dense:
                self.dense = take(torch.cat(self.kept_dense), lined.iterations)
        else:
            picks, places = places, torch.arange(len(places), device=t.device).unsqueeze(1).expand_as(places)
        first, hits = len(picks), self.tracker.hits if self.tracker else []
        if self.event_dense:
            where = torch.tensor(self.event_iterations, device=t.device).unsqueeze(1).expand(-1, len(t))
            picks = torch.cat([picks, lined.index_of(where).clamp(max=lined.count - 1)])
            events = torch.stack(self.event_dense)
            self.dense = events if self.dense is None else torch.cat([self.dense, events])
        counts = self._counts()
        return Run(
            y=y,
            mesh=Mesh(lined.steps(picks, self.replace), picks, self.own),
            dense=self.dense,
            places=places,
            reached=torch.where(self.reached.isnan(), t, self.reached),
            hits=[dataclasses.replace(hit, pick=hit.pick + first) for hit in hits],
            status=self.status,
            wish=h,
            component=self.component,
            **counts,
        )

    def _counts(self) -> dict[str, Tensor]:
        """What `Run` has of every sample's steps."""
        if not self.tried:
            none, zeros = torch.zeros_like(self.status), torch.zeros_like(self.start)
            return {"accepted": none, "rejected": none, "evaluations": none, "ratio": zeros, "step": zeros}
        h, accepted, lands = (
            torch.stack([getattr(x, name) for x in self.tried]) for name in ("h", "accepted", "lands")
        )
        active = h != 0
        last = (active.sum(0, keepdim=True) - 1).clamp(min=0)
        calls = torch.tensor(self.calls, device=h.device)
        ratios = torch.stack(self.ratios) if self.ratios else torch.zeros_like(h)
        done = (lands == END).any(0) & (self.status == Status.MAX_STEPS)
        self.status = torch.where(done, int(Status.CONVERGED), self.status)
        return {
            "accepted": accepted.sum(0),
            "rejected": (active & ~accepted).sum(0),
            "evaluations": calls[0] + (active * calls.diff().unsqueeze(1)).sum(0),
            "ratio": ratios.gather(0, last)[0],
            "step": h.gather(0, last)[0],
        }


def _mapped(tensor: Tensor) -> bool:
    """Whether an enclosing vmap has an example of it for each of its own."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def _updated(old: History, new: History, accepted: Tensor) -> History:
    """The controller's history of samples that accepted their steps."""
    old = old or (1.0,) * len(new)
    like = accepted.double()
    return tuple(
        torch.where(accepted, *(x if isinstance(x, Tensor) else torch.full_like(like, x) for x in pair))
        for pair in zip(new, old)
    )
