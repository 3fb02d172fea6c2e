"""Derivatives of the stages of implicit methods, by the implicit function theorem."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..linear import GMRES
from ..solution import AdjointWarning, SolverError
from ..transforms import any_true, derivative_levels, inside_transform, no_derivatives, recording_tangents
from ..tree import norms
from .linearised import Applied, Factorised, Jacobian, jacobian_matrix
from .method import Rhs, Time, column


def attach(rhs: Rhs, t: Time, base: Tensor, gamma: float, h: Time, z: Tensor, dense_size: int) -> Tensor:
    """The root z of z = h f(t, base + gamma z), as a function of t, base, h and all that f uses.

    A Newton step from a root is zero, and its derivative with A = I - h gamma J held constant is that of the root. A
    second one makes second derivatives exact; it is left out where `rhs` is told that none will be taken.

    Args:
        z: the root (batch, n), without derivatives.
        dense_size: up to so many numbers a sample A is assembled, beyond it is only applied.
    """
    if inside_transform() or recording_tangents():
        return _attach_dense(rhs, t, base, gamma, h, z)
    length = column(h, z)
    point = base + gamma * z
    if not point.requires_grad:
        point = _Wall.apply(point.requires_grad_())
    rate = rhs(t, point)
    if not rate.requires_grad:
        return z
    g = h.detach() * gamma if isinstance(h, Tensor) else h * gamma
    solve = _Solve(Jacobian(rate, point), g, dense_size, rhs.once)
    value = z + _Inverse.apply(length * rate - z, solve, False)
    if not rhs.once:
        again = _Second.apply(value)
        value = value + _Inverse.apply(length * rhs(t, base + gamma * again) - again, solve, False)
    return value


def _attach_dense(rhs: Rhs, t: Time, base: Tensor, gamma: float, h: Time, z: Tensor) -> Tensor:
    """Newton steps with an assembled, constant Jacobian: made of differentiable operations throughout.

    As many steps as there are derivatives that enclosing transforms can take, and two more for autograd outside.
    """
    with no_derivatives():
        matrix = jacobian_matrix(rhs, t, base + gamma * z)
        system = Factorised(matrix, h * gamma)
    for _ in range(max(derivative_levels(), 1) + 2):
        z = z + system.solve(column(h, z) * rhs(t, base + gamma * z) - z)
    return z


class _Wall(torch.autograd.Function):
    """The identity, through which no gradient passes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class _Second(torch.autograd.Function):
    """The identity on its way to the second Newton step, which makes second derivatives exact but not third ones.

    The gradient that passes back through here takes part in every first derivative, and so a backward pass through
    that gradient is a second derivative; if it records a graph, a third one is about to be asked for.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _First.apply(grads[0], *ctx.saved_tensors)


class _First(torch.autograd.Function):
    """The identity on a gradient; `anchor`, which the parameters lead to, keeps it in the graph of that gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second backward pass through an implicit method was asked to build a graph (create_graph=True), but "
                "its stages have no third derivative there; torch.func gives it."
            )
        return grads[0], None


class _Inverse(torch.autograd.Function):
    """b -> A^-1 b, whose backward is itself with A transposed, and so on.

    A step from a root is zero, so the first application is not computed.
    """

    @staticmethod
    def forward(ctx: Any, b: Tensor, solve: _Solve, transposed: bool, needed: bool = False) -> Tensor:
        ctx.solve, ctx.transposed = solve, transposed
        return solve(b, transposed) if needed else torch.zeros_like(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and ctx.solve.once:
            raise RuntimeError("This backward pass takes first derivatives only, but was asked to build a graph.")
        return _Inverse.apply(grads[0], ctx.solve, not ctx.transposed, True), None, None, None


class _Solve:
    """Solves with A = I - g J and A^T, the Jacobian taken at the root."""

    def __init__(self, jacobian: Jacobian, g: Time, dense_size: int, once: bool) -> None:
        self._jacobian, self._g, self.once = jacobian, g, once
        self._applied = jacobian.point.shape[1] > dense_size
        # Under autocast the products are only as linear as its type is fine.
        point = jacobian.point
        autocast = torch.is_autocast_enabled(point.device.type)
        self._eps = torch.finfo(torch.get_autocast_dtype(point.device.type) if autocast else point.dtype).eps

    @functools.cached_property
    def _system(self) -> Factorised | Applied:
        """Made when the first gradient arrives."""
        if self._applied:
            return Applied(self._jacobian, self._g, GMRES(max_steps=1000))
        return Factorised(self._jacobian.matrix, self._g)

    def __call__(self, b: Tensor, transposed: bool) -> Tensor:
        b = b.detach()
        # A NaN in the loss stays visible in the gradient, as in any backward pass, but only in its row; and a sample
        # that the loss does not depend on has no gradient, whatever became of it.
        sound = torch.isfinite(b).all(dim=1, keepdim=True)
        right = torch.where(sound, b, 0.0)
        x = self._iterate(right, transposed) if self._applied else self._direct(right, transposed)
        return torch.where(sound, torch.where((right == 0).all(dim=1, keepdim=True), 0.0, x), torch.nan)

    def _direct(self, right: Tensor, transposed: bool) -> Tensor:
        x = self._system.solve(right, transposed)
        if not transposed:
            return x
        product = column(self._g, x) * self._jacobian.pull(x)
        residual, size = right - x + product, norms(right) + norms(x) + norms(product)
        wrong = ~(norms(residual) <= self._eps**0.5 * size) & (right != 0).any(dim=1)
        if any_true(wrong):
            raise SolverError(_WRONG.format(sample=int(wrong.nonzero()[0])))
        return x + self._system.solve(residual, transposed)

    def _iterate(self, right: Tensor, transposed: bool) -> Tensor:
        assert isinstance(self._system, Applied)
        solution = self._system.solution(right, transposed)
        residual = solution.stats.residual
        loose = ~solution.converged & ~(residual <= self._eps**0.5)
        if any_true(loose):
            worst = int(torch.where(loose, residual.nan_to_num(nan=torch.inf), -1.0).argmax())
            warnings.warn(
                f"An implicit stage's backward solve by GMRES did not reach its tolerance (worst: sample {worst}, "
                f"relative residual {float(residual[worst]):.3g}), and the gradient is that much less exact. Raise "
                "dense_size of StageNewton, so that the Jacobian is factorised.",
                AdjointWarning,
                stacklevel=2,
            )
        return solution.value


_WRONG = (
    "An implicit stage's backward solve failed at sample {sample}: the Jacobian is singular there, or the field lets "
    "one sample depend on another, as batch normalisation does. Take an explicit solver, or one sample at a time."
)
