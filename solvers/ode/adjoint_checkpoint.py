"""Exact derivatives of the accepted steps from a few kept states."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..adjoint.shared import CheckpointAdjoint
from .adjoint import Adjoint, Outcome, Task, must_tape, plain_solve, taped_outcome
from .explicit import ExplicitRungeKutta
from .function import Cotangents, Solve
from .mesh import PickBars
from .method import Carry
from .problem import Keeper
from .pullback import Backward, ExplicitPullback, RecordedPullback
from .replay import check_repeats, replay
from .tape import Record, Recorded, Recorder, Sums, Tape
from .windows import StateKeeper, WindowPullback, suits

# Steps are recorded as they are taken, which saves repeating them, while their stages take fewer bytes than these.
_TAPED = 8 * 2**20


class CheckpointedTrajectory(Adjoint):
    """`CheckpointAdjoint` for a trajectory: the accepted steps are replayed segment by segment from kept states.

    The steps of an explicit method that fit into little memory are recorded as they are taken and need no replay. Where
    the states are small all of them are kept instead, and many steps at once are recorded in the backward pass.
    """

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
        method = self.problem.method
        if isinstance(method, ExplicitRungeKutta) and knobs == CheckpointAdjoint():
            self.keeper = self._keeper()

    def _keeper(self) -> Keeper:
        """Of what suits the states best."""
        if not self.timed and suits(self.problem, self.shared):
            return StateKeeper(_TAPED)
        if self.problem.per_sample:
            return self.keeper
        stage = self.problem.y0.numel() * self.problem.y0.element_size()
        tape = Tape(self.inner, Sums(self.shared, self.externals), self.timed)
        out = self.externals.recorded
        first = None if self.timed or out is None or out.grad_fn is None else (out, self.leaf, None)
        return TapingKeeper(tape, stage, first)

    def forward(self) -> tuple[Tensor, ...]:
        task = self.task
        if isinstance(self.keeper, TapingKeeper):
            task = dataclasses.replace(task, problem=dataclasses.replace(self.problem, rhs=self.keeper.recorder))
        run = task.run(self.keeper)
        self.run = dataclasses.replace(run, dense=None)
        results = (run.y, run.dense)
        return tuple(x.detach() for x in results if x is not None)

    def backward(self, bars: tuple[Tensor, ...]) -> Cotangents:
        dense_bar = bars[1] if len(bars) > 1 else None
        # What was recorded serves one backward pass; a second one replays.
        steps = self.keeper.release() if isinstance(self.keeper, TapingKeeper) else None
        segments = Segments(self, dense_bar, self.recursive, isinstance(self.keeper, StateKeeper))
        if steps is not None:
            return segments.pull_recorded(bars[0], steps)
        if isinstance(self.keeper, StateKeeper) and self.keeper.states is not None:
            return segments.pull_states(bars[0], self.keeper.states)
        return segments.pull(bars[0], self.keeper.kept)


class TapingKeeper(Keeper):
    """Keeps states, and all evaluations recorded as well while these are few and small.

    Attributes:
        recorder: the right-hand side that the driver is to use.
    """

    def __init__(self, tape: Tape, stage: int, first: Record | None) -> None:
        """`stage` is how many bytes a stage takes; `first` the evaluation at the start, if it is recorded already."""
        super().__init__(None)
        self.recorder = Recorder(tape, first)
        self._stage, self._left = stage, _TAPED
        self._new = False
        self._first: Record | None = None
        self._steps: list[list[Record | None]] | None = []

    def renew(self) -> None:
        """The derivative at the start is evaluated next."""
        self.recorder.records = []
        self._new = True

    def attempt(self) -> None:
        """Forget what a rejected step evaluated."""
        if self._new and self.recorder.active:
            self._first, self._new = self.recorder.records[0], False
        self.recorder.records = []

    def offer(self, index: int, y: Tensor, carry: Carry, breaks: bool = False) -> None:
        """Keep what the step evaluated."""
        super().offer(index, y, carry, breaks)
        if self._steps is None:
            return
        self._steps.append([self._first, *self.recorder.records])
        self._left -= self._stage * len(self._steps[-1])
        self._first = None
        if self._left < 0:
            self._drop()

    def close(self, y: Tensor, carry: Carry) -> None:
        """Record no more."""
        self.recorder.records = []
        self.recorder.active = False

    def release(self) -> list[list[Record | None]] | None:
        """Every step's evaluations, the first None where it belongs to the step before; None if some are missing."""
        steps = self._steps
        self._drop()
        return steps

    def _drop(self) -> None:
        self._steps, self._first = None, None
        self.recorder.records, self.recorder.active = [], False


class Segments:
    """The backward pass over the segments between kept states."""

    def __init__(self, solve: Solve, dense_bar: Tensor | None, recursive: bool, small: bool = False) -> None:
        """`small` says that steps are better pulled back many at once."""
        assert solve.run is not None
        self.solve, self.run, self.recursive = solve, solve.run, recursive
        self.sums = Sums(solve.shared, solve.externals)
        tape = Tape(solve.inner, self.sums, solve.timed)
        mesh, method = self.run.mesh, solve.problem.method
        picks = PickBars(mesh, dense_bar)
        self.pullback: ExplicitPullback | RecordedPullback
        if isinstance(method, ExplicitRungeKutta):
            kind = WindowPullback if small else ExplicitPullback
            self.pullback = kind(method, tape, mesh, picks)
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

    def pull_states(self, y_bar: Tensor, states: list[Tensor]) -> Cotangents:
        """The same where the states at the start of every step and at the end are all known."""
        assert isinstance(self.pullback, WindowPullback)
        bar, count = Backward(y_bar), len(self.run.mesh.steps)
        self.pullback.pull_states(range(count), states, bar)
        return Cotangents(bar.t, bar.end, bar.y, self.sums.totals, self.sums.evaluations, count)

    def pull_recorded(self, y_bar: Tensor, steps: list[list[Record | None]]) -> Cotangents:
        """The same from evaluations that are all recorded already."""
        assert isinstance(self.pullback, ExplicitPullback)
        bar, end, count = Backward(y_bar), self.pullback.tableau.end, len(steps)
        recorded: list[Recorded] = []
        for taken, records in zip(self.run.mesh.steps, steps):
            if records[0] is None:
                last = recorded[-1][0][end]
                assert last is not None
                start = last[0].detach()
                if taken.replace is not None:
                    start = start.index_select(0, taken.replace)
            else:
                start = records[0][0].detach()
            recorded.append((records, start))
        if count and not self.run.mesh.steps[-1].dense and end < len(recorded[-1][0]):
            # Nobody needs the derivative at the end of the solve.
            recorded[-1][0][end] = None
        self.pullback.pull_recorded(recorded, y_bar, bar)
        return Cotangents(bar.t, bar.end, bar.y, self.sums.totals, self.sums.evaluations, count)

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
        check_repeats(self.pullback.pull(range(first, stop), y, carry, bar), after)
