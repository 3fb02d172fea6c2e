"""The problem function of linear systems."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..options import require
from ..solution import AdjointWarning, Solution
from ..transforms import all_true, plain, tangents_of_others
from ..tree import flatten
from .auto import Auto
from .operator import LinearOperator
from .solver import LinearSolver


def linear_solve(
    operator: Tensor | LinearOperator | Callable[[Any], Any],
    b: Any,
    *,
    solver: LinearSolver | None = None,
    throw: bool | str = False,
    x0: Any = None,
) -> Solution[Any]:
    """Solve A x = b for every sample of a batch.

    With A given as matrices the result is differentiable in A and b, to any order and under torch.func, by solves
    with the transposed matrices that are as exact as `solver`. With A given as a function or a `LinearOperator` it is
    not differentiable, and asking for a derivative is an error.

    Args:
        operator: matrices (batch, n, n); one matrix (n, n) for all samples; a `LinearOperator`; or a linear function
            v -> A v on the structure of `b`.
        b: right-hand sides (batch, n); with a function, a tensor or a tuple, list or dict of tensors (batch, ...).
        solver: the method; None takes `Auto()`.
        throw: raise `SolverError` if some sample is not solved; "warn" warns instead.
        x0: where iterative solvers start, in the structure of `b`; zero by default.

    Returns:
        `value` in the structure of `b`; see `LinearSolver.solve` for the statistics. A backward pass whose solve fails
        warns with `AdjointWarning`.

    Raises:
        TypeError: `operator` is none of the above; `solver` is not one.
        ValueError: shapes, dtypes or devices do not fit; with a function or a `LinearOperator`, something requires a
            derivative.
        SolverError: see `throw`.
    """
    solver = Auto() if solver is None else solver
    require(solver, LinearSolver, "solver")
    if isinstance(operator, Tensor):
        solution = _solve_matrix(operator, b, solver, x0)
    elif isinstance(operator, LinearOperator):
        _refuse(b, "b")
        if operator.assembled:
            _refuse(operator.dense(), "the operator's matrix")
        solution = solver.solve(_guarded(operator), b, x0)
    elif callable(operator):
        solution = _solve_function(operator, b, solver, x0)
    else:
        raise TypeError(f"operator must be a tensor, a LinearOperator or a function; got {type(operator).__name__}.")
    solution.check(throw, "linear_solve")
    return solution


def _solve_matrix(matrix: Tensor, b: Any, solver: LinearSolver, x0: Tensor | None) -> Solution[Tensor]:
    if not isinstance(b, Tensor) or b.ndim != 2:
        what = f"shape {tuple(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b: expected a tensor of shape (batch, n) with a matrix operator; got {what}.")
    operator = LinearOperator.from_matrix(matrix, len(b))
    solution = solver.solve(operator, b, x0)
    solution.value = _Attach.apply(operator.dense(), b, solution.value, solver)
    return solution


class _Attach(torch.autograd.Function):
    """x, found by other means, as a function of A and b: A dx = db - dA x."""

    @staticmethod
    def forward(matrix: Tensor, b: Tensor, x: Tensor, solver: LinearSolver) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, _, _, ctx.solver = inputs
        ctx.save_for_backward(matrix, output)
        ctx.save_for_forward(matrix, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        matrix, x = ctx.saved_tensors
        u = _solve_derivative(matrix.mT, grads[0], ctx.solver)
        return -u.unsqueeze(2) * x.unsqueeze(1).to(u.dtype), u, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        d_matrix, d_b = tangents[:2]
        with tangents_of_others(*ctx.saved_tensors) as (matrix, x):
            right = torch.zeros_like(x) if d_b is None else d_b
            if d_matrix is not None:
                right = right - torch.bmm(d_matrix, x.unsqueeze(2)).squeeze(2)
            return _solve_derivative(matrix, right, ctx.solver)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], matrix: Tensor, b: Tensor, x: Tensor, solver: LinearSolver
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        front = (
            t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((matrix, b, x), dims, strict=False)
        )
        solved = _Attach.apply(*(t.flatten(0, 1) for t in front), solver)
        return solved.unflatten(0, (size, -1)), 0


def _solve_derivative(matrix: Tensor, right: Tensor, solver: LinearSolver) -> Tensor:
    solution = solver.solve(LinearOperator.from_matrix(matrix), right)
    if not all_true(solution.converged):
        residual = plain(solution.stats.residual)[~plain(solution.converged)]
        warnings.warn(
            f"linear_solve: {residual.numel()} of the solves behind a derivative did not converge; their largest "
            f"relative residual is {float(residual.max()):.3g}.",
            AdjointWarning,
            stacklevel=2,
        )
    return _Attach.apply(matrix, right, solution.value, solver)


def _solve_function(function: Callable[[Any], Any], b: Any, solver: LinearSolver, x0: Any) -> Solution[Any]:
    matrix, spec = flatten(b, "b")
    _refuse(b, "b")
    operator = LinearOperator(
        lambda v: spec.flatten(function(spec.unflatten(v)), "operator(v)"),
        batch=len(matrix),
        size=spec.size,
        dtype=spec.dtype,
        device=spec.device,
    )
    solution = solver.solve(_guarded(operator), matrix, None if x0 is None else spec.flatten(x0, "x0"))
    solution.value = spec.unflatten(solution.value)
    return solution


def _guarded(operator: LinearOperator) -> LinearOperator:
    """The same operator, whose first application is watched for anything that requires a derivative."""
    enabled = torch.is_grad_enabled()

    def watch(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        watched = False

        def first(v: Tensor) -> Tensor:
            nonlocal watched
            if watched:
                return apply(v)
            watched = True
            with torch.set_grad_enabled(enabled), forward_ad._set_fwd_grad_enabled(True):
                out = apply(v.detach())
                _refuse(out, "the operator")
            return out.detach()

        return first

    return LinearOperator(
        watch(operator.matvec) if operator.forward else None,
        watch(operator.rmatvec) if operator.backward else None,
        batch=operator.batch,
        size=operator.size,
        dtype=operator.dtype,
        device=operator.device,
        dense=operator.dense() if operator.assembled else None,
        assemble_with=operator.assemble_with,
    )


def _refuse(values: Any, name: str) -> None:
    """Raise where a derivative would be lost without notice."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and _recorded(leaf):
            raise ValueError(
                f"linear_solve: {name} requires a derivative, and with a function or a LinearOperator the result is "
                "not differentiable. Pass the matrices themselves, solve root(lambda x: A(x) - b, ...), which is "
                "differentiable, or call it under torch.no_grad()."
            )


def _recorded(tensor: Tensor) -> bool:
    """Whether autograd, at any level of torch.func, follows a tensor."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    return _functorch.is_functorch_wrapped_tensor(tensor) and _recorded(_functorch.get_unwrapped(tensor))
