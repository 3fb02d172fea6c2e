"""How a trajectory becomes differentiable: the adjoint's interface, and the taped one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..options import options
from ..solution import Stats
from ..transforms import differentiated, inside_transform, no_derivatives
from .problem import Keeper, Problem, Run
from .replay import replay
from .sample_steps import SampleSteps
from .shared_steps import SharedSteps


@dataclasses.dataclass
class Task:
    """A problem, and what its adjoint needs beside it.

    Attributes:
        problem: with the caller's own y0 and args, which may require gradients.
        report: takes the statistics of the backward pass when it has run.
    """

    problem: Problem
    report: Callable[[Stats], None]

    @property
    def start(self) -> Tensor | None:
        """The first time, if a derivative with respect to it is wanted."""
        return self._time(0)

    @property
    def end(self) -> Tensor | None:
        """The last time, likewise."""
        return self._time(-1)

    def _time(self, index: int) -> Tensor | None:
        times = self.problem.times
        if not differentiated(times.given):
            return None
        time = times.given[..., index].double()
        return time.expand(len(self.problem.y0)) if self.problem.per_sample else time

    def run(self, keeper: Keeper | None = None) -> Run:
        """The solve itself, without derivatives."""
        with no_derivatives():
            driver = SampleSteps if self.problem.per_sample else SharedSteps
            return driver(self.problem, keeper).run()


@dataclasses.dataclass
class Outcome:
    """What an adjoint returns: what the driver found, its matrices now differentiable.

    Attributes:
        y: the final matrix (batch, n).
        dense: coefficients (slots, p + 1, batch, n), or None where no slot was asked for.
        run: the driver's own findings.
    """

    y: Tensor
    dense: Tensor | None
    run: Run


class Adjoint(abc.ABC):
    """A way to differentiate a trajectory. Subclasses are frozen option classes that hold knobs only."""

    @abc.abstractmethod
    def solve(self, task: Task) -> Outcome:
        """Solve, so that the outcome carries derivatives."""


def plain_solve(task: Task) -> Outcome:
    """Solve where no derivative is wanted."""
    run = task.run()
    return Outcome(run.y, run.dense, run)


def must_tape() -> bool:
    """Whether only recorded steps will do: inside torch.func transforms and under forward-mode differentiation."""
    return inside_transform() or torch.autograd.forward_ad._current_level >= 0


@options
class DirectAdjoint(Adjoint):
    """Derivatives of the accepted steps, recorded by autograd: exact, of any order, and within torch.func.

    The reference that the others are measured against. The steps are first found without recording, then recorded
    without the rejected ones. Memory grows with the number of steps and the field's own intermediates.

    Source: Chen et al. 2018, "Neural ordinary differential equations", who compare with it.
    """

    def solve(self, task: Task) -> Outcome:
        """Find the steps, then record them."""
        return taped_outcome(task) if must_tape() or torch.is_grad_enabled() else plain_solve(task)


def taped_outcome(task: Task) -> Outcome:
    """Find the steps, then record them."""
    return taped(task.problem, task.run(), task.start, task.end)


def taped(problem: Problem, run: Run, start: Tensor | None, end: Tensor | None) -> Outcome:
    """The accepted steps of `run` again, recorded, as functions of the ends of the solve where these are given."""
    mesh = run.mesh
    steps = range(len(mesh.steps))
    y, _, dense = replay(problem.method, problem.rhs, mesh, steps, problem.y0, (), start, end)
    return Outcome(y, mesh.gather(dense), run)
