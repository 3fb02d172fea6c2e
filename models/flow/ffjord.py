"""FFJORD: free-form continuous normalising flows for two-dimensional and tabular data."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, Controller, Method
from ...solvers.ode.adjoint import Adjoint
from ..registry import register_model
from .divergence import Divergence, named_divergence
from .layer import ContinuousFlow


class ConcatSquash(nn.Module):
    """A linear layer whose output is scaled by a gate and shifted by a bias that depend on time:
    (W x + b) sigmoid(a t + c) + d t.

    Args:
        inputs: features in.
        outputs: features out.

    Source: Grathwohl et al. 2019, appendix B.1 and their code.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(
        self, t: Float[Tensor, ""] | Float[Tensor, " batch"], x: Float[Tensor, "batch inputs"]
    ) -> Float[Tensor, "batch outputs"]:
        """The layer's output at time t, which is one number, or one a sample."""
        time = t.to(x.dtype).reshape(-1, 1)
        return self.linear(x) * torch.sigmoid(self.gate(time)) + self.shift(time)


class ConcatSquashField(nn.Module):
    """A multilayer perceptron of `ConcatSquash` layers with tanh between them, from a space into itself.

    Args:
        dim: of the space.
        hidden: width of each hidden layer.
    """

    def __init__(self, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConcatSquash(a, b) for a, b in itertools.pairwise((dim, *hidden, dim)))

    def forward(
        self, t: Float[Tensor, ""] | Float[Tensor, " batch"], y: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch dim"]:
        """The derivative at time t and state y."""
        for layer in self.layers[:-1]:
            y = layer(t, y).tanh()
        return self.layers[-1](t, y)


class FFJORD(ContinuousFlow):
    """A continuous normalising flow whose field is a perceptron of concat-squash layers; its base is standard normal.

    Args:
        dim: of a sample.
        hidden: width of each hidden layer.
        divergence: "exact", "rademacher", "gaussian" (Hutchinson's estimate with that noise) or "hutch++"; or any
            `Divergence`.
        t: the base's time and the data's.
        solver, controller, rtol, atol, max_steps: of the `ContinuousFlow`.
        adjoint: likewise; None takes `CheckpointAdjoint(recursive=True)`, whose memory hardly grows with the steps.

    Raises:
        ValueError: an unknown divergence.

    Source: Grathwohl et al. 2019. One flow instead of a stack of several, and a fixed end time instead of a trained
    one, as in their experiments in two dimensions.
    """

    def __init__(
        self,
        *,
        dim: int = 2,
        hidden: tuple[int, ...] = (64, 64, 64),
        divergence: str | Divergence = "exact",
        t: tuple[float, float] = (0.0, 1.0),
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_steps: int = 10_000,
    ) -> None:
        super().__init__(
            ConcatSquashField(dim, hidden),
            dim,
            divergence=named_divergence(divergence, "FFJORD"),
            t=t,
            solver=solver,
            controller=controller,
            adjoint=CheckpointAdjoint(recursive=True) if adjoint is None else adjoint,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
        )


@register_model(family="flow", task="density", accepts=FFJORD)
def ffjord_small(**arguments: Any) -> FFJORD:
    """A continuous flow for densities in the plane, with the exact trace: three hidden layers of 64."""
    return FFJORD(**arguments)


@register_model(family="flow", task="density", accepts=FFJORD)
def ffjord_tabular(**arguments: Any) -> FFJORD:
    """A continuous flow for tables of tens of columns, with Hutchinson's estimate: two hidden layers of 128."""
    return FFJORD(**{"dim": 8, "hidden": (128, 128), "divergence": "rademacher", **arguments})
