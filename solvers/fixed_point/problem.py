"""The problem that every method sees: rows z (batch, n), and the residual that is zero at a rest point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..linear.operator import LinearOperator
from ..transforms import autocast_to, inside_transform, no_derivatives
from ..tree import StateError, StateSpec

DENSE_LIMIT = 2048
"""Numbers a sample up to which a Jacobian may be assembled."""


class TooLargeError(ValueError):
    """A Jacobian that would have to be assembled, and is too large for it."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """z = f(z) or F(x) = 0 on matrices (batch, n).

    The residual r is f(z) - z, or -F(x): in both, z + r is the next Picard iterate, and the operator that
    implicit differentiation inverts is A = -dr/dz.

    Attributes:
        function: the user's.
        args: passed on to it after the state.
        spec: how the state lies in the matrix.
        root: True for F(x) = 0.
        name: how errors call the function.
        autocast: the type that the function is to be autocast to, or None.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    spec: StateSpec
    root: bool
    name: str
    autocast: torch.dtype | None = None

    def output(self, z: Tensor) -> Tensor:
        """f(z) or F(z) as a matrix.

        Raises:
            StateError: the function returned another structure, shape, dtype or device, or wrote into its argument.
        """
        version = z._version
        with autocast_to(self.autocast, z.device):
            state = self.function(self.spec.unflatten(z), *self.args)
        out = self.spec.flatten(state, self.name, cast=self.autocast is not None)
        if len(out) != len(z):
            raise StateError(
                f"{self.name}: expected a batch of {len(z)} as in the initial value, got {len(out)}. A batch of one is "
                "not broadcast: give the initial value the batch of what the function computes."
            )
        if z._version != version:
            raise StateError(
                f"{self.name}: the function changed the state that it was given, in place, and so the residual cannot "
                "be measured; return a new state instead."
            )
        return out

    def evaluate(self, z: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The Picard image z + r and the residual r, which is written to `room` where that is given."""
        out = self.output(z)
        if self.root:
            return z - out, -out
        return out, out - z if room is None else torch.sub(out, z, out=room)

    def residual(self, z: Tensor) -> Tensor:
        """r(z)."""
        out = self.output(z)
        return -out if self.root else out - z

    def divisible(self, batch: int) -> bool:
        """Whether every tensor in args has the batch in front, so that rows can be taken out."""
        tensors = [leaf for leaf in pytree.tree_leaves(self.args) if isinstance(leaf, Tensor)]
        return bool(tensors) and all(t.ndim > 0 and t.shape[0] == batch for t in tensors)

    def select(self, rows: Tensor, leaves: frozenset[int] | None = None) -> Problem:
        """The problem of some rows, taken from all args, for which it has to be `divisible`, or from some `leaves`."""
        parts, structure = pytree.tree_flatten(self.args)
        taken = [
            part.index_select(0, rows) if isinstance(part, Tensor) and (leaves is None or i in leaves) else part
            for i, part in enumerate(parts)
        ]
        args = pytree.tree_unflatten(taken, structure)
        return dataclasses.replace(self, args=args)

    def linearize(self, z: Tensor) -> LinearOperator:
        """A = -dr/dz at the constant z, applied by derivatives of one recorded evaluation.

        Not to be used inside torch.func transforms, through which torch.autograd.grad cannot see: `jacobian` can.
        """
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            out = self.output(point)
        return operator_of_recording(self, point, out)

    def pullback(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> A^T v, row by row, differentiable in everything wherever derivatives are recorded."""
        if inside_transform():
            # torch.autograd.grad cannot see through functorch's wrappers; functorch's own vjp nests properly.
            pull = torch.func.vjp(self.residual, z)[1]
            return lambda v: -pull(v)[0]
        taped = torch.is_grad_enabled()
        with torch.enable_grad():
            # Unlike a detached tensor, a clone keeps the tangent of forward-mode differentiation.
            point = z if z.requires_grad else z.clone().requires_grad_()
            residual = self.residual(point)

        def recorded(v: Tensor) -> Tensor:
            if not residual.requires_grad:
                return torch.zeros_like(v)
            (product,) = torch.autograd.grad(residual, point, -v, True, taped, allow_unused=True)
            return torch.zeros_like(v) if product is None else product

        return recorded

    def jacobian(self, z: Tensor, joint: bool = False) -> Tensor:
        """A = -dr/dz as matrices, differentiable in everything wherever derivatives are recorded.

        Args:
            z: where (batch, n).
            joint: one matrix (1, batch n, batch n) for all rows together, instead of (batch, n, n) for rows that
                have nothing to do with each other.

        Raises:
            TooLargeError: a matrix would be larger than `DENSE_LIMIT`.
        """
        batch, size = z.shape
        n = batch * size if joint else size
        if n > DENSE_LIMIT:
            subject = "of a batch whose samples the function couples" if joint else "of a sample"
            raise TooLargeError(
                f"{self.name}: under torch.func transforms and in taped Newton steps the Jacobian {subject} is "
                f"assembled, which is limited to {DENSE_LIMIT} numbers; this state has {n}. Choose UnrollAdjoint() or "
                "PhantomAdjoint() there, and another solver than Newton(); or torch.no_grad(), if no derivative is "
                "wanted."
            )
        pull = self.pullback(z)
        basis = torch.eye(n, dtype=z.dtype, device=z.device)
        if joint:
            return torch.stack([pull(e.reshape(batch, size)).reshape(1, n) for e in basis], dim=1)
        return torch.stack([pull(e.expand(batch, size)) for e in basis], dim=1)


def operator_of_recording(problem: Problem, point: Tensor, out: Tensor) -> LinearOperator:
    """A = -dr/dz from one recorded evaluation `out` of the problem's function at `point`.

    A transposed is a vector-Jacobian product of the recording; A is the derivative of that product with respect to
    its vector. Both are computed in the recording's type and returned in that of the vector. Where the function has no
    second derivative (fused attention, compiled code, a solve inside), A is assembled by products with its transpose.
    """
    assembled: list[Tensor] = []

    def pull(v: Tensor) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(v)
        with no_derivatives():
            (product,) = torch.autograd.grad(out, point, v.to(out.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product.to(v.dtype)

    def push(v: Tensor) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(v)
        if not assembled:
            try:
                return twice(v)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                assembled.append(assemble(error))
        return torch.bmm(v.to(out.dtype).unsqueeze(1), assembled[0].mT).squeeze(1).to(v.dtype)

    def twice(v: Tensor) -> Tensor:
        with torch.enable_grad():
            dummy = torch.zeros_like(out, requires_grad=True)
            (product,) = torch.autograd.grad(out, point, dummy, create_graph=True, allow_unused=True)
        if product is None:
            return torch.zeros_like(v)
        tangent = None
        if product.requires_grad:
            with no_derivatives():
                (tangent,) = torch.autograd.grad(product, dummy, v.to(product.dtype), allow_unused=True)
        if tangent is None and pull(torch.arange(1, v.shape[1] + 1).to(v).cos().expand_as(v)).any():
            # As of a function whose backward pass is marked to be differentiated once.
            raise RuntimeError("the product with its Jacobian does not depend on the vector.")
        return torch.zeros_like(v) if tangent is None else tangent.to(v.dtype)

    def assemble(error: RuntimeError) -> Tensor:
        if out.shape[1] > DENSE_LIMIT:
            raise TooLargeError(
                f"{problem.name}: its Jacobian has to be applied to a vector, which takes a second derivative that the "
                f"function does not have, or the Jacobian itself, which is assembled for at most {DENSE_LIMIT} numbers "
                f"a sample; this state has {out.shape[1]}. Take a solver other than Newton(), or a function that can "
                f"be differentiated twice. Its own error was: {error}"
            ) from error
        return torch.stack([pull(e.expand_as(out)) for e in torch.eye(out.shape[1]).to(out)], dim=1)

    if problem.root:
        matvec, rmatvec = push, pull
    else:
        matvec, rmatvec = (lambda v: v - push(v)), (lambda v: v - pull(v))
    wide = torch.float32 if point.dtype in (torch.float16, torch.bfloat16) else point.dtype
    return LinearOperator(matvec, rmatvec, batch=len(point), size=point.shape[1], dtype=wide, device=point.device)
