"""Exact derivatives of the accepted steps from a few kept states."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..adjoint.shared import CheckpointAdjoint
from ..solution import SolverError
from .adjoint import Adjoint, Outcome, Task, must_tape, plain_solve, taped_outcome
from .explicit import ExplicitRungeKutta
from .function import Cotangents, Solve
from .mesh import PickBars
from .method import Carry
from .problem import Keeper
from .pullback import Backward, ExplicitPullback, RecordedPullback, Sums, Tape
from .replay import replay


class CheckpointedTrajectory(Adjoint):
    """`CheckpointAdjoint` for a trajectory: the accepted steps are replayed segment by segment from kept states."""

    def __init__(self, knobs: CheckpointAdjoint) -> None:
        self.knobs = knobs

    def solve(self, task: Task) -> Outcome:
        """Find the steps, keeping some states."""
        if must_tape():
            return taped_outcome(task)
        if not torch.is_grad_enabled():
            return plain_solve(task)
        return _Checkpointed(task, self.knobs).outcome()


class _Checkpointed(Solve):
    """One solve."""

    def __init__(self, task: Task, knobs: CheckpointAdjoint) -> None:
        super().__init__(task)
        self.recursive = knobs.recursive
        self.keeper = Keeper(1 if knobs.recursive else knobs.segments)

    def forward(self) -> tuple[Tensor, ...]:
        run = self.task.run(self.keeper)
        self.run = dataclasses.replace(run, dense=None)
        results = (run.y, run.dense)
        return tuple(x.detach() for x in results if x is not None)

    def backward(self, bars: tuple[Tensor, ...]) -> Cotangents:
        assert self.run is not None
        segments = Segments(self, bars[1] if len(bars) > 1 else None, self.recursive)
        return segments.pull(bars[0], self.keeper.kept)


class Segments:
    """The backward pass over the segments between kept states."""

    def __init__(self, solve: Solve, dense_bar: Tensor | None, recursive: bool) -> None:
        assert solve.run is not None
        self.solve, self.run, self.recursive = solve, solve.run, recursive
        self.sums = Sums(solve.shared, solve.externals)
        tape = Tape(solve.inner, self.sums, solve.timed)
        mesh, method = self.run.mesh, solve.problem.method
        picks = PickBars(mesh, dense_bar)
        self.pullback: ExplicitPullback | RecordedPullback
        if isinstance(method, ExplicitRungeKutta):
            self.pullback = ExplicitPullback(method, tape, mesh, picks)
        else:
            self.pullback = RecordedPullback(method, tape, mesh, picks, solve.ends)

    def pull(self, y_bar: Tensor, kept: list[tuple[int, Tensor, Carry]]) -> Cotangents:
        """From the end to the start.

        Args:
            y_bar: cotangent of the final matrix.
            kept: (step that starts here, state, carry), in order.
        """
        bar = Backward(y_bar)
        stop, after = len(self.run.mesh.steps), self.run.y
        for first, y, carry in reversed(kept):
            self._pull(first, stop, y, carry, bar, after)
            stop, after = first, y
        steps = len(self.run.mesh.steps)
        return Cotangents(bar.t, bar.end, bar.y, self.sums.totals, self.sums.evaluations, steps)

    def _pull(self, first: int, stop: int, y: Tensor, carry: Carry, bar: Backward, after: Tensor) -> None:
        """One segment; if recursive its second half first, from a state computed on the way."""
        if self.recursive and stop - first > 1:
            middle = (first + stop) // 2
            with torch.no_grad():
                method, inner = self.solve.problem.method, self.solve.inner
                there, held, _ = replay(method, inner, self.run.mesh, range(first, middle), y, carry)
            self._pull(middle, stop, there, held, bar, after)
            self._pull(first, middle, y, carry, bar, there)
            return
        _check_repeats(self.pullback.pull(range(first, stop), y, carry, bar), after)


def _check_repeats(found: Tensor, expected: Tensor) -> None:
    """The replay must meet the kept states."""
    slack = math.sqrt(torch.finfo(found.dtype).eps)
    if not torch.allclose(found, expected, rtol=slack, atol=slack, equal_nan=True):
        raise SolverError(
            "solve_ode: the field gave other values when the accepted steps were repeated for the backward pass, so "
            "gradients would be wrong. It must be a function of t, y and args alone: fix its noise within a solve, and "
            "do not let it change state."
        )
