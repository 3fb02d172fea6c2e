"""Implicit graph networks: what the nodes say is the one rest point of what they hear of each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers import ImplicitAdjoint, Picard, Solution, fixed_point
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ...solvers.options import check_real
from ..deq.layer import Problem
from ..registry import register_model
from .graph import Graph


@dataclasses.dataclass(frozen=True)
class WellPosed:
    """Why there is exactly one rest point.

    In the norm max_iv |X_iv| / x_v, where x is positive and A x <= perron x, the map X -> phi(A X W' + B) shrinks
    distances by `contraction` = `norm` * `perron` at least, whatever B is. Below one it has one rest point, which the
    plain iteration reaches from everywhere.

    Attributes:
        norm: the largest sum of absolute values in a row of W.
        perron: an upper bound on the largest eigenvalue of the non-negative matrix A.

    Source: Gu et al. 2020, theorem 3.1 and section 3.3 for the condition, corollary 2.1 for the map's phi.
    """

    norm: float
    perron: float

    @property
    def contraction(self) -> float:
        """The factor by which the map shrinks distances."""
        return self.norm * self.perron


class ImplicitGraph(nn.Module):
    """X = relu(A X W' + B), the unique rest point for every B: the i-th row is what node i says.

    W is the parameter `weight` with every row scaled down, where need be, to the sum of absolute values
    kappa / perron(A), so that the rest point is unique for whatever parameters: `well_posed` says why. All nodes are
    one sample of the solve, since each hears of the others.

    Args:
        channels: columns of X.
        kappa: how close to the limit of well-posedness W may come, between 0 and 1. The nearer to 1, the farther
            through the graph nodes are heard, and the more steps a solve takes.
        solver, adjoint, rtol, atol, max_steps: of `fixed_point`.

    Raises:
        ValueError: kappa is not between 0 and 1.

    Source: Gu, Chang, Zhu, Sojoudi and El Ghaoui 2020, equation 4. They project the parameter onto that ball after
    every step of the optimiser, which makes most of its entries zero; here the map itself is kept inside, so that no
    optimiser can leave it, and no entry stops learning.
    """

    def __init__(
        self,
        channels: int,
        *,
        kappa: float = 0.9,
        solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 100,
    ) -> None:
        super().__init__()
        self.kappa = check_real("ImplicitGraph: ", "kappa", kappa, lambda k: 0 < k < 1, "between 0 and 1")
        self.weight = nn.Parameter(torch.empty(channels, channels))
        with torch.no_grad():
            # Near the identity, whose rest point is personalised PageRank of what is injected.
            self.weight.uniform_(-0.1 / channels, 0.1 / channels).add_(torch.eye(channels))
        self.solver = Picard() if solver is None else solver
        self.adjoint = ImplicitAdjoint() if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def matrix(self, graph: Graph) -> Float[Tensor, "channels channels"]:
        """W as this graph allows it."""
        sums = self.weight.abs().sum(1, keepdim=True)
        return self.weight * (self.kappa / graph.perron / sums).clamp(max=1.0)

    def well_posed(self, graph: Graph) -> WellPosed:
        """The certificate of the rest point on this graph."""
        return WellPosed(float(self.matrix(graph).detach().double().abs().sum(1).max()), graph.perron)

    def problem(self, graph: Graph, injection: Float[Tensor, "nodes channels"]) -> Problem:
        """The fixed-point problem, whose one sample is the graph: its state is (1, nodes, channels)."""
        matrix, weights, edges = self.matrix(graph).T, graph.weights.to(injection.dtype), graph.looped

        def step(x: Tensor, b: Tensor) -> Tensor:
            return F.relu(edges.matmul(weights, x[0] @ matrix) + b[0]).unsqueeze(0)

        b = injection.unsqueeze(0)
        return Problem(step, torch.zeros_like(b), (b,))

    def solve_problem(self, problem: Problem) -> Solution[Tensor]:
        """The rest point of what `problem` returned."""
        return fixed_point(
            problem.f, problem.z0, problem.args, solver=self.solver, adjoint=self.adjoint, rtol=self.rtol,
            atol=self.atol, max_steps=self.max_steps,
        )  # fmt: skip

    def forward(self, graph: Graph, injection: Float[Tensor, "nodes channels"]) -> Float[Tensor, "nodes channels"]:
        """The rest point."""
        return self.solve_problem(self.problem(graph, injection)).value[0]

    def extra_repr(self) -> str:
        """The options, for repr()."""
        names = ("kappa", "solver", "adjoint", "rtol", "atol", "max_steps")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class IGNN(nn.Module):
    """Classifies the nodes of a graph: an injection A U Omega + b, an implicit layer, a linear readout.

    Args:
        num_classes: of the nodes.
        features: of every node, as the graph's.
        channels: of the state.
        kappa: of the `ImplicitGraph`.
        dropout: probability with which a feature in training, and a channel of the state before the readout, is zero.
        solver, adjoint, rtol, atol, max_steps: of the `ImplicitGraph`.

    Raises (from a forward pass):
        ValueError: the graph has another number of features.

    Source: Gu et al. 2020, section 3.1 for the layer; the injection hears of neighbours once, as in their experiments
    with nodes. Dropout is ours; it is drawn outside of the solve, which is of one map.
    """

    def __init__(
        self, *, num_classes: int = 7, features: int = 1433, channels: int = 64, kappa: float = 0.9,
        dropout: float = 0.5, solver: FixedPointSolver | None = None, adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4, atol: float = 0.0, max_steps: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.features, self.num_features, self.dropout = num_classes, features, channels, dropout
        self.omega = nn.Parameter(torch.empty(features, channels))
        nn.init.xavier_uniform_(self.omega)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.implicit = ImplicitGraph(
            channels, kappa=kappa, solver=solver, adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps
        )
        self.classifier = nn.Linear(channels, num_classes)

    def inject(self, graph: Graph) -> Float[Tensor, "nodes channels"]:
        """What every node is told from outside."""
        if graph.features != self.features:
            raise ValueError(f"IGNN: expected nodes of {self.features} features; got {graph.features}.")
        values = F.dropout(graph.values, self.dropout, self.training)
        return graph.looped.matmul(graph.weights, graph.read(self.omega, values)) + self.bias

    def problem(self, graph: Graph) -> Problem:
        """The fixed-point problem, as `restpoint.solvers.diagnose` takes it."""
        return self.implicit.problem(graph, self.inject(graph))

    def solve_problem(self, problem: Problem) -> Solution[Tensor]:
        """The rest point of a graph, given as its `problem`."""
        return self.implicit.solve_problem(problem)

    def solve(self, graph: Graph) -> Solution[Tensor]:
        """The rest point as a Solution: how many steps the graph took, how well it converged."""
        return self.solve_problem(self.problem(graph))

    def well_posed(self, graph: Graph) -> WellPosed:
        """Why this graph has exactly one rest point."""
        return self.implicit.well_posed(graph)

    def forward_features(self, graph: Graph) -> Float[Tensor, "nodes channels"]:
        """What every node says at rest."""
        return self.solve(graph).value[0]

    def forward_head(self, state: Float[Tensor, "..."]) -> Float[Tensor, "nodes num_classes"]:
        """Logits of a rest point, with or without the leading dimension of the solve."""
        state = state[0] if state.ndim == 3 else state
        return self.classifier(F.dropout(state, self.dropout, self.training))

    def forward(self, graph: Graph) -> Float[Tensor, "nodes num_classes"]:
        """Logits."""
        return self.forward_head(self.forward_features(graph))


@register_model(family="graph", task="node-classification", accepts=IGNN)
def ignn_small(**arguments: Any) -> IGNN:
    """An implicit graph network for citation networks of a few thousand nodes: 64 channels."""
    return IGNN(**arguments)


@register_model(family="graph", task="node-classification", accepts=IGNN)
def test_ignn(**arguments: Any) -> IGNN:
    """An implicit graph network for tests, of nodes with 8 features."""
    return IGNN(**{"features": 8, "channels": 6, "num_classes": 3, **arguments})
