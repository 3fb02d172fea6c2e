"""Hamiltonian networks: what is learnt is the energy, and what follows from it keeps it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...solvers.ode import ConstantController, Controller, Method, ReversibleAdjoint, ReversibleMethod, Yoshida4
from ..registry import register_model
from .scalar import ScalarMLP
from .trajectory import AnyAdjoint, TrajectoryModel


class HamiltonianNetwork(TrajectoryModel):
    """dq/dt = dH/dp, dp/dt = -dH/dq with a learnt energy H = T(p) + V(q), by symplectic steps.

    The flow of any H keeps H, and symplectic steps keep a neighbour of it, over however many periods: the energy of
    what is predicted oscillates and does not drift. Steps are of one length.

    Args:
        degrees: of freedom.
        hidden: widths of the hidden layers of each of the two perceptrons, T and V.
        solver, controller, rtol, atol, max_steps: of `solve_ode`; by default `Yoshida4()` at steps of 0.1.
        adjoint: likewise; None takes `ReversibleAdjoint()`, which undoes symplectic steps and keeps none of them, and
            for a solver that cannot be undone that of `TrajectoryModel`.

    Source: Greydanus, Dzamba and Yosinski 2019, equations 2 and 4; there H need not be separable and is fitted to
    derivatives, or here to trajectories, through a symplectic integrator, as by Chen, Zhang, Arjovsky and Bottou 2020.
    """

    def __init__(
        self, *, degrees: int = 1, hidden: tuple[int, ...] = (128, 128), solver: Method | None = None,
        controller: Controller | None = None, adjoint: AnyAdjoint | None = None, rtol: float = 1e-4,
        atol: float = 1e-4, max_steps: int = 100_000,
    ) -> None:  # fmt: skip
        solver = Yoshida4() if solver is None else solver
        controller = ConstantController(dt=0.1) if controller is None else controller
        if adjoint is None and isinstance(solver, ReversibleMethod):
            adjoint = ReversibleAdjoint()
        super().__init__(degrees, solver, controller, adjoint, rtol, atol, max_steps)
        self.kinetic, self.potential = ScalarMLP(degrees, hidden), ScalarMLP(degrees, hidden)

    def energy(
        self, q: Float[Tensor, "*batch degrees"], p: Float[Tensor, "*batch degrees"]
    ) -> Float[Tensor, " *batch"]:
        """The learnt H, up to a constant."""
        return self.kinetic(p) + self.potential(q)

    def start(self, seen: Float[Tensor, "batch seen state"]) -> tuple[Tensor, Tensor]:
        """The first observation."""
        q, p = seen[:, 0].split(self.degrees, dim=1)
        return q, p

    def field(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Hamilton's equations."""
        q, p = state
        return self.kinetic.gradient(p), -self.potential.gradient(q)


@register_model(family="physics", task="trajectory-regression", accepts=HamiltonianNetwork)
def hamiltonian_small(**arguments: Any) -> HamiltonianNetwork:
    """A separable Hamiltonian network for a few bodies: two perceptrons of two hidden layers of 128."""
    return HamiltonianNetwork(**arguments)


@register_model(family="physics", task="trajectory-regression", accepts=HamiltonianNetwork)
def test_hamiltonian(**arguments: Any) -> HamiltonianNetwork:
    """A separable Hamiltonian network small enough for tests."""
    return HamiltonianNetwork(**{"hidden": (8,), **arguments})
