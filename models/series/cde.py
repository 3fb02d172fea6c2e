"""Neural controlled differential equations."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...solvers.ode import RK4, CheckpointAdjoint, ConstantController, Controller, Method, ODESolution, solve_ode
from ...solvers.ode.adjoint import Adjoint
from ..registry import register_model
from .path import ControlPath, observation_path


class CDEField(nn.Module):
    """The matrix f(z) of dz = f(z) dX: a perceptron with rectified layers and tanh at its end.

    Args:
        hidden: length of z.
        channels: of X.
        width: of the layers inside.
        depth: how many of these there are, at least 1.

    Source: Kidger et al. 2020, section 4 and appendix D (the tanh).
    """

    def __init__(self, hidden: int, channels: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [hidden, *[width] * depth]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.shape = (hidden, channels)
        self.layers = nn.Sequential(*layers, nn.Linear(width, hidden * channels), nn.Tanh())

    def forward(self, z: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch hidden channels"]:
        """f(z)."""
        return self.layers(z).unflatten(-1, self.shape)


class NeuralCDE(nn.Module):
    """Series classifier: where dz = f(z) dX leads from z(t0) = initial(X(t0)), along the path X of the observations.

    X holds the time, the variables, and with `intensity` the counts of their observations; each variable is
    interpolated between its own observations, so that a missing value is one that does not exist. Unlike in the paper
    every series has its own points of time, and X is followed from each to the next (see `ControlPath`). What is known
    from the start (`static`) enters z(t0).

    Args:
        variables: of the series.
        statics: values known from the start.
        num_classes: 1 for the logit of an event, which then has no dimension of its own.
        hidden: length of z.
        width, depth: of the `CDEField`.
        span: so long is a unit of the channel of time.
        intensity: what one observation adds to its variable's channel of counts; 0 leaves these channels out.
        kind: of the path, as of `spline_path`.
        dropout: of the end of the trajectory.
        solver: an integrator of `restpoint.solvers.ode`; RK4() by default, as in the paper.
        controller: of its steps, whose unit is the interval between two points of time; one step an interval by
            default. Where the path bends a step ends and another begins, whatever the controller.
        adjoint: how the trajectory is differentiated; None takes `CheckpointAdjoint(recursive=True)`, whose memory
            hardly grows with the steps.
        rtol, atol: tolerances of an adaptive controller.
        max_steps: budget of steps.

    Source: Kidger, Morrill, Foster and Lyons 2020, Neural controlled differential equations for irregular time series.
    """

    def __init__(
        self,
        *,
        variables: int,
        statics: int = 0,
        num_classes: int = 1,
        hidden: int = 32,
        width: int = 64,
        depth: int = 2,
        span: float = 1.0,
        intensity: float = 0.0,
        kind: str = "hermite",
        dropout: float = 0.0,
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-4,
        max_steps: int = 100_000,
    ) -> None:
        super().__init__()
        if min(variables, num_classes, hidden, width, depth) < 1 or statics < 0:
            raise ValueError("NeuralCDE: sizes must be at least 1, and statics at least 0.")
        self.variables, self.statics, self.num_classes = variables, statics, num_classes
        self.span, self.intensity, self.kind = span, intensity, kind
        channels = 1 + variables * (2 if intensity else 1)
        self.initial = nn.Linear(channels + statics, hidden)
        self.field = CDEField(hidden, channels, width, depth)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_classes)
        self.solver = RK4() if solver is None else solver
        self.controller = ConstantController(dt=1.0) if controller is None else controller
        self.adjoint = CheckpointAdjoint(recursive=True) if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def path(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
    ) -> ControlPath:
        """The control path of a batch of series; arguments as of `forward`."""
        return observation_path(
            times, values, observed, span=self.span, intensity=self.intensity, kind=self.kind
        )  # fmt: skip

    def solve(self, path: ControlPath, static: Float[Tensor, "batch statics"] | None = None) -> ODESolution[Tensor]:
        """The trajectory of z along a path: its value is z at the path's start and end, (2, batch, hidden).

        Raises:
            SolverError: the solve failed.
        """
        coefficients = path.coefficients
        start = coefficients[:, 0, 0]
        z0 = self.initial(torch.cat([start] if not self.statics or static is None else [start, static], -1))
        bends = tuple(float(i) for i in range(1, int(path.end)))
        return solve_ode(
            self._rate,
            z0,
            (0.0, path.end),
            (coefficients,),
            solver=self.solver,
            controller=dataclasses.replace(self.controller, jump_t=bends),
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )

    def forward(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
        static: Float[Tensor, "batch statics"] | None = None,
    ) -> Float[Tensor, " batch"] | Float[Tensor, "batch classes"]:
        """Logits of a batch of series.

        Args:
            times: ascending in each row; a series that has ended repeats its last time.
            values: standardised; what stands where nothing was observed is not read.
            observed: which of them were measured.
            static: what is known from the start.

        Raises:
            ValueError: shapes that do not fit each other or the model, or times that descend.
            SolverError: the solve failed.
        """
        if values.shape[-1] != self.variables:
            raise ValueError(f"NeuralCDE: expected {self.variables} variables; got {values.shape[-1]}.")
        if self.statics and (static is None or static.shape[-1] != self.statics):
            raise ValueError(f"NeuralCDE: expected static of {self.statics} values a series.")
        end = self.solve(self.path(times, values, observed), static).value[-1]
        logits = self.head(self.dropout(end))
        return logits.squeeze(-1) if self.num_classes == 1 else logits

    def _rate(self, s: Tensor, z: Tensor, coefficients: Tensor) -> Tensor:
        slope = ControlPath(coefficients).derivative(s)
        return torch.bmm(self.field(z), slope.unsqueeze(-1).to(z.dtype)).squeeze(-1)


@register_model(family="series", task="series-classification", accepts=NeuralCDE)
def neural_cde_small(**arguments: Any) -> NeuralCDE:
    """A neural CDE of 32 hidden states and two layers of 64 units for short multivariate series."""
    return NeuralCDE(**{"variables": 12, **arguments})


@register_model(family="series", task="series-classification", accepts=NeuralCDE)
def test_neural_cde(**arguments: Any) -> NeuralCDE:
    """A neural CDE small enough for tests."""
    return NeuralCDE(**{"variables": 3, "hidden": 4, "width": 8, "depth": 1, **arguments})
