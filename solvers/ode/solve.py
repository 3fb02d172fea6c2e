"""`solve_ode`: initial value problems of ordinary differential equations."""

from __future__ import annotations

import math
import numbers
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adjoint.shared import CheckpointAdjoint, ReversibleAdjoint
from ..options import check_integer, require, suggest
from ..solution import Stats, Status
from ..transforms import autocast_to, not_compiled, plain
from ..tree import StateError, StateSpec, flatten
from .adjoint import Adjoint, Outcome, Task
from .adjoint_checkpoint import CheckpointedTrajectory
from .adjoint_reversible import ReversibleTrajectory
from .control import Controller, PIDController
from .events import Event, EventInfo, assemble
from .explicit import Tsit5
from .interpolation import Interpolation, polynomial
from .mesh import take
from .method import Method, Rhs
from .problem import Problem, Tolerance
from .solution import ODESolution, Trouble
from .times import read_times

T = TypeVar("T")


@not_compiled
def solve_ode(
    field: Callable[..., T],
    y0: T,
    t: Tensor | Sequence[float | int],
    args: tuple[Any, ...] = (),
    *,
    solver: Method | None = None,
    controller: Controller | None = None,
    adjoint: Adjoint | CheckpointAdjoint | ReversibleAdjoint | None = None,
    rtol: float | int = 1e-5,
    atol: float | int = 1e-7,
    max_steps: int = 10_000,
    events: Event | Sequence[Event] | None = None,
    quadrature: Sequence[int | str] = (),
    dense: bool = False,
    compile: bool = False,
    throw: bool | str = True,
) -> ODESolution[T]:
    """Solve dy/dt = field(t, y, *args) from y0 at t[0] through t[-1].

    Args:
        field: dy/dt, of the structure, shapes and dtypes of y. The time it is given is 0-dim where the batch takes
            its steps together, and (batch,) with steps per sample, always in the state's real dtype. It must be a
            function of its arguments and of what it closes over: derivatives with respect to all of these are found.
        y0: initial state: a tensor or a tuple, list or dict of tensors, real or complex, whose first dimension is the
            batch.
        t: output times, strictly monotone in either direction: (T,), or (batch, T) for times of every sample's own,
            which then takes its own steps; or a sequence of numbers such as (t0, t1).
        args: further arguments of the field.
        solver: the integrator; Tsit5() by default. Choose an implicit one for stiff problems, Dopri8() for high
            accuracy.
        controller: of the steps; `PIDController()` by default, `ConstantController(dt=...)` for steps of one length,
            which methods without an error estimate need. Its `per_sample=True` gives every sample its own steps.
        adjoint: how the solution is differentiated; `CheckpointAdjoint()` by default.
        rtol, atol: a step's error is kept below atol + rtol |y|, root mean square over the batch, or over each sample
            with steps of its own. Where |y| grows until that is finer than the state's dtype resolves, no step is short
            enough, and the sample fails.
        max_steps: a budget of accepted and rejected steps together.
        events: what to look out for on the way, and what ends samples early: see `Event`.
        quadrature: keys or indices of parts of the state that take no part in step control, such as integrals along
            the solution.
        dense: keep the dense output of every step: `solution.interpolation` then evaluates the solution at any time.
        compile: solve by a program that is compiled at the first call and kept for later ones with tensors of the same
            shapes. The steps and their exact derivative are the same. It takes an explicit Runge-Kutta method with one
            step for the batch; the field's Python code runs when it is compiled, no more in every evaluation.
        throw: True raises where a sample failed, "warn" warns, False leaves it to `solution.stats.status`.

    Returns:
        The solution. Its `value` has the output times stacked in front: (T, batch, ...) per tensor.

    Raises:
        SolverError: a sample failed and `throw` is True; the message names t, the step and the worst component.
        StateError: y0 is no state, or the field returns something else than a state like y.
        TimeError: times that are not finite, not strictly monotone, or of the wrong shape, dtype or device.
        ValueError: tolerances that are negative, both zero, or finer than the state's dtype resolves; a method without
            error estimate and no ConstantController; an unknown quadrature.
        TypeError: an unknown option, or a solver, controller or adjoint that is none.

    Warns:
        CompileWarning: a solve that was to be compiled is not; the message says why.
    """
    solver = Tsit5() if solver is None else solver
    controller = PIDController() if controller is None else controller
    require(solver, Method, "solver")
    require(controller, Controller, "controller")
    way = resolve_adjoint(CheckpointAdjoint() if adjoint is None else adjoint)
    matrix, spec = flatten(y0, "y0", allow_complex=True)
    if not matrix.shape[1]:
        raise StateError(f"y0: the samples are empty (shape {_shapes(spec, len(matrix))}); nothing is to be solved.")
    if compile:
        way = _compiled(way)
    max_steps = check_integer("", "max_steps", max_steps)
    _check_knobs(solver, controller, rtol, atol, args)
    eps = torch.finfo(matrix.dtype).eps if controller.adaptive else 0.0
    if controller.adaptive:
        _check_resolution(matrix, rtol, atol)
    problem = Problem(
        rhs=Rhs(field, args, spec, len(matrix)),
        y0=matrix,
        times=read_times(t, len(matrix), matrix.device),
        method=solver,
        controller=controller,
        tolerance=Tolerance(float(rtol), float(atol), controlled_columns(spec, quadrature), eps if rtol < eps else 0.0),
        max_steps=max_steps,
        dense=dense,
        events=_listed(events),
    )
    return finish(problem, way, throw)


