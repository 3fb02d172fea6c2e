"""The problem functions: fixed_point and root."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..adjoint.base import Adjoint, Task
from ..adjoint.implicit import ImplicitAdjoint
from ..adjoint.reversible import ReversibleSteps
from ..adjoint.shared import CheckpointAdjoint, ReversibleAdjoint
from ..adjoint.taped import CheckpointedSteps
from ..options import check_integer, check_real, require, spelled
from ..solution import Solution, Stats, check_throw
from ..transforms import autocast_to, autocast_type, not_compiled
from ..tree import StateError, flatten
from .anderson import Anderson
from .broyden import Broyden
from .driver import Budget, stats_of
from .method import FixedPointSolver
from .newton import Newton
from .problem import Problem

AnyAdjoint = Adjoint | CheckpointAdjoint | ReversibleAdjoint


@not_compiled
@spelled
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    solver: FixedPointSolver | None = None,
    adjoint: AnyAdjoint | None = None,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_steps: int = 50,
    throw: bool | str = False,
    trajectory: bool = False,
) -> Solution[Any]:
    """Find z = f(z, *args) for every sample of a batch, differentiably.

    Samples stop one by one. A sample that has converged or broken is frozen and touches no other; where every tensor
    in `args` has the batch in front, finished samples are taken out and cost no further evaluation. What `f` closes
    over is shared by all samples, and then rows are only frozen. A broken sample is kept out of the others'
    gradients, too, but for one case: a NaN in what `f` closes over, which cannot be replaced, reaches the parameters in
    `f`. So pass through `args` what belongs to single samples.

    The steps depend on the data, so torch.compile leaves the solve alone: compile `f`, and the model around it.

    Args:
        f: takes the state and `args`, returns a state of the same structure, shapes, dtypes and device.
        z0: initial value: a tensor, or a tuple, list or dict of tensors, (batch, ...) each; or an earlier
            `Solution`, whose value is taken over, and of `Broyden`, where the solver is the same, its inverse too.
        args: passed on to `f`; gradients flow to them, and to whatever else `f` uses.
        solver: the method; None takes `Anderson()`, or what the adjoint needs.
        adjoint: how the result is differentiated; None takes `ImplicitAdjoint()`.
        rtol: a sample has converged where |f(z) - z| <= atol + rtol |f(z)|, Euclidean norms over the whole sample.
        atol: see rtol. With rtol = atol = 0, exactly `max_steps` steps are taken.
        max_steps: the largest number of steps.
        throw: raise `SolverError` if some sample does not converge; "warn" warns instead.
        trajectory: return every iterate in `Solution.trajectory`, (steps + 1, batch, ...).

    Returns:
        The `Solution`. A converged sample's value is the iterate whose residual was measured. A sample that ran out
        of steps has its newest iterate if its residual was still falling, and its best one otherwise.

    Raises:
        StateError: `z0` or what `f` returns does not fit; the message says where, what was expected and what found.
        TypeError: `solver` or `adjoint` is not one.
        ValueError: a tolerance is negative or not finite, `max_steps` is below 1.
        SolverError: see `throw`.
    """
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    solver = default_solver(adjoint, Anderson()) if solver is None else solver
    return _solve(f, z0, args, solver, adjoint, rtol, atol, max_steps, throw, trajectory, root=False)


@not_compiled
@spelled
def root(
    residual: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    solver: FixedPointSolver | None = None,
    adjoint: AnyAdjoint | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_steps: int = 50,
    throw: bool | str = False,
    trajectory: bool = False,
) -> Solution[Any]:
    """Find F(x, *args) = 0 for every sample of a batch, differentiably.

    Everything is as in `fixed_point`, but for the following.

    Args:
        residual: F; takes the state and `args`, returns as many numbers, of the same structure and shapes.
        x0: initial value, or an earlier `Solution`.
        args: passed on to `residual`.
        solver: None takes `Newton()`, or what the adjoint needs. `Broyden()` and `Anderson()` iterate on x - F(x), and
            so want F to be scaled such that this is nearly a contraction.
        adjoint: None takes `ImplicitAdjoint()`.
        rtol: a sample has converged where |F(x)| <= atol + rtol max(|x|, |F(x0)|).
        atol: see rtol.
        max_steps: the largest number of steps.
        throw: as in `fixed_point`.
        trajectory: as in `fixed_point`.

    Returns:
        The `Solution`; `stats.residual` is relative to the scale that `rtol` multiplies.

    Raises:
        StateError, TypeError, ValueError, SolverError: as `fixed_point` does.
    """
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    solver = default_solver(adjoint, Newton()) if solver is None else solver
    return _solve(residual, x0, args, solver, adjoint, rtol, atol, max_steps, throw, trajectory, root=True)


def default_solver(adjoint: AnyAdjoint, otherwise: FixedPointSolver) -> FixedPointSolver:
    """The method that `adjoint` needs, or `otherwise` where it takes any."""
    if isinstance(adjoint, ReversibleAdjoint):
        return ReversibleSteps.default_solver()
    if isinstance(adjoint, ImplicitAdjoint) and adjoint.reuse is not None:
        return Broyden()
    return otherwise


def check_options(
    solver: FixedPointSolver, adjoint: AnyAdjoint, rtol: float, atol: float, max_steps: int, throw: bool | str
) -> Budget:
    """The budget of these options of a solve.

    Raises:
        TypeError, ValueError: one of them is not what it must be.
    """
    require(solver, FixedPointSolver, "solver")
    require(adjoint, (Adjoint, CheckpointAdjoint, ReversibleAdjoint), "adjoint")
    check_throw(throw)
    rtol, atol = (
        check_real("", name, tolerance, lambda t: t >= 0, "a finite number that is not negative")
        for name, tolerance in (("rtol", rtol), ("atol", atol))
    )
    return Budget(rtol, atol, check_integer("", "max_steps", max_steps))


def _solve(
    function: Callable[..., Any], z0: Any, args: tuple[Any, ...] | list[Any], solver: FixedPointSolver,
    adjoint: AnyAdjoint, rtol: float, atol: float, max_steps: int, throw: bool | str, trajectory: bool, root: bool,
) -> Solution[Any]:  # fmt: skip
    if torch.is_inference_mode_enabled():
        # Newton and the like differentiate the function, and a tensor made here cannot even be versioned.
        with torch.inference_mode(False), torch.no_grad():
            z0, args = _ordinary(z0), _ordinary(args)
            return _solve(function, z0, args, solver, adjoint, rtol, atol, max_steps, throw, trajectory, root)
    if not callable(function):
        name = "residual" if root else "f"
        raise TypeError(f"{name} must be a function of the state and args; got {function!r}.")
    budget = check_options(solver, adjoint, rtol, atol, max_steps, throw)
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of what follows the state; got {type(args).__name__}.")
    warm = z0 if isinstance(z0, Solution) else None
    matrix, spec = flatten(_detached(z0) if warm is not None else z0, "x0" if root else "z0")
    if spec.single:
        # It shares its memory with what the user gave, which a function that writes into its argument would lose.
        matrix = matrix.clone()
    if spec.size == 0:
        raise StateError(f"{'x0' if root else 'z0'}: a sample of the initial value holds no numbers.")
    autocast = autocast_type(matrix.device)
    problem = Problem(function, tuple(args), spec, root, "residual(x)" if root else "f(z)", autocast)
    memory = None
    if warm is not None and isinstance(warm.warm, tuple) and warm.warm[0] == solver and warm.warm[2] == len(matrix):
        memory = warm.warm[1]
    stats = Stats(*[torch.empty(0)] * 4)
    solution: Solution[Any] = Solution(None, stats)
    holder = weakref.ref(solution)

    def report(backward: Stats) -> None:
        # The graph must not keep the solution alive, nor the other way round.
        target = holder()
        if target is not None:
            target.adjoint_stats = backward

    task = Task(problem, matrix, solver, budget, memory, trajectory, report)
    with autocast_to(None, matrix.device):
        carry = _adjoint(adjoint).solve(task)
    solution.value = spec.unflatten(carry.value)
    solution.stats = stats_of(carry)
    solution.warm = (solver, solver.lasting(carry.memory), len(carry.value))
    if carry.trajectory is not None:
        solution.trajectory = spec.unflatten(torch.stack(carry.trajectory))
    solution.check(throw, "root" if root else "fixed_point")
    return solution


def _adjoint(adjoint: AnyAdjoint) -> Adjoint:
    if isinstance(adjoint, CheckpointAdjoint):
        return CheckpointedSteps(adjoint)
    if isinstance(adjoint, ReversibleAdjoint):
        return ReversibleSteps(adjoint)
    return adjoint


def _detached(solution: Solution[Any]) -> Any:
    return torch.utils._pytree.tree_map(torch.Tensor.detach, solution.value)


def _ordinary(structure: Any) -> Any:
    """Copies of the tensors that inference mode made, which autograd accepts."""
    if isinstance(structure, Solution):
        return dataclasses.replace(structure, value=_ordinary(structure.value), warm=None)
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, structure)
