"""The problem function of smooth minimisation, free or under equality constraints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adjoint.implicit import ImplicitAdjoint
from ..fixed_point import Newton, root
from ..linear import CG, LU, Auto
from ..options import require
from ..solution import Solution, Stats, Status
from ..transforms import any_true, autocast_to, autocast_type, no_derivatives, not_compiled, plain
from ..tree import StateError, flatten, norms
from .descent import descend
from .energy import Energy, value_without
from .minimize_methods import LBFGS, Minimizer
from .quadratic import make_limits
from .quadratic_problem import Limits

ALREADY = 1e30
"""A relative tolerance that every point meets: `root` takes it for the solution, and only differentiates it."""

OUTER = 30
"""The largest number of augmented Lagrangians under equality constraints."""


@dataclasses.dataclass
class Minimum(Solution[Any]):
    """The result of `minimize`; `value` is the minimiser.

    Attributes:
        energy: at the minimiser (batch,), differentiable.
        multipliers: of the equality constraints (batch, p), differentiable; None without any.
    """

    energy: Tensor = dataclasses.field(kw_only=True)
    multipliers: Tensor | None = dataclasses.field(kw_only=True, default=None)


@not_compiled
def minimize(
    energy: Callable[..., Tensor],
    y0: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    equality: Callable[..., Tensor] | None = None,
    solver: Minimizer | None = None,
    adjoint: ImplicitAdjoint | None = None,
    rtol: float = 1e-8,
    atol: float = 0.0,
    max_steps: int = 500,
    throw: bool | str = False,
) -> Minimum:
    """Find a local minimum of a smooth energy for every sample of a batch, differentiably.

    The derivative is that of the stationary point, dE/dy = 0, by the implicit function theorem, in whatever the energy
    uses: arguments, closures, module parameters. It does not depend on the method, nor on y0: through a converged
    minimum, nothing can be learnt about where to start. With `equality`, it is that of the Lagrangian's stationary
    point: a declarative node. Samples stop one by one and are then frozen.

    Args:
        energy: takes the state and `args`, returns one number a sample (batch,).
        y0: initial value: a tensor, or a tuple, list or dict of tensors, (batch, ...) each.
        args: passed on to `energy` and `equality`.
        equality: h with h(y, *args) = 0 at the minimum, (batch, p), or None. Its derivatives must be independent.
        solver: None takes `LBFGS()`.
        adjoint: None takes `ImplicitAdjoint` with LU for small states and CG for large ones, whose Hessian is positive
            definite; under constraints with its own default. `order=2` gives second derivatives.
        rtol: a sample has converged where |dE/dy| <= atol + rtol max(|y|, |dE/dy| at y0); with constraints, dE/dy is
            the Lagrangian's, beside h.
        atol: see rtol.
        max_steps: the largest number of steps.
        throw: raise `SolverError` if some sample does not converge; "warn" warns instead.

    Returns:
        The `Minimum`. A sample whose energy falls to minus infinity is UNBOUNDED, one whose line search fails is
        STAGNATED.

    Raises:
        StateError: y0, or what `energy` or `equality` returns, does not fit.
        TypeError: `solver` or `adjoint` is not one.
        ValueError: a tolerance is negative, `max_steps` below one.
        SolverError: see `throw`; and in backward, where the Hessian is singular.

    Source: Domke 2012 and Gould, Hartley and Campbell 2021, Deep declarative networks (the derivatives).
    """
    solver = LBFGS() if solver is None else solver
    require(solver, Minimizer, "solver")
    if adjoint is None:
        adjoint = ImplicitAdjoint() if equality is not None else ImplicitAdjoint(Auto(dense=LU(), iterative=CG()))
    require(adjoint, ImplicitAdjoint, "adjoint")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of what follows the state; got {type(args).__name__}.")
    limits = make_limits(rtol, atol, max_steps)
    matrix, spec = flatten(y0, "y0")
    if spec.size == 0:
        raise StateError("y0: a sample of the initial value holds no numbers.")
    problem = Energy(energy, tuple(args), spec, autocast_type(matrix.device))
    with autocast_to(None, matrix.device):
        if equality is None:
            with no_derivatives():
                found, stats = descend(problem, matrix.detach(), solver, limits, atol)
            y = _attach(lambda y, *a: dataclasses.replace(problem, args=a).slope(y), found, problem.args, adjoint)
            multipliers = None
        else:
            y, multipliers, stats = _constrained(problem, equality, matrix, solver, adjoint, limits, atol)
        value = value_without(problem, y, plain(stats.status) == int(Status.NON_FINITE))
    solution = Minimum(spec.unflatten(y), stats, energy=value, multipliers=multipliers)
    solution.check(throw, "minimize")
    return solution


def _attach(function: Callable[..., Any], point: Any, args: tuple[Any, ...], adjoint: ImplicitAdjoint) -> Any:
    """The point, found by other means, as a root of the function, with derivatives."""
    return root(function, point, args, solver=Newton(), adjoint=adjoint, rtol=ALREADY, max_steps=1).value


def _constrained(
    problem: Energy, equality: Callable[..., Tensor], y: Tensor, solver: Minimizer, adjoint: ImplicitAdjoint,
    limits: Limits, atol: float,
) -> tuple[Tensor, Tensor, Stats]:  # fmt: skip
    """A minimum of the augmented Lagrangian, and from there Newton's method on the equations of the Lagrangian."""

    def constraint(state: Any, *args: Any) -> Tensor:
        value = equality(state, *args)
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != len(y):
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StateError(f"equality(y): expected a tensor of shape (batch, p) = ({len(y)}, p), got {what}.")
        return value.to(y.dtype)

    def lagrangian(state: Any, multipliers: Tensor, *args: Any) -> Tensor:
        return problem.function(state, *args) + (multipliers * constraint(state, *args)).sum(1)

    def stationarity(point: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        y, multipliers = point
        slope = dataclasses.replace(problem, function=lagrangian, args=(multipliers, *args)).slope(y)
        with autocast_to(problem.autocast, y.device):
            return slope, constraint(problem.spec.unflatten(y), *args)

    with no_derivatives():
        y = y.detach()
        start = constraint(problem.spec.unflatten(y), *problem.args)
        y, multipliers, spent = _augmented(problem, lagrangian, constraint, y, torch.zeros_like(start), solver, limits)
    solution = root(
        stationarity, (y, multipliers), problem.args, solver=Newton(), adjoint=adjoint, rtol=limits.rtol, atol=atol,
        max_steps=50,
    )  # fmt: skip
    stats = dataclasses.replace(
        solution.stats, steps=solution.stats.steps + spent.steps,
        evaluations=solution.stats.evaluations + spent.evaluations,
    )  # fmt: skip
    return *solution.value, stats


def _augmented(
    problem: Energy, lagrangian: Callable[..., Tensor], constraint: Callable[..., Tensor], y: Tensor,
    multipliers: Tensor, solver: Minimizer, limits: Limits,
) -> tuple[Tensor, Tensor, Stats]:  # fmt: skip
    """Lagrangians with a growing penalty, until the constraints nearly hold."""
    penalty = torch.ones_like(y[:, :1])
    loose = dataclasses.replace(limits, rtol=max(limits.rtol, 1e-4))
    before = norms(constraint(problem.spec.unflatten(y), *problem.args))
    steps = torch.zeros_like(before, dtype=torch.int64)
    stats = Stats(steps, steps, before, steps)
    for _ in range(OUTER):

        def augmented(state: Any, multipliers: Tensor, penalty: Tensor, *args: Any) -> Tensor:
            return lagrangian(state, multipliers, *args) + (penalty / 2 * constraint(state, *args).square()).sum(1)

        inner = dataclasses.replace(problem, function=augmented, args=(multipliers, penalty, *problem.args))
        y, spent = descend(inner, y, solver, loose, 0.0)
        steps, evaluations = stats.steps + spent.steps, stats.evaluations + spent.evaluations
        stats = dataclasses.replace(spent, steps=steps, evaluations=evaluations)
        value = constraint(problem.spec.unflatten(y), *problem.args)
        violation = norms(value)
        multipliers = multipliers + penalty * value
        if not any_true(violation > 1e-5 * (1 + norms(y))):
            break
        penalty = torch.where((violation > 0.25 * before).unsqueeze(1), 10 * penalty, penalty)
        before = violation
    return y, multipliers, stats
