"""Graph neural diffusion: what the nodes know spreads along the edges, as far as attention lets it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, Controller, Method, ODESolution, PIDController, Tsit5, solve_ode
from ...solvers.ode.adjoint import Adjoint
from ..registry import register_model
from .graph import Graph
from .sparse import Pattern


class Diffusivity(nn.Module):
    """How much every node hears of each of its neighbours and itself: attention, averaged over heads.

    Args:
        channels: of the nodes' states.
        width: of keys and queries, all heads together.
        heads: which share the width equally.

    Raises:
        ValueError: the heads do not divide the width.

    Source: Chamberlain et al. 2021, equation 10. Keys and queries start from one small number, with which every node
    hears all of its neighbours alike, as in section 6.1 there.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Diffusivity: {heads} heads cannot share a width of {width} equally.")
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.key, self.query = nn.Linear(channels, width), nn.Linear(channels, width)
        for layer in (self.key, self.query):
            nn.init.constant_(layer.weight, 1e-5)
            nn.init.zeros_(layer.bias)

    def forward(self, edges: Pattern, x: Float[Tensor, "nodes channels"]) -> Float[Tensor, " edges"]:
        """Of every edge its share in what its row hears: positive, and along every row they add up to one."""
        keys = self.key(x).unflatten(1, (self.heads, -1))
        queries = self.query(x).unflatten(1, (self.heads, -1))
        scores = (queries[edges.row] * keys[edges.column]).sum(2) * self.scale
        return edges.softmax(scores).mean(1)


class GRAND(nn.Module):
    """Classifies the nodes of a graph: an encoder, diffusion dX/dt = speed (A - I) X + source X(0), a linear readout.

    The diffusivity A holds attention along the edges. Linear diffusion computes it once, from the state that it starts
    with; else it is that of the moment, A(X). The speed is a learnt number between 0 and 1; the source is another,
    which begins at zero. All nodes are one sample of the solve.

    Args:
        num_classes: of the nodes.
        features: of every node, as the graph's.
        channels: of the state.
        linear: whether A stays as it is at the start.
        source: whether the initial state flows in all the time.
        time: how long diffusion goes on.
        attention, heads: of the `Diffusivity`.
        input_dropout: probability with which a feature is zero in training.
        dropout: with which a channel is, before and after the diffusion.
        solver, controller, adjoint, rtol, atol, max_steps: of `solve_ode`. The adjoint is not the continuous one, for
            diffusion run backwards grows without bound; None takes `CheckpointAdjoint(recursive=True)`, whose memory
            hardly grows with the steps.

    Raises:
        ValueError: the heads do not divide the width of the attention; the time is not positive.

    Raises (from a forward pass):
        ValueError: the graph has another number of features.

    Source: Chamberlain, Rowbottom, Gorinova, Webb, Rossi and Bronstein 2021, section 4 (GRAND-l and GRAND-nl); speed
    and source are not in their equation, but in the code of their experiments. Left out are rewiring, and the channels
    of zeros, which this diffusion, blind to channels, would leave zero.
    """

    def __init__(
        self, *, num_classes: int = 7, features: int = 1433, channels: int = 80, linear: bool = True,
        source: bool = True, time: float = 18.3, attention: int = 128, heads: int = 8, input_dropout: float = 0.5,
        dropout: float = 0.05, solver: Method | None = None, controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None, rtol: float = 1e-3, atol: float = 1e-3,
        max_steps: int = 10_000,
    ) -> None:  # fmt: skip
        super().__init__()
        if not (time > 0 and math.isfinite(time)):
            raise ValueError(f"GRAND: time must be positive; got {time}.")
        self.num_classes, self.features, self.num_features = num_classes, features, channels
        self.linear, self.time, self.input_dropout, self.dropout = linear, time, input_dropout, dropout
        self.encoder = nn.Parameter(torch.empty(features, channels))
        nn.init.xavier_uniform_(self.encoder)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.diffusivity = Diffusivity(channels, attention, heads)
        self.speed = nn.Parameter(torch.zeros(()))
        self.source = nn.Parameter(torch.zeros(())) if source else None
        self.classifier = nn.Linear(channels, num_classes)
        self.solver = Tsit5() if solver is None else solver
        self.controller = PIDController() if controller is None else controller
        self.adjoint = CheckpointAdjoint(recursive=True) if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def encode(self, graph: Graph) -> Float[Tensor, "nodes channels"]:
        """The state that the diffusion starts with."""
        if graph.features != self.features:
            raise ValueError(f"GRAND: expected nodes of {self.features} features; got {graph.features}.")
        values = F.dropout(graph.values, self.input_dropout, self.training)
        return F.dropout(graph.read(self.encoder, values) + self.bias, self.dropout, self.training)

    def diffuse(self, graph: Graph, start: Float[Tensor, "nodes channels"]) -> ODESolution[Tensor]:
        """The diffusion as a Solution, whose value is (2, 1, nodes, channels): the states at its start and end."""
        # Through the arguments, so that what they were computed from is differentiated once, and not at every step.
        held = (self.diffusivity(graph.looped, start).unsqueeze(0),) if self.linear else ()
        return solve_ode(
            functools.partial(self._flow, graph.looped), start.unsqueeze(0), (0.0, self.time),
            (start.unsqueeze(0), *held), solver=self.solver, controller=self.controller, adjoint=self.adjoint,
            rtol=self.rtol, atol=self.atol, max_steps=self.max_steps,
        )  # fmt: skip

    def _flow(self, edges: Pattern, t: Tensor, x: Tensor, start: Tensor, held: Tensor | None = None) -> Tensor:
        shares = self.diffusivity(edges, x[0]) if held is None else held[0]
        flow = self.speed.sigmoid() * (edges.matmul(shares, x[0]).unsqueeze(0) - x)
        return flow if self.source is None else flow + self.source * start

    def solve(self, graph: Graph) -> ODESolution[Tensor]:
        """The diffusion of a graph: how many steps it took."""
        return self.diffuse(graph, self.encode(graph))

    def forward_features(self, graph: Graph) -> Float[Tensor, "nodes channels"]:
        """What every node knows at the end."""
        return self.solve(graph).value[-1, 0]

    def forward_head(self, state: Float[Tensor, "nodes channels"]) -> Float[Tensor, "nodes num_classes"]:
        """Logits of the state at the end."""
        return self.classifier(F.dropout(state.relu(), self.dropout, self.training))

    def forward(self, graph: Graph) -> Float[Tensor, "nodes num_classes"]:
        """Logits."""
        return self.forward_head(self.forward_features(graph))


@register_model(family="graph", task="node-classification", accepts=GRAND)
def grand_small(**arguments: Any) -> GRAND:
    """Linear graph diffusion for citation networks of a few thousand nodes: 80 channels, 8 heads."""
    return GRAND(**arguments)


@register_model(family="graph", task="node-classification", accepts=GRAND)
def grand_nl_small(**arguments: Any) -> GRAND:
    """Nonlinear graph diffusion, whose attention is that of the moment, otherwise as `grand_small`."""
    return GRAND(**{"linear": False, **arguments})


@register_model(family="graph", task="node-classification", accepts=GRAND)
def test_grand(**arguments: Any) -> GRAND:
    """Nonlinear graph diffusion for tests, of nodes with 8 features."""
    sizes = {"features": 8, "channels": 6, "num_classes": 3, "attention": 4, "heads": 2, "time": 2.0}
    return GRAND(**{**sizes, "linear": False, **arguments})
