"""The unstructured ODE, which physics has no part in: what the structured ones are measured against."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.ode import Controller, Method, PIDController, Tsit5
from ..registry import register_model
from .trajectory import AnyAdjoint, TrajectoryModel


def perceptron(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with tanh between them, orthogonal at the start."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((inputs, *hidden, outputs)):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class UnstructuredODE(TrajectoryModel):
    """d(q, p)/dt = f(q, p) with a perceptron f.

    Args:
        degrees: of freedom.
        hidden: widths of the hidden layers.
        solver, controller, adjoint, rtol, atol, max_steps: as of `TrajectoryModel`.

    Source: Chen et al. 2018; the baseline of Greydanus, Dzamba and Yosinski 2019.
    """

    def __init__(
        self, *, degrees: int = 1, hidden: tuple[int, ...] = (200, 200), solver: Method | None = None,
        controller: Controller | None = None, adjoint: AnyAdjoint | None = None, rtol: float = 1e-4,
        atol: float = 1e-4, max_steps: int = 100_000,
    ) -> None:  # fmt: skip
        solver = Tsit5() if solver is None else solver
        controller = PIDController() if controller is None else controller
        super().__init__(degrees, solver, controller, adjoint, rtol, atol, max_steps)
        self.rate = perceptron(2 * degrees, hidden, 2 * degrees)

    def start(self, seen: Float[Tensor, "batch seen state"]) -> tuple[Tensor, Tensor]:
        """The first observation."""
        q, p = seen[:, 0].split(self.degrees, dim=1)
        return q, p

    def field(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The perceptron."""
        of_q, of_p = self.rate(torch.cat(state, dim=1)).split(self.degrees, dim=1)
        return of_q, of_p


@register_model(family="physics", task="trajectory-regression", accepts=UnstructuredODE)
def unstructured_ode_small(**arguments: Any) -> UnstructuredODE:
    """An ODE without structure, for a few bodies: a perceptron of two hidden layers of 200."""
    return UnstructuredODE(**arguments)


@register_model(family="physics", task="trajectory-regression", accepts=UnstructuredODE)
def test_unstructured_ode(**arguments: Any) -> UnstructuredODE:
    """An ODE without structure, small enough for tests."""
    return UnstructuredODE(**{"hidden": (8,), **arguments})
