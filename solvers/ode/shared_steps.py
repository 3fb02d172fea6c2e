"""The driver that takes one step for the whole batch: times and steps are Python floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..solution import Status
from ..transforms import any_true, inside_transform, plain
from .control import History
from .events import EventTracker
from .first_step import first_step
from .mesh import END, FORCED, FREE, Mesh, Taken
from .method import Carry, Step
from .problem import Keeper, Problem, Run
from .stand_in import own_args, standing_in

# A step that would leave less than this fraction of itself before a time to land on is stretched to reach it.
STRETCH = 1e-3
# Of a step in which the field became NaN or infinite this fraction is tried next.
RETREAT = 0.1
# A step shorter than so many times the resolution of time is none.
UNDERFLOW = 16 * 2.0**-52
# No step is longer than this fraction of the longest stable one: with longer ones it is step control alone that keeps
# errors from growing, and the derivative of the steps that were taken, which knows nothing of it, grows without bound.
STABLE = 0.98
# One in so many steps is looked at while the last one looked at was shorter than this fraction.
CALM, STRAINED = 4, 0.9
# Of a step whose stage equations could not be solved.
GIVE_WAY = 0.5


class SharedSteps:
    """One batch-wide solve.

    Samples that end before the others, because they are broken or an event ended them, are replaced by copies of a
    healthy sample: their rows go on without harm and count for nothing.
    """

    def __init__(self, problem: Problem, keeper: Keeper | None) -> None:
        self.problem, self.keeper = problem, keeper
        self.rhs, self.method, self.control = problem.rhs, problem.method, problem.controller
        self.tolerance = problem.tolerance
        assert problem.times.listed is not None
        self.outputs = problem.times.listed
        self.sign = math.copysign(1.0, self.outputs[-1] - self.outputs[0])
        self.stops = self._stops()
        batch, device = len(problem.y0), problem.y0.device
        self.steps: list[Taken] = []
        self.picks: list[int] = []
        self.dense: list[Tensor] = []
        self.places: list[int] = []
        self.alive: Tensor | None = None
        # What replaces the rows of samples that ended since the last accepted step, and whether it has yet to.
        self.replace: Tensor | None = None
        self.swap = False
        # Whose args stand in for those of broken samples, and which leaves of args these are; None: not known yet.
        self.rows: Tensor | None = None
        self.own: frozenset[int] | None = None
        self.accepted = self.rejected = 0
        self.strained = True
        self.status = torch.full((batch,), int(Status.MAX_STEPS), device=device)
        self.reached = torch.full((batch,), self.outputs[0], dtype=torch.float64, device=device)
        self.tracker = EventTracker(problem.events, problem.rhs) if problem.events else None
        self.counts = torch.zeros((3, batch), dtype=torch.long, device=device)
        self.ratio = 0.0
        self.step = torch.zeros((batch,), dtype=torch.float64, device=device)
        self.component = torch.zeros((batch,), dtype=torch.long, device=device)

    def _stops(self) -> list[tuple[float, int, float | None]]:
        """(time to land on, FORCED or END, where to restart after a jump), in the direction of time."""
        start, end = self.outputs[0], self.outputs[-1]
        stops: dict[float, tuple[int, float | None]] = dict.fromkeys(self.control.step_t, (FORCED, None))
        for t in self.control.jump_t:
            stops[self._beside(t, -self.sign)] = (FORCED, self._beside(t, self.sign))
        stops[end] = (END, None)
        inside = [t for t in stops if 0 < (t - start) * self.sign <= (end - start) * self.sign]
        return [(t, *stops[t]) for t in sorted(inside, key=lambda t: t * self.sign)]

    def _beside(self, t: float, direction: float) -> float:
        """The neighbour of `t` in the type in which the field sees it."""
        here = torch.tensor(t, dtype=self.rhs.spec.dtype)
        return float(torch.nextafter(here, torch.full_like(here, math.copysign(math.inf, direction))))

    def run(self) -> Run:
        """Integrate to the last output time, or until no sample is left."""
        problem, rhs, method, control, tolerance = self.problem, self.rhs, self.method, self.control, self.tolerance
        order, adaptive = method.error_order or 1, problem.adaptive
        y, t = problem.y0, self.outputs[0]
        scale = tolerance.scale(y)
        keeper = self.keeper or Keeper(1)
        keeper.renew()
        carry = method.init(rhs, t, y)
        # State and carry as the last step left them, before any replacement: what a replay starts from.
        handed: tuple[Tensor, Carry] = (y, ())
        h, memory = self._first_step(t, y, carry), None
        history: History = ()
        restart, moves, steady, stop, wish = True, True, True, 0, h
        if self.tracker is not None:
            self.tracker.start(self.reached, y)
        while self.accepted + self.rejected < problem.max_steps:
            if self.swap:
                y, carry = self._swapped(t, y, () if restart else carry)
                scale, self.swap = tolerance.scale(y), False
            target, kind, jump = self.stops[stop]
            step_h, lands = h, FREE
            if abs(target - t) <= abs(h) * (1 + STRETCH):
                step_h, lands = target - t, kind
            if not carry:
                keeper.renew()
                carry = method.init(rhs, t, y)
            keeper.attempt()
            step = method.step(rhs, t, y, step_h, carry, memory)
            memory = step.memory
            if step.failed is not None and self.alive is not None:
                step.failed = step.failed & self.alive
            new_scale = tolerance.scale(step.y)
            factor = 1.0
            if adaptive:
                assert step.error is not None
                ratio, strain = self._judge(step_h, step, torch.maximum(scale, new_scale))
                if step.failed is not None and any_true(step.failed):
                    ratio = math.inf
                if not ratio <= 1.0 and (abs(step_h) > control.min_step or not math.isfinite(ratio)):
                    self.rejected += 1
                    steady = False
                    if math.isfinite(ratio):
                        wish = h = self._clip(step_h * min(float(control.factor(ratio, history, order)[0]), 1.0))
                    else:
                        h = step_h * (RETREAT if step.failed is None else GIVE_WAY)
                    if self._drop_lost(t, y, carry, step, step_h, h, ratio):
                        if not self._survivors():
                            break
                        h, steady = self._resolved(t, wish), True
                    continue
                change, history = control.factor(ratio, history, order)
                factor = float(change)
                self.ratio = ratio
            elif self._drop_broken(t, step, step_h):
                if not self._survivors():
                    break
                continue
            new_t = target if lands else t + step_h
            crossings = self._crossings(new_t, step.y, lands == END)
            wanted, bare = self._wants_dense(new_t) or bool(crossings), step.carry
            if wanted:
                self.picks.append(self.accepted)
                self.dense.append(method.dense(rhs, t, y, step_h, step))
            if problem.observe is not None:
                problem.observe(t, step_h, self.dense[-1] if wanted else method.dense(rhs, t, y, step_h, step))
            # What an observer's dense output hands over is none that a replay would know.
            left = step.carry if wanted else bare
            keeper.offer(self.accepted, *handed, restart or self.replace is not None)
            self.steps.append(Taken(t, step_h, lands, moves, restart, wanted, self.replace, None, self.rows))
            self.replace = None
            self.accepted += 1
            ended = self._locate(crossings, t, step_h)
            t, y, scale, restart = new_t, step.y, new_scale, False
            carry, handed = step.carry, (step.y, left)
            if ended and not self._survivors():
                break
            if adaptive:
                grown = step_h * (factor if steady else min(factor, 1.0))
                # A step that was cut short to land does not shorten the next one.
                wish = max(abs(h), abs(grown)) if lands else abs(grown)
                wish = h = self._clip(min(wish, abs(step_h) * STABLE / strain) if strain > 0 else wish)
            steady = True
            if lands:
                moves = False
                stop += 1
                if stop == len(self.stops):
                    break
                if jump is not None:
                    t, carry, restart = jump, (), True
            if adaptive and self._tiny(t, h):
                self._drop_stalled(t, step, scale, step_h)
                if not self._survivors():
                    break
                h = self._resolved(t, h)
        done = stop == len(self.stops)
        self._end(self._living(), Status.CONVERGED if done else Status.MAX_STEPS, t, h)
        keeper.close(*handed)
        return self._report(handed[0], h)

    def _judge(self, h: float, step: Step, scale: Tensor) -> tuple[float, float]:
        """The error in units of the tolerance, and the step's length in units of the longest stable one."""
        assert step.error is not None
        # Far from the limit a look now and then will do.
        self.strained = self.strained or self.accepted % CALM == 0
        strain = self.method.strain(h, step) if self.strained else None
        if strain is None:
            return self.tolerance.batch_ratio(step.error, scale, self.alive), 0.0
        ratio, worst = self.tolerance.batch_ratio_beside(step.error, scale, self.alive, strain)
        self.strained = worst > STRAINED
        return ratio, worst

    def _first_step(self, t: float, y: Tensor, carry: Carry) -> float:
        given = self.control.first_step if self.problem.first_step is None else float(self.problem.first_step)
        return self._resolved(t, self._clip(first_step(self.problem, t, y, carry) if given is None else given))

    def _resolution(self, t: float, h: float) -> float:
        """The shortest step of those in the order of `h` that time resolves."""
        return UNDERFLOW * max(abs(t), abs(t + h), 1e-6 * abs(self.outputs[-1] - self.outputs[0]))

    def _tiny(self, t: float, h: float) -> bool:
        return abs(h) < self._resolution(t, h)

    def _resolved(self, t: float, h: float) -> float:
        """`h`, or the shortest step that time resolves."""
        return math.copysign(max(abs(h), self._resolution(t, h)), self.sign)

    def _clip(self, h: float) -> float:
        return math.copysign(min(max(abs(h), self.control.min_step), self.control.max_step), self.sign)

    def _wants_dense(self, new_t: float) -> bool:
        """Whether the step up to `new_t` has output times inside, which are then noted."""
        known = len(self.places)
        while (
            len(self.places) + 2 < len(self.outputs) and (new_t - self.outputs[len(self.places) + 1]) * self.sign >= 0
        ):
            self.places.append(len(self.picks))
        return len(self.places) > known or self.problem.dense

    def _living(self) -> Tensor:
        return torch.ones_like(self.status, dtype=torch.bool) if self.alive is None else self.alive

    def _drop_lost(self, t: float, y: Tensor, carry: Carry, step: Step, tried: float, h: float, ratio: float) -> bool:
        """End the samples for which no step `h` can be accepted any more; whether there were any."""
        assert step.error is not None
        tiny = self._tiny(t, h)
        if not tiny and (math.isfinite(ratio) or inside_transform()):
            return False
        living = self._living()
        if inside_transform():
            lost, broken = living, living & (not math.isfinite(ratio))
        else:
            broken = ~(step.y.isfinite() & step.error.isfinite()).all(-1) & living
            if not tiny:
                # No shorter step helps where the field is broken at the very state the step starts from.
                lost = broken & ~self.method.derivative(self.rhs, t, y, carry).isfinite().all(-1)
                if self.tolerance.resolution:
                    lost = lost | (self.tolerance.spent(y) & living)
            elif step.failed is not None:
                lost = (broken | step.failed) & living
            else:
                each = self.tolerance.sample_ratio(step.error, self.tolerance.scale(step.y))
                lost = ~(each <= 1) & living
            if not any_true(lost):
                return False
        self.component = torch.where(
            lost, self.tolerance.component(step.error, self.tolerance.scale(y)), self.component
        )
        self._end(lost & broken, Status.NON_FINITE, t, tried)
        self._end(lost & ~broken, Status.STEP_UNDERFLOW, t, tried)
        self._replace(lost)
        return True

    def _drop_stalled(self, t: float, step: Step, scale: Tensor, taken: float) -> None:
        """End the samples on whose account the step after an accepted one would be shorter than time resolves."""
        assert step.error is not None
        living = lost = self._living()
        if not inside_transform():
            each = self.tolerance.sample_ratio(step.error, scale)
            change, _ = self.control.factor(each, (), self.method.error_order or 1)
            lost = living & (torch.as_tensor(taken * change).abs() < self._resolution(t, taken))
            if not any_true(lost):
                worst = torch.where(living, each, -math.inf).argmax()
                lost = torch.arange(len(each), device=each.device) == worst
        self.component = torch.where(lost, self.tolerance.component(step.error, scale), self.component)
        self._end(lost, Status.STEP_UNDERFLOW, t, taken)
        self._replace(lost)

    def _drop_broken(self, t: float, step: Step, h: float) -> bool:
        """With steps of constant length: end the samples whose next state is not finite; whether there are any."""
        failed = step.failed is not None and any_true(step.failed)
        if math.isfinite(float(plain(step.y).sum())) and not failed:
            return False
        living = self._living()
        broken = living if inside_transform() else living & ~step.y.isfinite().all(-1)
        lost = broken if step.failed is None else broken | (step.failed & living)
        if not any_true(lost):
            return False
        self.component = torch.where(broken, step.y.isfinite().int().argmin(-1), self.component)
        self._end(broken, Status.NON_FINITE, t, h)
        self._end(lost & ~broken, Status.STAGNATED, t, h)
        self._replace(lost)
        return True

    def _crossings(self, t: float, y: Tensor, final: bool) -> list[tuple[int, Tensor]]:
        if self.tracker is None:
            return []
        living = self._living()
        return self.tracker.crossings(torch.full_like(self.reached, t), y, living, living if final else None)

    def _locate(self, crossings: list[tuple[int, Tensor]], t: float, h: float) -> bool:
        """Locate events within the step just taken; whether any sample ended."""
        if not crossings:
            return False
        assert self.tracker is not None
        start, length = torch.full_like(self.reached, t), torch.full_like(self.reached, h)
        ended, theta = self.tracker.locate(crossings, len(self.picks) - 1, self.dense[-1], start, length)
        if not any_true(ended):
            return False
        self._end(ended, Status.EVENT, start + theta * length, h)
        self._replace(ended)
        return True

    def _swapped(self, t: float, y: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """State and carry with healthy samples' rows in place of those that ended, and the args if some broke."""
        replace = self.replace
        assert replace is not None

        def swap(rows: Tensor) -> Tensor:
            return rows.index_select(0, replace)

        y = swap(y)
        if not inside_transform() and any_true(self.status == Status.NON_FINITE):
            self.rows = standing_in(self._living())
            if self.own is None:
                self.own = own_args(self.rhs, t, y, self.rows)
            self.rhs.stand_in(self.rows, self.own)
        return y, tuple(map(swap, carry))

    def _survivors(self) -> bool:
        return self.alive is None or any_true(self.alive)

    def _replace(self, lost: Tensor) -> None:
        """Let a healthy sample stand in for those that are lost."""
        self.alive = self._living() & ~lost
        index = standing_in(self.alive)
        self.replace = index if self.replace is None else self.replace[index]
        self.swap = True

    def _end(self, rows: Tensor, status: Status, t: float | Tensor, h: float) -> None:
        """Write down how and where `rows` end."""
        self.status = torch.where(rows, int(status), self.status)
        self.reached = torch.where(rows, t, self.reached)
        self.step = torch.where(rows, h, self.step)
        now = torch.tensor([self.accepted, self.rejected, self.rhs.calls], device=rows.device)
        self.counts = torch.where(rows, now.unsqueeze(1), self.counts)

    def _report(self, y: Tensor, h: float) -> Run:
        device, own = y.device, self.own or frozenset()
        self.rhs.stand_in(None, own)
        missing = max(len(self.outputs) - 2 - len(self.places), 0)
        places = torch.tensor(self.places + [0] * missing, dtype=torch.long, device=device)
        return Run(
            y=y,
            mesh=Mesh(self.steps, self.picks, own),
            dense=torch.stack(self.dense) if self.dense else None,
            places=places,
            reached=self.reached,
            status=self.status,
            accepted=self.counts[0],
            rejected=self.counts[1],
            evaluations=self.counts[2],
            ratio=torch.full_like(self.reached, self.ratio),
            step=self.step,
            wish=torch.full_like(self.reached, h),
            component=self.component,
            hits=self.tracker.hits if self.tracker else [],
        )