def _shapes(spec: StateSpec, batch: int) -> str:
    return ", ".join(str((batch, *leaf.shape)) for leaf in spec.leaves)


def finish(problem: Problem, adjoint: Adjoint, throw: bool | str) -> ODESolution[Any]:
    """Solve a problem that has been checked."""
    with autocast_to(None, problem.y0.device):
        return _finish(problem, adjoint, throw)


def _finish(problem: Problem, adjoint: Adjoint, throw: bool | str) -> ODESolution[Any]:
    seen: list[weakref.ref[ODESolution]] = []

    def report(stats: Stats) -> None:
        solution = seen[0]() if seen else None
        if solution is not None:
            solution.adjoint_stats = stats

    task = Task(problem, report)
    outcome = adjoint.solve(task)
    run, spec = outcome.run, problem.rhs.spec
    stats = Stats(
        steps=run.accepted + run.rejected,
        evaluations=run.evaluations,
        residual=run.ratio,
        status=run.status,
        accepted=run.accepted,
        rejected=run.rejected,
    )
    info, info_y = _events(task, outcome)
    solution: ODESolution[Any] = ODESolution(
        spec.unflatten(_outputs(task, outcome, info, info_y)),
        stats,
        ts=problem.times.given,
        reached=run.reached,
        event=info,
        interpolation=_interpolation(task, outcome) if problem.dense else None,
        _trouble=Trouble(spec, run.step, run.component),
    )
    seen.append(weakref.ref(solution))
    solution.check(throw, "solve_ode")
    return solution


def resolve_adjoint(adjoint: Adjoint | CheckpointAdjoint | ReversibleAdjoint) -> Adjoint:
    """The way in which `adjoint` differentiates a trajectory.

    Raises:
        TypeError: it does not.
    """
    if isinstance(adjoint, CheckpointAdjoint):
        return CheckpointedTrajectory(adjoint)
    if isinstance(adjoint, ReversibleAdjoint):
        return ReversibleTrajectory(adjoint)
    require(adjoint, (Adjoint, CheckpointAdjoint, ReversibleAdjoint), "adjoint")
    assert isinstance(adjoint, Adjoint)
    return adjoint


def _compiled(way: Adjoint) -> Adjoint:
    # The compiler takes seconds to import.
    from .compiled.trajectory import CompiledTrajectory

    return CompiledTrajectory(way)


def controlled_columns(spec: StateSpec, quadrature: Sequence[int | str]) -> Tensor | None:
    """The matrix's columns outside of the state's parts named in `quadrature`; None for all.

    Raises:
        TypeError: no sequence of names.
        ValueError: a name that the state does not have, or no part left to control.
    """
    if isinstance(quadrature, str) or not isinstance(quadrature, Sequence):
        raise TypeError(
            f"quadrature must be a sequence of keys or indices such as ({quadrature!r},); got {quadrature!r}."
        )
    if not quadrature:
        return None
    if spec.single:
        raise ValueError(f"quadrature: the state has no part [{quadrature[0]!r}]; it is one tensor.")
    roots = {leaf.path.split("]")[0] + "]" for leaf in spec.leaves}
    names = {f"[{key!r}]" for key in quadrature}
    unknown = sorted(names - roots)
    if unknown:
        hint = suggest(unknown[0], sorted(roots))
        raise ValueError(
            f"quadrature: the state has no part {unknown[0]}.{hint} Its parts: {', '.join(sorted(roots))}."
        )
    keep: list[int] = []
    column = 0
    for leaf in spec.leaves:
        if leaf.path.split("]")[0] + "]" not in names:
            keep += range(column, column + leaf.size)
        column += leaf.size
    if not keep:
        raise ValueError("quadrature: some part of the state must be left for step control.")
    return torch.tensor(keep, device=spec.device)


