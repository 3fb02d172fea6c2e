"""Exact derivatives of the steps of a reversible method, whose states are reconstructed and not kept."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from ..adjoint.shared import ReversibleAdjoint
from ..solution import AdjointWarning
from ..tree import norms
from .adjoint import Adjoint, Outcome, Task, must_tape, plain_solve, taped_outcome
from .function import Cotangents, Solve
from .mesh import PickBars
from .method import Carry
from .problem import Keeper
from .pullback import Backward, RecordedPullback, Sums, Tape
from .reversible import ReversibleMethod


class ReversibleTrajectory(Adjoint):
    """`ReversibleAdjoint` for a trajectory: every step is undone, recorded again from where it began, and pulled back.

    Two states are kept, the first and the last, and one more for every jump of the field and for every sample that
    ends before the others.
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
        if not torch.is_grad_enabled():
            return plain_solve(task)
        return _Reversed(task, method, self.knobs).outcome()


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
        mesh, rhs = self.run.mesh, self.inner
        sums = Sums(self.shared, self.externals)
        picks = PickBars(mesh, bars[1] if len(bars) > 1 else None)
        pullback = RecordedPullback(self.method, Tape(rhs, sums, self.timed), mesh, picks, self.ends)
        bar, drift = Backward(bars[0]), _Drift(bars[0])
        stop, (y, carry), memory, calls = len(mesh.steps), self.keeper.last, None, rhs.calls
        for first, start, held in reversed(self.keeper.kept):
            for index in reversed(range(first, stop)):
                taken = mesh.steps[index]
                with torch.no_grad():
                    before, held_before, memory = self.method.undo(rhs, taken.t, y, taken.h, carry, memory)
                    y, carry = _unless(taken.waits, (before, held_before), (y, carry))
                if index == first:
                    known = start if taken.replace is None else start.index_select(0, taken.replace)
                    drift.measure(y, known)
                    y, carry = start, held
                pullback.pull(range(index, index + 1), y, carry, bar)
                drift.weigh(bar.y, index == first)
            stop = first
        drift.check(self.drift)
        return Cotangents(bar.t, bar.end, bar.y, sums.totals, rhs.calls - calls, len(mesh.steps))


def _unless(waits: Tensor | None, moved: tuple[Tensor, Carry], still: tuple[Tensor, Carry]) -> tuple[Tensor, Carry]:
    """State and carry `moved`, but `still` for samples that wait."""
    if waits is None:
        return moved
    rows = waits.unsqueeze(-1)
    carry = tuple(torch.where(rows, old, new) for new, old in zip(moved[1], still[1]))
    return torch.where(rows, still[0], moved[0]), carry


class _Drift:
    """How far reconstructed states are from those that were kept, and how much of the gradient feels it."""

    def __init__(self, bar: Tensor) -> None:
        """`bar` is the cotangent of the last state (batch, n)."""
        self._heaviest = norms(bar)
        self._errors: list[Tensor] = []
        self._weights: list[Tensor] = []

    def measure(self, found: Tensor, known: Tensor) -> None:
        """Compare a reconstructed state with the one that was kept; no error is measured where that is broken."""
        error = norms(found - known) / norms(known).clamp_min(1.0)
        healthy = known.isfinite().all(dim=1)
        self._errors.append(torch.where(healthy, error.nan_to_num(nan=torch.inf), 0.0))

    def weigh(self, bar: Tensor, kept: bool) -> None:
        """Note the size of the cotangent of a state, and whether the state was one that is kept."""
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
