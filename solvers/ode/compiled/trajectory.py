"""Solves whose steps and whose derivative are one compiled program each."""

from __future__ import annotations

import dataclasses
import sys
import warnings

import torch
from torch import Tensor

from ...adjoint.shared import CheckpointAdjoint
from ...transforms import no_derivatives
from ..adjoint import Adjoint, DirectAdjoint, Outcome, Task, must_tape
from ..adjoint_checkpoint import CheckpointedTrajectory, Segments
from ..explicit import ExplicitRungeKutta
from ..function import Cotangents, Solve
from ..mesh import END
from ..method import Carry
from ..problem import Problem
from ..tape import Sums, Tape
from .engine import disagrees, engine_for, places_of
from .fingerprint import Fingerprint
from .loop import Loop
from .pull import Pulled
from .reasons import CompileWarning, Trouble, Unfit
from .steps import CompiledSteps


class CompiledTrajectory(Adjoint):
    """The whole adaptive solve as one compiled loop, and its derivative as another one over the accepted steps.

    It takes the steps that `SharedSteps` takes, and differentiates them exactly. The state and the derivative at the
    start of every accepted step are kept for the backward pass. What it does not know to compile it leaves, with a
    warning, to the adjoint that it is made with; what is out of the ordinary, such as samples that break, without one.
    """

    def __init__(self, eager: Adjoint) -> None:
        self.eager = eager

    def solve(self, task: Task) -> Outcome:
        """By compiled loops where possible."""
        try:
            self._check(task.problem)
            if torch.is_grad_enabled():
                return _CompiledSolve(task, self.eager).outcome()
            steps = solved(task.problem, task.problem.rhs.args, False)
            return Outcome(steps.result.y, steps.result.dense, steps.result)
        except Unfit as reason:
            warn(str(reason))
        except Trouble:
            task.problem.rhs.calls = 0
        return self.eager.solve(task)

    def _check(self, problem: Problem) -> None:
        if must_tape():
            raise Unfit("it is called inside a transform of torch.func, or under forward-mode differentiation")
        if not isinstance(problem.method, ExplicitRungeKutta):
            raise Unfit(f"{type(problem.method).__name__} is no explicit Runge-Kutta method")
        if problem.events:
            raise Unfit("events are not compiled")
        if problem.per_sample:
            raise Unfit("steps per sample are not compiled")
        if problem.controller.step_t or problem.controller.jump_t:
            raise Unfit("step_t and jump_t are not compiled")
        if problem.rhs._autocast is not None:
            raise Unfit("autocast is on")
        if problem.observe is not None:
            raise Unfit("somebody watches the steps")


def warn(reason: str) -> None:
    """Say why a solve is not compiled, at the line that called the library."""
    inside = (__name__.split(".solvers")[0] + ".solvers", "torch.")
    frame, depth = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").startswith(inside):
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    warnings.warn(f"solve_ode runs without compilation: {reason}.", CompileWarning, stacklevel=depth)


def solved(problem: Problem, args: tuple[object, ...], keep: bool) -> CompiledSteps:
    """A compiled solve of `problem` with `args` in place of its own.

    Raises:
        Unfit: it cannot be compiled.
        Trouble: it must be left to another driver.
    """
    with no_derivatives():
        while True:
            seen = Fingerprint(problem.rhs.field, args)
            engine, known, key = engine_for(problem, args, seen)
            steps = CompiledSteps(problem, engine, known, keep)
            if steps.agrees():
                return steps
            problem.rhs.calls = 0
            disagrees(key)


class _CompiledSolve(Solve):
    """One solve that may be differentiated."""

    recomputes = True

    def __init__(self, task: Task, eager: Adjoint) -> None:
        super().__init__(task)
        plain = isinstance(eager, CheckpointedTrajectory) and eager.knobs == CheckpointAdjoint()
        if self._differentiable() and not plain and not isinstance(eager, DirectAdjoint):
            name = type(eager.knobs if isinstance(eager, CheckpointedTrajectory) else eager).__name__
            raise Unfit(f"its derivative is that of CheckpointAdjoint(), and {name} asks for another one")
        if self.externals.retain:
            raise Unfit("the field uses a tensor that was computed from another one that it uses")

    def _differentiable(self) -> bool:
        return any(tensor.requires_grad for tensor in self.inputs)

    def outcome(self) -> Outcome:
        """Solve at once, since the compiled loop may fail where a fallback is at hand."""
        keep = self._differentiable()
        self.steps = solved(self.problem, self.inner.args, keep)
        if keep:
            places_of(self.shared, self.steps.known)
        self.run = self.steps.result
        if not keep:
            return Outcome(self.run.y, self.run.dense, self.run)
        return super().outcome()

    def forward(self) -> tuple[Tensor, ...]:
        run = self.steps.result
        results = (run.y, run.dense)
        self.run = self.steps.result = dataclasses.replace(run, dense=None)
        return tuple(x.detach() for x in results if x is not None)

    def backward(self, bars: tuple[Tensor, ...]) -> Cotangents:
        steps, dense_bar = self.steps, bars[1] if len(bars) > 1 else None
        try:
            loop, reached = steps.engine.backward(
                self.problem, self.inner.args, steps.known, self.shared, self.timed, steps.chunks[0][0]
            )
        except Unfit as reason:
            warn(f"{reason} (its derivative; the solve itself is compiled)")
            return Segments(self, dense_bar, False).pull(bars[0], self._kept())
        wanted = [tensor for tensor, there in zip(self.shared, reached) if there]
        return self._pull(loop, bars[0], dense_bar, wanted, reached)

    def _pull(
        self, loop: Loop, y_bar: Tensor, dense_bar: Tensor | None, wanted: list[Tensor], reached: list[bool]
    ) -> Cotangents:
        """Through all chunks, and then through the derivative at the start."""
        steps, engine, count = self.steps, self.steps.engine, len(self.steps.steps)
        after = engine.end(y_bar, self.steps.here.carry, wanted)
        picked = len(steps.picks)
        for number, (chunk, rows, filled) in reversed(list(enumerate(steps.chunks))):
            if not rows:
                continue
            picked -= filled
            dense_bars = engine.dense_bars(y_bar)
            if filled and dense_bar is not None:
                dense_bars[0][:filled] = dense_bar[picked : picked + filled]
            last = rows if number + 1 == len(steps.chunks) else 0
            after = after._replace(left=torch.full_like(after.left, rows), last=torch.full_like(after.last, last))
            tensors = loop(after.flat(), [*dense_bars, *chunk.flat()], steps.known)
            after = Pulled.of(tensors, engine.plan, len(wanted))
        bars = iter(after.shared)
        sums = Sums(self.shared, self.externals, evaluations=count * engine.evaluations)
        sums.add([next(bars) if there else None for there in reached])
        start, end, first = after.t, None, after.y
        if count and after.carry:
            with torch.enable_grad():
                tape = Tape(self.inner, sums, self.timed)
                record = tape.evaluate(self.problem.times.values[0], self.problem.y0)
            state, time = tape.pull(record, after.carry[0])
            first = first if state is None else first + state
            start = start if time is None else start + time
        if count and steps.steps[-1].lands == END:
            start, end = start - after.h, after.h
        return Cotangents(start, end, first, sums.totals, sums.evaluations, count)

    def _kept(self) -> list[tuple[int, Tensor, Carry]]:
        """The states that chunks start from."""
        found: list[tuple[int, Tensor, Carry]] = []
        first = 0
        for chunk, rows, _ in self.steps.chunks:
            if rows:
                found.append((first, chunk.y[0], tuple(part[0] for part in chunk.carry)))
            first += rows
        return found
