"""The argmin layer: any energy E(y, x) becomes a layer whose output is its minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...solvers.adjoint import ImplicitAdjoint
from ...solvers.optimize import Minimizer, Minimum, minimize

State = Any


class ArgminLayer(nn.Module):
    """A layer that maps x to the y that minimises energy(y, x), differentiated through stationarity.

    The gradient reaches x and the energy's parameters, and not the start: through a converged minimum nothing can be
    learnt about where to begin.

    Args:
        energy: E(y, x) -> (batch,), an nn.Module or a function; twice differentiable in y.
        state: shape of y without the batch, or a function of x that returns y0; None takes zeros like x.
        equality: h(y, x) -> (batch, p) that is to be zero, or None.
        solver: None takes `LBFGS()`.
        adjoint: None takes what `minimize` takes.
        rtol, atol, max_steps: of the solve.
        throw: what to do when a solve fails: True raises, "warn" warns, False leaves it to the statistics.

    Raises:
        TypeError: the energy cannot be called.

    Source: Domke 2012; Gould, Hartley and Campbell 2021, Deep declarative networks.

    Example:
        >>> layer = ArgminLayer(lambda y, x: (y - x).square().sum(1))
        >>> layer(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        energy: nn.Module | Callable[..., Tensor],
        *,
        state: tuple[int, ...] | Callable[[Any], State] | None = None,
        equality: nn.Module | Callable[..., Tensor] | None = None,
        solver: Minimizer | None = None,
        adjoint: ImplicitAdjoint | None = None,
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_steps: int = 500,
        throw: bool | str = "warn",
    ) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(f"ArgminLayer: energy must be a module or a function; got {type(energy).__name__}.")
        self.energy, self.equality, self.state = energy, equality, state
        self.solver, self.adjoint = solver, adjoint
        self.rtol, self.atol, self.max_steps, self.throw = rtol, atol, max_steps, throw

    def forward(self, x: Any, y0: State | None = None) -> State:
        """The minimum."""
        return self.solve(x, y0).value

    def solve(self, x: Any, y0: State | None = None) -> Minimum:
        """The minimum, its energy and how it was found."""
        leaves, structure = pytree.tree_flatten(x)
        equality = None
        if self.equality is not None:
            constraint = self.equality

            def equality(y: State, *leaves: Any) -> Tensor:
                return constraint(y, pytree.tree_unflatten(list(leaves), structure))

        return minimize(
            lambda y, *leaves: self.energy(y, pytree.tree_unflatten(list(leaves), structure)),
            self._start(x, leaves) if y0 is None else y0, tuple(leaves), equality=equality, solver=self.solver,
            adjoint=self.adjoint, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps, throw=self.throw,
        )  # fmt: skip

    def _start(self, x: Any, leaves: list[Any]) -> State:
        if callable(self.state):
            return self.state(x)
        if self.state is not None:
            first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
            if first is None:
                raise ValueError("ArgminLayer: x holds no tensor with a batch dimension: give y0, or state=function.")
            return first.new_zeros(len(first), *self.state)
        if not isinstance(x, Tensor):
            raise ValueError(
                f"ArgminLayer: x is a {type(x).__name__}, so the shape of y cannot be inferred from it: give y0, or "
                "ArgminLayer(energy, state=shape without the batch)."
            )
        return torch.zeros_like(x)
