"""ODE-RNNs: recurrent networks whose hidden state follows an ODE between observations."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, ConstantController, Controller, Euler, Method, solve_ode
from ...solvers.ode.adjoint import Adjoint
from ..registry import register_model
from .path import check_series


def tanh_layers(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """A perceptron with `depth` layers of `width` units and tanh between them."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class ODERNN(nn.Module):
    """A recurrent layer: dh/dt = field(h) from one observation to the next, and there a gated unit reads it.

    Each series has its own points of time: between two of them time is scaled to one unit, sample by sample, which is
    the same as solving over the union of all times, in as many solves as the longest series has intervals. A point at
    which nothing was observed is passed by; what stands where a value is missing is not read.

    Args:
        variables: of the series.
        hidden: length of h.
        width, depth: layers of the field.
        span: so long is a unit of time of the field.
        solver: of each interval; Euler(), as in the paper.
        controller: of its steps, an interval being of length 1; one step by default.
        adjoint: how each interval's solve is differentiated; None takes `CheckpointAdjoint(recursive=True)`, whose
            memory hardly grows with the steps.
        rtol, atol: tolerances of an adaptive controller.

    Source: Rubanova, Chen and Duvenaud 2019, Latent ODEs for irregularly-sampled time series, algorithm 1.
    """

    def __init__(
        self,
        variables: int,
        hidden: int,
        *,
        width: int = 50,
        depth: int = 2,
        span: float = 1.0,
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-4,
    ) -> None:
        super().__init__()
        self.variables, self.hidden, self.span = variables, hidden, span
        self.field = tanh_layers(hidden, width, depth, hidden)
        self.unit = nn.GRUCell(2 * variables, hidden)
        self.solver = Euler() if solver is None else solver
        self.controller = ConstantController(dt=1.0) if controller is None else controller
        self.adjoint = CheckpointAdjoint(recursive=True) if adjoint is None else adjoint
        self.rtol, self.atol = rtol, atol

    def forward(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
        backwards: bool = False,
    ) -> Float[Tensor, "batch hidden"]:
        """The hidden state after the last point of time, or running backwards after the first.

        Args:
            times: ascending in each row; a series that has ended repeats its last time.
            values: what was observed.
            observed: where.
            backwards: run from the last point to the first.

        Raises:
            ValueError: shapes that do not fit each other or the layer, or times that descend.
            SolverError: a solve failed.
        """
        check_series(times, values, observed)
        if values.shape[-1] != self.variables:
            raise ValueError(f"ODERNN: expected {self.variables} variables; got {values.shape[-1]}.")
        seen = observed.to(values.dtype)
        inputs = torch.cat([torch.where(observed, values, torch.zeros_like(values)), seen], -1)
        points = observed.any(-1)
        gaps = times.diff(dim=1).to(values.dtype) / self.span
        order = list(range(times.shape[1]))
        if backwards:
            gaps = -gaps
            order.reverse()
        h = values.new_zeros(len(values), self.hidden)
        for place, i in enumerate(order):
            if place:
                h = self._evolve(h, gaps[:, min(i, order[place - 1])])
            h = torch.where(points[:, i : i + 1], self.unit(inputs[:, i], h), h)
        return h

    def _evolve(self, h: Tensor, gap: Tensor) -> Tensor:
        solution = solve_ode(
            self._rate,
            h,
            (0.0, 1.0),
            (gap,),
            solver=self.solver,
            controller=self.controller,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
        )
        return solution.value[-1]

    def _rate(self, u: Tensor, h: Tensor, gap: Tensor) -> Tensor:
        return gap.unsqueeze(-1) * self.field(h)


class ODERNNClassifier(nn.Module):
    """Series classifier: an `ODERNN` that runs forwards, and a perceptron on its last state and the statics.

    Args:
        variables: of the series.
        statics: values known from the start.
        num_classes: 1 for the logit of an event, which then has no dimension of its own.
        hidden: length of the recurrent state.
        width, depth: layers of its field; the classifier has one layer of `width`.
        span: so long is a unit of time.
        dropout: before the classifier.
        solver, controller, adjoint, rtol, atol: as of `ODERNN`.

    Source: Rubanova, Chen and Duvenaud 2019, section 3.1 and the classification of section 4.4.
    """

    def __init__(
        self,
        *,
        variables: int,
        statics: int = 0,
        num_classes: int = 1,
        hidden: int = 40,
        width: int = 50,
        depth: int = 2,
        span: float = 1.0,
        dropout: float = 0.0,
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-4,
    ) -> None:
        super().__init__()
        self.statics, self.num_classes = statics, num_classes
        self.recurrent = ODERNN(
            variables, hidden, width=width, depth=depth, span=span, solver=solver, controller=controller,
            adjoint=adjoint, rtol=rtol, atol=atol,
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(dropout), tanh_layers(hidden + statics, width, 1, num_classes))

    def forward(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
        static: Float[Tensor, "batch statics"] | None = None,
    ) -> Float[Tensor, " batch"] | Float[Tensor, "batch classes"]:
        """Logits of a batch of series; arguments and errors as of `ODERNN`, `static` what is known from the start."""
        h = with_static(self.recurrent(times, values, observed), static, self.statics)
        logits = self.head(h)
        return logits.squeeze(-1) if self.num_classes == 1 else logits


def with_static(state: Tensor, static: Tensor | None, statics: int) -> Tensor:
    """`state` (batch, n) with the statics behind it.

    Raises:
        ValueError: these are not of length `statics`.
    """
    if not statics:
        return state
    if static is None or static.shape[-1] != statics:
        raise ValueError(f"static: expected {statics} values a series; got {None if static is None else static.shape}.")
    return torch.cat([state, static.to(state.dtype)], -1)


@register_model(family="series", task="series-classification", accepts=ODERNNClassifier)
def ode_rnn_small(**arguments: Any) -> ODERNNClassifier:
    """An ODE-RNN of 40 hidden states."""
    return ODERNNClassifier(**{"variables": 12, **arguments})


@register_model(family="series", task="series-classification", accepts=ODERNNClassifier)
def test_ode_rnn(**arguments: Any) -> ODERNNClassifier:
    """An ODE-RNN small enough for tests."""
    return ODERNNClassifier(**{"variables": 3, "hidden": 4, "width": 8, "depth": 1, **arguments})
