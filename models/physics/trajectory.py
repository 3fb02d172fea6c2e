"""What models of trajectories have in common."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, Controller, Method, ODESolution, ReversibleAdjoint, solve_ode
from ...solvers.ode.adjoint import Adjoint
from ...solvers.options import check_integer

Times = Tensor | Sequence[float]
AnyAdjoint = Adjoint | CheckpointAdjoint | ReversibleAdjoint


class TrajectoryModel(nn.Module, abc.ABC):
    """Continues a trajectory of positions and momenta that was seen at its first few times.

    Args:
        degrees: of freedom: how many positions there are, and as many momenta.
        solver, controller, rtol, atol, max_steps: of `solve_ode`.
        adjoint: likewise; None takes `CheckpointAdjoint(recursive=True)`, whose memory hardly grows with the steps.

    Attributes:
        sees_momenta: whether momenta are seen and learnt from; else they follow from the positions alone.
        context: how many of the first observations are seen.
    """

    sees_momenta = True
    context = 1

    def __init__(
        self, degrees: int, solver: Method, controller: Controller, adjoint: AnyAdjoint | None,
        rtol: float, atol: float, max_steps: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.degrees = check_integer(f"{type(self).__name__}: ", "degrees", degrees)
        self.solver, self.controller = solver, controller
        self.adjoint: AnyAdjoint = CheckpointAdjoint(recursive=True) if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    @abc.abstractmethod
    def start(self, seen: Float[Tensor, "batch seen state"]) -> tuple[Tensor, Tensor]:
        """Two halves of the state at the first time, (batch, degrees) each."""

    @abc.abstractmethod
    def field(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The derivatives of the halves."""

    def momenta(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """Of a state."""
        return state[1]

    def solve(self, seen: Float[Tensor, "batch seen state"], times: Times) -> ODESolution[Any]:
        """The trajectory as a Solution; arguments as of `forward`.

        Raises:
            ValueError: the observations have another number of positions and momenta, or are too few.
            SolverError: the solve failed.
        """
        if seen.ndim != 3 or seen.shape[2] != 2 * self.degrees or seen.shape[1] < self.context:
            raise ValueError(
                f"{type(self).__name__}: expected observations (batch, {self.context} or more, {2 * self.degrees}); "
                f"got {tuple(seen.shape)}."
            )
        return solve_ode(
            self.field, self.start(seen), times, solver=self.solver, controller=self.controller, adjoint=self.adjoint,
            rtol=self.rtol, atol=self.atol, max_steps=self.max_steps,
        )  # fmt: skip

    def forward(self, seen: Float[Tensor, "batch seen state"], times: Times) -> Float[Tensor, "batch times state"]:
        """The trajectory at `times`.

        Args:
            seen: the first observations, positions before momenta, at the first of the times and as far apart as the
                model learnt it; what lies beyond its `context` is not looked at.
            times: ascending; the first is that of the first observation.
        """
        states = self.solve(seen, times).value
        return torch.cat([states[0], self.momenta(states)], dim=-1).transpose(0, 1)
