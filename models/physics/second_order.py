"""Second-order ODEs: positions are seen, velocities are latent, and what is learnt is the acceleration."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.ode import Controller, Method, PIDController, Tsit5
from ...solvers.options import check_integer, check_real
from ..registry import register_model
from .perceptron import perceptron
from .trajectory import AnyAdjoint, TrajectoryModel


class SecondOrderODE(TrajectoryModel):
    """x'' = f(x, x') from positions alone: the state is [x, v] with v = dx/dt, and v(0) is inferred.

    Where the state begins is read off the first few positions, by a linear map and a perceptron added to it. Momenta
    are not seen, in training or later; those of the prediction are `mass` times the velocities.

    Args:
        degrees: of freedom.
        context: how many of the first positions are read.
        hidden: widths of the hidden layers of the acceleration.
        encoder: widths of the hidden layers of the perceptron that reads them.
        mass: from velocities to momenta.
        solver, controller, adjoint, rtol, atol, max_steps: as of `TrajectoryModel`.

    Raises:
        ValueError: the context is below two positions, which no velocity can be read off; the mass is not positive.

    Source: Norcliffe, Bodnar, Day, Simidjievski and Lio 2020, section 3 (SONODE): the state [x, v], and a learnt map
    to the velocity at the start, there from x(0) alone.
    """

    sees_momenta = False

    def __init__(
        self, *, degrees: int = 1, context: int = 5, hidden: tuple[int, ...] = (128, 128),
        encoder: tuple[int, ...] = (64,), mass: float = 1.0, solver: Method | None = None,
        controller: Controller | None = None, adjoint: AnyAdjoint | None = None, rtol: float = 1e-4,
        atol: float = 1e-4, max_steps: int = 100_000,
    ) -> None:  # fmt: skip
        solver = Tsit5() if solver is None else solver
        controller = PIDController() if controller is None else controller
        super().__init__(degrees, solver, controller, adjoint, rtol, atol, max_steps)
        self.context = check_integer("SecondOrderODE: ", "context", context, least=2)
        self.mass = check_real("SecondOrderODE: ", "mass", mass, lambda m: m > 0, "positive")
        self.acceleration = perceptron(2 * degrees, hidden, degrees)
        self.linear = nn.Linear(context * degrees, 2 * degrees)
        self.encoder = perceptron(context * degrees, encoder, 2 * degrees)
        with torch.no_grad():
            # Begin with a linear map that is right about the position, and what follows to be learnt.
            self.linear.weight.zero_()
            self.linear.bias.zero_()
            self.linear.weight[:degrees, :degrees] = torch.eye(degrees)
            self.encoder[-1].weight.mul_(0.01)  # type: ignore[operator]

    def start(self, seen: Float[Tensor, "batch seen state"]) -> tuple[Tensor, Tensor]:
        """Position and velocity, from positions alone."""
        positions = seen[:, : self.context, : self.degrees].flatten(1)
        x, v = (self.linear(positions) + self.encoder(positions)).split(self.degrees, dim=1)
        return x, v

    def field(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The velocity, and the learnt acceleration."""
        return state[1], self.acceleration(torch.cat(state, dim=1))

    def momenta(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """Mass times velocity."""
        return self.mass * state[1]


@register_model(family="physics", task="trajectory-regression", accepts=SecondOrderODE)
def sonode_small(**arguments: Any) -> SecondOrderODE:
    """A second-order ODE with latent velocities, for a few bodies: two hidden layers of 128."""
    return SecondOrderODE(**arguments)


@register_model(family="physics", task="trajectory-regression", accepts=SecondOrderODE)
def test_sonode(**arguments: Any) -> SecondOrderODE:
    """A second-order ODE with latent velocities, small enough for tests."""
    return SecondOrderODE(**{"hidden": (8,), "encoder": (8,), "context": 3, **arguments})
