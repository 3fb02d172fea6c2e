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
from .mesh import take
from .method import Method, Rhs
from .problem import Problem, Tolerance
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
    inside: list[Tensor] = []
    if problem.times.count > 2 and outcome.dense is not None:
        picks, places = run.mesh.picks, run.places
        if isinstance(picks, Tensor):
            steps = picks.gather(0, places)
            coefficients = take(outcome.dense, places) if problem.dense else outcome.dense
        else:
            steps = torch.tensor(picks, device=places.device)[places]
            coefficients = outcome.dense[places]
        t, h = run.mesh.all_times(steps, task.start, task.end)
        given = problem.times.given.double()
        inner = given[1:-1] if given.ndim == 1 else given[:, 1:-1].T
        inner = inner.unsqueeze(-1) if inner.ndim < t.ndim else inner
        theta = (inner - t) / h
        inside = [polynomial(coefficients, theta)]
    return torch.cat([problem.y0.unsqueeze(0), *inside, outcome.y.unsqueeze(0)])
