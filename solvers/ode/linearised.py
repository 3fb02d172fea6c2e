"""The Jacobian of a field at one place, and the systems with I - g J that implicit methods solve."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..linear import LinearOperator, LinearSolver
from ..solution import Solution
from ..transforms import inside_transform, no_derivatives
from .method import Rhs, Time
from .tape import vector_jacobian

_HALF = (torch.float16, torch.bfloat16)


class Jacobian:
    """J = df/dy of every sample, from a recording of `rate` = f as a function of `point`, which it holds on to.

    A sample's derivative is taken to depend on that sample's state alone.
    """

    def __init__(self, rate: Tensor, point: Tensor) -> None:
        self.rate, self.point = rate, point

    @staticmethod
    def at(rhs: Rhs, t: Time, y: Tensor) -> Jacobian:
        """At (t, y), by an evaluation of its own; not inside torch.func transforms."""
        if torch.is_inference_mode_enabled():
            return Jacobian._recordable(rhs, t, y)
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            rate = rhs(t, point)
        return Jacobian(rate, point)

    @staticmethod
    def _recordable(rhs: Rhs, t: Time, y: Tensor) -> Jacobian:
        """The same within inference mode, whose tensors take part in no recording unless they are copied."""
        with torch.inference_mode(False), torch.no_grad():
            t, y, args = pytree.tree_map_only(Tensor, torch.clone, (t, y, rhs.args))
            found = Jacobian.at(rhs.with_args(args), t, y)
        rhs.calls += 1
        return found

    def pull(self, v: Tensor) -> Tensor:
        """J^T v (batch, n)."""
        if not self.rate.requires_grad:
            return torch.zeros_like(v)
        with no_derivatives():
            (product,) = vector_jacobian((self.rate,), (self.point,), (v,), True)
        return torch.zeros_like(v) if product is None else product

    def push(self, v: Tensor) -> Tensor:
        """J v (batch, n), as the derivative of J^T u with respect to u."""
        if not self.rate.requires_grad:
            return torch.zeros_like(v)
        with torch.inference_mode(False), torch.enable_grad():
            dummy = torch.zeros_like(self.rate, requires_grad=True)
            (product,) = torch.autograd.grad(self.rate, self.point, dummy, create_graph=True, allow_unused=True)
        if product is None or not product.requires_grad:
            return torch.zeros_like(v)
        with no_derivatives():
            (tangent,) = torch.autograd.grad(product, dummy, v, allow_unused=True)
        return torch.zeros_like(v) if tangent is None else tangent

    @functools.cached_property
    def matrix(self) -> Tensor:
        """(batch, n, n)."""
        basis = torch.eye(self.point.shape[1], dtype=self.point.dtype, device=self.point.device)
        return torch.stack([self.pull(e.expand_as(self.point)) for e in basis], dim=1)


def jacobian_matrix(rhs: Rhs, t: Time, y: Tensor) -> Tensor:
    """J (batch, n, n) at (t, y) as a constant, also inside torch.func transforms and under forward-mode AD."""
    with no_derivatives():
        if not inside_transform():
            return Jacobian.at(rhs, t, y).matrix
        # torch.autograd.grad cannot see through functorch's wrappers; functorch's own vjp nests properly.
        pull = torch.func.vjp(lambda x: rhs(t, x), y)[1]
        basis = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        return torch.stack([pull(e.expand(y.shape))[0] for e in basis], dim=1)


class Factorised:
    """Solves with A = I - g J and its transpose from one factorisation of the matrices."""

    def __init__(self, matrix: Tensor, g: Time) -> None:
        """J is `matrix` (batch, n, n); g a number, or (batch,)."""
        wide = matrix.float() if matrix.dtype in _HALF else matrix
        factor = g.to(wide.dtype).view(-1, 1, 1) if isinstance(g, Tensor) and g.ndim else g
        eye = torch.eye(matrix.shape[-1], dtype=wide.dtype, device=matrix.device)
        self._factors, self._pivots, _ = torch.linalg.lu_factor_ex(eye - factor * wide)

    def solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """A^-1 right, or A^-T right (batch, n); not finite where A is singular."""
        wide = right.to(self._factors.dtype).unsqueeze(2)
        return torch.linalg.lu_solve(self._factors, self._pivots, wide, adjoint=transposed).squeeze(2).to(right.dtype)


class Applied:
    """Solves with A = I - g J and its transpose by a Krylov method that only applies J."""

    def __init__(self, jacobian: Jacobian, g: Time, solver: LinearSolver) -> None:
        factor = g.to(jacobian.point.dtype).unsqueeze(1) if isinstance(g, Tensor) and g.ndim else g
        batch, n = jacobian.point.shape
        self._solver = solver
        self._operator = LinearOperator(
            lambda v: v - factor * jacobian.push(v),
            lambda v: v - factor * jacobian.pull(v),
            batch=batch,
            size=n,
            dtype=jacobian.point.dtype,
            device=jacobian.point.device,
        )

    def solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """A^-1 right, or A^-T right (batch, n), as far as the solver came."""
        return self.solution(right, transposed).value

    def solution(self, right: Tensor, transposed: bool) -> Solution[Tensor]:
        """The same with its statistics."""
        return self._solver.solve(self._operator.T if transposed else self._operator, right)
