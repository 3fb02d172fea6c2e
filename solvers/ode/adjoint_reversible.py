"""Exact derivatives of the steps of a reversible method, whose states are reconstructed and not kept."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from ..adjoint.shared import CheckpointAdjoint, ReversibleAdjoint
from ..solution import AdjointWarning, Status, warn_caller
from ..transforms import any_true
from ..tree import norms
from .adjoint import Adjoint, Outcome, Task, must_tape, plain_solve, taped_outcome
from .adjoint_checkpoint import CheckpointedTrajectory
from .function import Cotangents, Solve
from .mesh import PickBars
from .method import Carry
from .problem import Keeper
from .pullback import Backward, RecordedPullback
from .reversible import Point, Reversible, ReversibleMethod
from .tape import Sums, Tape
from .tracer import Tracer


class ReversibleTrajectory(Adjoint):
    """`ReversibleAdjoint` for a trajectory: every step is undone, recorded again from where it began, and pulled back.

    Two states are kept, the first and the last, and one more for every jump of the field and for every sample that
    ends before the others. Where `Reversible(base)` cannot be kept stable by any step, as on stiff problems, `base`
    solves them, differentiated from checkpoints, and a warning says so.
    """

    def __init__(self, knobs: ReversibleAdjoint) -> None:
        self.knobs = knobs

    def solve(self, task: Task) -> Outcome:
        """Find the steps, keeping where they end."""
        method = task.problem.method
        if not isinstance(method, ReversibleMethod):
            raise ValueError(
                f"ReversibleAdjoint needs a reversible method, got solver={method!r}: choose ReversibleHeun(), "
                "AsynchronousLeapfrog(), Reversible(...) around an explicit Runge-Kutta method, or a symplectic one."
            )
        if must_tape():
            return taped_outcome(task)
        wanted = torch.is_grad_enabled()
        outcome = _Reversed(task, method, self.knobs).outcome() if wanted else plain_solve(task)
        if not isinstance(method, Reversible):
            return outcome
        lost = outcome.run.status == Status.STEP_UNDERFLOW
        if not any_true(lost):
            return outcome
        sample = int(lost.int().argmax())
        warn_caller(
            f"solve_ode: the two states of {method!r} drifted apart in {int(lost.sum())} of {len(lost)} samples, in "
            f"sample {sample} before t = {float(outcome.run.reached[sample]):.6g}: a reversible method damps too "
            f"little for this field. Falling back to {method.base!r} with CheckpointAdjoint(), whose memory grows "
            "with the square root of the number of steps.",
            AdjointWarning,
        )
        stable = dataclasses.replace(task, problem=dataclasses.replace(task.problem, method=method.base))
        return CheckpointedTrajectory(CheckpointAdjoint()).solve(stable)


class _Ends(Keeper):
    """Keeps the states that cannot be reconstructed: the first, the last, and those that a step did not start from."""

    def __init__(self) -> None:
        super().__init__(None)
        self.last: tuple[Tensor, Carry] | None = None

    def offer(self, index: int, y: Tensor, carry: Carry, breaks: bool = False) -> None:
        if index == 0 or breaks:
            self.kept.append((index, y, carry))

    def close(self, y: Tensor, carry: Carry) -> None:
        self.last = (y, carry)


class _Reversed(Solve):
    """One solve."""

    recomputes = True

    def __init__(self, task: Task, method: ReversibleMethod, knobs: ReversibleAdjoint) -> None:
        super().__init__(task)
        self.method, self.keeper = method, _Ends()
        self.drift = torch.finfo(task.problem.y0.dtype).eps ** 0.5 if knobs.drift is None else knobs.drift

    def forward(self) -> tuple[Tensor, ...]:
        run = self.task.run(self.keeper)
        self.run = dataclasses.replace(run, dense=None)
        results = (run.y, run.dense)
        return tuple(x.detach() for x in results if x is not None)

    def backward(self, bars: tuple[Tensor, ...]) -> Cotangents:
        assert self.run is not None and self.keeper.last is not None
        steps, sums, calls = self.run.mesh.steps, Sums(self.shared, self.externals), self.inner.calls
        walk = _Walk(self, sums, self.keeper.last, bars)
        drift, stop = _Drift(bars[0]), len(steps)
        for first, y, carry in reversed(self.keeper.kept):
            for index in reversed(range(first + 1, stop)):
                walk.back(index)
                drift.weigh(walk.bar.y)
            if first < stop:
                replace = steps[first].replace
                drift.measure(walk.start(first), y if replace is None else y.index_select(0, replace))
                walk.back_to(first, (y, carry))
                drift.weigh(walk.bar.y, kept=True)
            stop, walk.at = first, (y, carry)
        drift.check(self.drift)
        bar = walk.bar
        return Cotangents(bar.t, bar.end, bar.y, sums.totals, self.inner.calls - calls, len(steps))


class _Walk:
    """Goes back through the steps with the states and their cotangents.

    Attributes:
        at: the state and carry that it has reached.
        bar: the cotangents there.
    """

    def __init__(self, solve: _Reversed, sums: Sums, last: Point, bars: tuple[Tensor, ...]) -> None:
        assert solve.run is not None
        self._method, self._rhs, self._steps, self._timed = solve.method, solve.inner, solve.run.mesh.steps, solve.timed
        mesh, tape = solve.run.mesh, Tape(solve.inner, sums, solve.timed)
        self._own = mesh.own
        self._pullback = RecordedPullback(solve.method, tape, mesh, PickBars(mesh, _second(bars)), solve.ends)
        self._record = Tracer(sums)
        self._memory: Any = None
        self._trace: Any = None
        self.at, self.bar = last, Backward(bars[0])

    def back(self, index: int) -> None:
        """Through step `index`, to where it is reconstructed to begin."""
        taken, (_, carry) = self._steps[index], self.at
        if not taken.dense and not self._timed and taken.waits is None:
            known = self.bar.carry or (None,) * len(carry)
            carry_bar = tuple(torch.zeros_like(part) if bar is None else bar for part, bar in zip(carry, known))
            bar = self.bar.y, carry_bar
            self._rhs.stand_in(taken.rows, self._own)
            found = self._method.retrace(self._rhs, taken.t, taken.h, self.at, bar, self._record, self._trace)
            if found is not None:
                self.at, (self.bar.y, self.bar.carry), self._trace = found
                return
        self.back_to(index, self.start(index))

    def start(self, index: int) -> Point:
        """Where step `index` began that ended here."""
        taken, (y, carry) = self._steps[index], self.at
        self._rhs.stand_in(taken.rows, self._own)
        with torch.no_grad():
            before, held, self._memory = self._method.undo(self._rhs, taken.t, y, taken.h, carry, self._memory)
        if taken.waits is None:
            return before, held
        stays = taken.waits.unsqueeze(-1)
        return torch.where(stays, y, before), tuple(torch.where(stays, old, new) for new, old in zip(held, carry))

    def back_to(self, index: int, start: Point) -> None:
        """Through step `index`, which began at `start`."""
        self._pullback.pull(range(index, index + 1), *start, self.bar)
        self.at, self._trace = start, None


def _second(bars: tuple[Tensor, ...]) -> Tensor | None:
    return bars[1] if len(bars) > 1 else None


class _Drift:
    """How far reconstructed states are from those that were kept, and how much of the gradient feels it."""

    def __init__(self, bar: Tensor) -> None:
        """`bar` is the cotangent of the last state (batch, n)."""
        self._heaviest = norms(bar)
        self._errors: list[Tensor] = []
        self._weights: list[Tensor] = []

    def measure(self, point: Point, known: Tensor) -> None:
        """Compare a reconstructed state with the one that was kept; no error is measured where that is broken."""
        found, _ = point
        error = norms(found - known) / norms(known).clamp_min(1.0)
        healthy = known.isfinite().all(dim=1)
        self._errors.append(torch.where(healthy, error.nan_to_num(nan=torch.inf), 0.0))

    def weigh(self, bar: Tensor, kept: bool = False) -> None:
        """Note the size of the cotangent of a state, and whether the state is one that was kept."""
        size = norms(bar)
        self._heaviest = torch.maximum(self._heaviest, size)
        if kept:
            self._weights.append(size)

    def check(self, limit: float) -> None:
        """Warn where a reconstruction is off by more than `limit`, weighed by the share of the gradient there."""
        if not self._errors:
            return
        share = torch.stack(self._weights) / self._heaviest.clamp_min(torch.finfo(self._heaviest.dtype).tiny)
        error = torch.where(share > 0, share * torch.stack(self._errors), 0.0).amax(0)
        if bool((error > limit).any()):
            worst = int(error.argmax())
            warnings.warn(
                f"ReversibleAdjoint: the reconstruction of sample {worst} has drifted by {float(error[worst]):.3g}, "
                "weighed by the gradient there, and the gradient is no more exact than that. Compute in float64, take "
                "fewer steps, choose a method whose steps back are more stable (a coupling of Reversible nearer to "
                "1), or CheckpointAdjoint().",
                AdjointWarning,
                stacklevel=2,
            )
