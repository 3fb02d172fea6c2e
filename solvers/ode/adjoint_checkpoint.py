"""Exact derivatives of the accepted steps from a few kept states."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..adjoint.shared import CheckpointAdjoint
from ..solution import SolverError, Stats
from ..transforms import inside_transform
from .adjoint import Adjoint, Outcome, Task, plain_solve, taped, tensor_leaves, wants_derivatives
from .explicit import ExplicitRungeKutta
from .externals import Externals
from .mesh import PickBars
from .problem import Keeper, Run
from .pullback import Backward, ExplicitPullback, RecordedPullback, Sums, Tape
from .replay import replay


class CheckpointedTrajectory(Adjoint):
    """`CheckpointAdjoint` for a trajectory: the accepted steps are replayed segment by segment from kept states.

    Second derivatives are taken through one recording of all steps.
    """

    def __init__(self, knobs: CheckpointAdjoint) -> None:
        self.knobs = knobs

    def solve(self, task: Task) -> Outcome:
        """Find the steps, keeping some states."""
        if inside_transform() or torch.autograd.forward_ad._current_level >= 0:
            return taped(task, task.run())
        if not wants_derivatives(task.problem):
            return plain_solve(task)
        solve = Checkpointed(task, self.knobs)
        if not solve.wanted:
            return plain_solve(task)
        tensors = _Solve.apply(solve, *solve.inputs)
        assert solve.run is not None
        return Outcome(tensors[0], tensors[1] if len(tensors) > 1 else None, solve.run)


class Checkpointed:
    """One solve: what its backward pass needs to know.

    Attributes:
        inputs: start and end time, y0, the tensors of args and those that the field closes over.
    """

    def __init__(self, task: Task, knobs: CheckpointAdjoint) -> None:
        problem = task.problem
        self.task, self.problem, self.knobs = task, problem, knobs
        self.autocast = _autocast_state(problem.y0.device.type)
        self.args = tensor_leaves(problem.rhs.args)
        self.cut = cut_args(problem.rhs.args)
        self.inner = problem.rhs.with_args(self.cut)
        self.run: Run | None = None
        self.keeper = Keeper(1 if knobs.recursive else knobs.segments)
        t0 = problem.times.values[..., 0]
        with torch.enable_grad():
            y = problem.y0.detach().requires_grad_()
            first: list[Tensor] = [y, *tensor_leaves(self.cut)]
            start = float(t0) if t0.ndim == 0 else t0
            self.externals = Externals(lambda: self.inner(start, y), problem.rhs.field, first)
        ends = [x for x in (task.start, task.end) if x is not None]
        self.timed = bool(ends)
        self.inputs = [*ends, problem.y0, *self.args, *self.externals.tensors]
        self.wanted = any(x.requires_grad for x in self.inputs)

    def forward(self) -> tuple[Tensor, ...]:
        """Find the steps."""
        self.run = run = self.task.run(self.keeper)
        return (run.y,) if run.dense is None else (run.y, run.dense)

    def backward(self, y_bar: Tensor, slots: Tensor | None) -> list[Tensor | None]:
        """Cotangents of `inputs`."""
        run = self.run
        assert run is not None
        shared = [*tensor_leaves(self.cut), *self.externals.tensors]
        sums = Sums(shared, self.externals)
        tape = Tape(self.inner, sums, self.timed)
        bar = Backward(y_bar)
        if isinstance(self.problem.method, ExplicitRungeKutta):
            pullback: Any = ExplicitPullback(self.problem.method, tape, run.mesh, PickBars(run.mesh, slots))
        else:
            ends = (self.task.start, self.task.end)
            pullback = RecordedPullback(self.problem.method, tape, run.mesh, PickBars(run.mesh, slots), ends)
        with self.autocast():
            stop, after = len(run.mesh.steps), run.y
            for first, y, carry in reversed(self.keeper.kept):
                self._pull(pullback, first, stop, y, carry, bar, after)
                stop, after = first, y
        ends_bar = []
        if self.task.start is not None:
            ends_bar.append(bar.t)
        if self.task.end is not None:
            ends_bar.append(bar.end)
        self.task.backward.append(_stats(run, sums.evaluations))
        return [*ends_bar, bar.y, *sums.totals]

    def _pull(self, pullback: Any, first: int, stop: int, y: Tensor, carry: Any, bar: Backward, after: Tensor) -> None:
        """One segment; with `recursive` its second half first, from a state computed on the way."""
        if self.knobs.recursive and stop - first > 1:
            middle = (first + stop) // 2
            with torch.no_grad():
                there, held, _ = replay(self.problem.method, self.inner, self.run.mesh, range(first, middle), y, carry)
            self._pull(pullback, middle, stop, there, held, bar, after)
            self._pull(pullback, first, middle, y, carry, bar, there)
            return
        found = pullback.pull(range(first, stop), y, carry, bar)
        _check_repeats(found, after)

    def recorded(self, y_bar: Tensor, slots: Tensor | None) -> list[Tensor | None]:
        """Cotangents of `inputs`, themselves differentiable."""
        raise NotImplementedError


def _check_repeats(found: Tensor, expected: Tensor) -> None:
    """The replay must meet the kept states."""
    slack = math.sqrt(torch.finfo(found.dtype).eps)
    if not torch.allclose(found, expected, rtol=slack, atol=slack, equal_nan=True):
        raise SolverError(
            "solve_ode: the field gave other values when the accepted steps were repeated for the backward pass, so "
            "gradients would be wrong. It must be a function of t, y and args alone: fix its noise within a solve, and "
            "do not let it change state."
        )


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: Checkpointed, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        ctx.save_for_backward(*inputs)
        return solve.forward()

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor, slots: Tensor | None = None) -> Any:
        # Unpacking raises where an input was changed in place since.
        _ = ctx.saved_tensors
        solve = ctx.solve
        bars = solve.recorded(y_bar, slots) if torch.is_grad_enabled() else solve.backward(y_bar, slots)
        return (None, *bars)


def cut_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with tensors that require a gradient replaced by leaves of the same value."""

    def cut(leaf: Any) -> Any:
        wants = isinstance(leaf, Tensor) and leaf.requires_grad
        return leaf.detach().requires_grad_() if wants else leaf

    return pytree.tree_map(cut, args)


def _autocast_state(device: str) -> Any:
    """A factory of contexts that restore today's autocast."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)


def _stats(run: Run, evaluations: int) -> Stats:
    steps = torch.full_like(run.accepted, len(run.mesh.steps))
    return Stats(
        steps=steps,
        evaluations=torch.full_like(steps, evaluations),
        residual=torch.zeros_like(run.ratio),
        status=torch.zeros_like(run.status),
        accepted=steps,
        rejected=torch.zeros_like(steps),
    )
