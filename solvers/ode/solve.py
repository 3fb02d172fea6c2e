"""`solve_ode`: initial value problems of ordinary differential equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adjoint.shared import CheckpointAdjoint
from ..options import require
from ..solution import Solution, Stats
from ..tree import flatten
from .adjoint import Adjoint, Outcome, Task
from .adjoint_checkpoint import CheckpointedTrajectory
from .control import Controller, PIDController
from .explicit import Tsit5
from .interpolation import polynomial
from .method import Method, Rhs
from .problem import Problem, Tolerance
from .replay import Clock
from .times import read_times

T = TypeVar("T")


@dataclasses.dataclass
class ODESolution(Solution[T]):
    """A trajectory.

    Attributes:
        value: the state at the output times, which are stacked in front: (T, batch, ...).
        ts: the output times, (T,) or (batch, T).
    """

    ts: Tensor = dataclasses.field(kw_only=True)
    _backward: list[Stats] = dataclasses.field(kw_only=True, repr=False)


def solve_ode(
    field: Callable[..., T],
    y0: T,
    t: Tensor | Sequence[float],
    args: tuple[Any, ...] = (),
    *,
    solver: Method | None = None,
    controller: Controller | None = None,
    adjoint: Adjoint | CheckpointAdjoint | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    max_steps: int = 10_000,
    throw: bool | str = True,
) -> ODESolution[T]:
    """Solve dy/dt = field(t, y, *args) from y0 at t[0] to t[-1]."""
    solver = Tsit5() if solver is None else solver
    controller = PIDController() if controller is None else controller
    adjoint = CheckpointAdjoint() if adjoint is None else adjoint
    require(solver, Method, "solver")
    require(controller, Controller, "controller")
    matrix, spec = flatten(y0, "y0", allow_complex=True)
    times = read_times(t, len(matrix), matrix.device, spec.dtype)
    rhs = Rhs(field, args, spec, len(matrix))
    problem = Problem(rhs, matrix, times, solver, controller, Tolerance(rtol, atol), max_steps)
    backward: list[Stats] = []
    task = Task(problem, backward)
    way = CheckpointedTrajectory(adjoint) if isinstance(adjoint, CheckpointAdjoint) else adjoint
    outcome = way.solve(task)
    run = outcome.run
    stats = Stats(
        steps=run.accepted + run.rejected,
        evaluations=run.evaluations,
        residual=run.ratio,
        status=run.status,
        accepted=run.accepted,
        rejected=run.rejected,
    )
    solution = ODESolution(spec.unflatten(_outputs(task, outcome)), stats, ts=times.given, _backward=backward)
    solution.check(throw, "solve_ode")
    return solution


def _outputs(task: Task, outcome: Outcome) -> Tensor:
    """The matrices at all output times (T, batch, n)."""
    problem, run = task.problem, outcome.run
    ends = [problem.y0.unsqueeze(0), outcome.y.unsqueeze(0)]
    if problem.times.count == 2:
        return torch.cat(ends)
    assert outcome.dense is not None
    clock = Clock(run.mesh, task.start, task.end)
    device = problem.y0.device
    slots = [(i, taken) for i, taken in enumerate(run.mesh) if taken.slot >= 0]
    listed = problem.times.listed
    which, k = [], 0
    sign = 1.0 if listed[-1] > listed[0] else -1.0
    for t in listed[1:-1]:
        while (t - (slots[k][1].t + slots[k][1].h)) * sign > 0 and k + 1 < len(slots):
            k += 1
        which.append(k)
    starts, lengths = zip(*(clock.at(i, taken) for i, taken in slots))
    start, length = _stack(starts, device), _stack(lengths, device)
    index = torch.tensor(which, device=device)
    inner = problem.times.given[1:-1].double()
    theta = (inner - start[index]) / length[index]
    return torch.cat([ends[0], polynomial(outcome.dense[index], theta), ends[1]])


def _stack(times: Sequence[Any], device: torch.device) -> Tensor:
    if any(isinstance(t, Tensor) for t in times):
        return torch.stack([torch.as_tensor(t, dtype=torch.float64, device=device) for t in times])
    return torch.tensor(times, dtype=torch.float64, device=device)