def _check_knobs(solver: Method, controller: Controller, rtol: float, atol: float, args: object) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, (numbers.Real, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1):
            raise TypeError(f"{name} must be a number; got {value!r}.")
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf and rtol + atol > 0):
        raise ValueError(f"rtol and atol must not be negative, nor both zero; got rtol={rtol}, atol={atol}.")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple of the field's further arguments; got {type(args).__name__}.")
    if controller.adaptive and solver.error_order is None:
        raise ValueError(
            f"{type(solver).__name__} has no error estimate to control steps by: give "
            f"controller=ConstantController(dt=...), or choose an adaptive solver."
        )


def _check_resolution(y0: Tensor, rtol: float, atol: float) -> None:
    """Refuse tolerances that rounding alone exceeds."""
    eps = torch.finfo(y0.dtype).eps
    if rtol >= eps:
        return
    values = plain(y0.detach()).abs()
    size = float(values[values.isfinite()].max()) if bool(values.isfinite().any()) else 0.0
    if atol + rtol * size < eps * size:
        raise ValueError(
            f"rtol={rtol:g} and atol={atol:g} ask for more than {y0.dtype} resolves, {eps:.2g} of |y| = {size:.3g}: "
            f"loosen them or compute in float64."
        )


def _listed(events: Event | Sequence[Event] | None) -> tuple[Event, ...]:
    if events is not None and not isinstance(events, (Event, Sequence)):
        hint = f" Wrap the condition: Event({getattr(events, '__name__', 'condition')})." if callable(events) else ""
        raise TypeError(f"events must be an Event or a sequence of them; got {events!r}.{hint}")
    listed = () if events is None else (events,) if isinstance(events, Event) else tuple(events)
    for event in listed:
        require(event, Event, "events")
    return listed


def _events(task: Task, outcome: Outcome) -> tuple[EventInfo[Any] | None, Tensor | None]:
    """What happened, and the matrix at the events that ended samples."""
    problem, run = task.problem, outcome.run
    if not problem.events:
        return None, None

    def step(pick: int) -> tuple[Tensor, Tensor]:
        index = run.mesh.picks[pick]
        index = index if isinstance(index, Tensor) else torch.tensor([index], device=run.reached.device)
        t, h = run.mesh.all_times(index.unsqueeze(0) if len(index) > 1 else index, task.start, task.end)
        return t.reshape(-1).expand(problem.rhs.batch), h.reshape(-1).expand(problem.rhs.batch)

    return assemble(problem.events, problem.rhs, run.hits, outcome.dense, step)


def _outputs(task: Task, outcome: Outcome, info: EventInfo[Any] | None, at_event: Tensor | None) -> Tensor:
    """The matrices at all output times (T, batch, n)."""
    problem, run = task.problem, outcome.run
    inside: list[Tensor] = []
    if problem.times.count > 2:
        if outcome.dense is None:
            inside = [torch.full_like(outcome.y, math.nan).expand(problem.times.count - 2, -1, -1)]
        else:
            inside = [_between(task, outcome, outcome.dense)]
    value = torch.cat([problem.y0.unsqueeze(0), *inside, outcome.y.unsqueeze(0)])
    if bool((run.status == Status.CONVERGED).all()):
        return value
    times = problem.times.values.T if problem.times.per_sample else problem.times.values.unsqueeze(1)
    missing = ((times - run.reached) * (times[-1] - times[0]).sign() > 0).unsqueeze(-1)
    if info is None or at_event is None:
        return torch.where(missing, math.nan, value)
    return torch.where(missing, at_event, value)


def _between(task: Task, outcome: Outcome, dense: Tensor) -> Tensor:
    """The matrices at the inner output times."""
    mesh, places = outcome.run.mesh, outcome.run.places
    if isinstance(mesh.picks, Tensor):
        steps = mesh.picks.gather(0, places)
        coefficients = take(dense, places) if task.problem.dense else dense[: len(places)]
    else:
        steps = torch.tensor(mesh.picks, device=places.device)[places]
        coefficients = dense[places]
    t, h = mesh.all_times(steps, task.start, task.end)
    given = task.problem.times.given.double()
    inner = given[1:-1] if given.ndim == 1 else given[:, 1:-1].T
    inner = inner.unsqueeze(-1) if inner.ndim < t.ndim else inner
    return polynomial(coefficients, (inner - t) / torch.where(h == 0, 1.0, h))


def _interpolation(task: Task, outcome: Outcome) -> Interpolation | None:
    problem, run = task.problem, outcome.run
    if outcome.dense is None:
        return None
    batch = len(problem.y0)
    span = problem.times.values[..., 0].expand(batch), problem.times.values[..., -1].expand(batch)
    return Interpolation(problem.rhs.spec, run.mesh, outcome.dense, span, run.reached, (task.start, task.end))
