"""Traffic in a network: the largest flow over given paths under the capacities of the links, and a layer made of it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...solvers.optimize import QPSolution, linear_program, quadratic_program
from ...solvers.options import check_integer, check_real
from ..registry import register_model


def maximum_flow(
    capacities: Float[Tensor, "*batch links"], demands: Float[Tensor, "*batch pairs"],
    links: Float[Tensor, "links paths"], ends: Float[Tensor, "pairs paths"], **options: Any,
) -> QPSolution:  # fmt: skip
    """The largest total flow over the paths that no link and no pair of nodes has too much of: a linear programme.

    Args:
        capacities: of the links.
        demands: the most that each pair of nodes wants to send.
        links: 1 where a path uses a link.
        ends: 1 where a path joins a pair.
        **options: of `linear_program`.

    Returns:
        `value` are the flows of the paths (batch, paths), `objective` is minus their sum. The first of
        `duals.inequality` are the links' prices: what one more unit of a capacity would add to the total,
        d(total)/d(capacity); the next ones the pairs'. Where the optimum is degenerate (`degenerate`), they hold in
        one direction only.

    Source: Ahuja, Magnanti and Orlin 1993, section 17.4 (path formulation).
    """
    n = links.shape[1]
    G = torch.cat([links, ends, -torch.eye(n, dtype=links.dtype, device=links.device)])
    lower = torch.zeros(n, dtype=links.dtype, device=links.device)
    parts = torch.broadcast_tensors(capacities[..., :1], demands[..., :1])[0].shape[:-1]
    sides = [side.expand(*parts, -1) for side in (capacities, demands, lower)]
    return linear_program(-torch.ones(n, dtype=links.dtype, device=links.device), G, torch.cat(sides, -1), **options)


def degenerate(solution: QPSolution, tolerance: float = 1e-9) -> Bool[Tensor, " batch"]:
    """Which samples' flows or prices are not unique, so that no derivative of them exists.

    Prices are not unique where more constraints hold as equations than there are paths, and flows where fewer have a
    positive price: whether that is so is told by counting (a sufficient and, but for repeated rows, necessary sign).
    """
    prices = solution.duals.inequality
    paths = solution.value.shape[1]
    tight = (solution.slack <= tolerance * (1 + solution.value.abs().amax(1, keepdim=True))).sum(1)
    return (tight > paths) | ((prices > tolerance).sum(1) < paths)


class TrafficLayer(nn.Module):
    """Flows of the pairs of nodes of a network whose links' capacities are learnt from what arrived.

    Flows f over the paths maximise what arrives less a small share of what it costs, costs'f + spread/2 |f|^2, under
    the capacities and demands. The square spreads traffic over equal paths and makes the optimum unique, so that its
    derivative with respect to the capacities exists almost everywhere.

    Args:
        links, pairs, paths: how many there are; `fit` says which paths use which links.
        spread: weight of the square, for flows whose largest capacity is about one.
        detour: cost of every further link of a path.

    Attributes:
        log_capacities: learnt (links,).
        routing, ends: 1 where a path uses a link (links, paths), and where it joins a pair (pairs, paths).
    """

    routing: Tensor
    ends: Tensor

    def __init__(self, *, links: int, pairs: int, paths: int, spread: float = 0.1, detour: float = 0.05) -> None:
        super().__init__()
        for name, count in (("links", links), ("pairs", pairs), ("paths", paths)):
            check_integer("TrafficLayer: ", name, count)
        self.spread = check_real("TrafficLayer: ", "spread", spread, lambda v: v > 0, "positive and finite")
        self.detour = check_real("TrafficLayer: ", "detour", detour, lambda v: v >= 0, "finite and not negative")
        self.log_capacities = nn.Parameter(torch.zeros(links))
        self.register_buffer("routing", torch.zeros(links, paths))
        self.register_buffer("ends", torch.zeros(pairs, paths))

    def fit(self, routing: Float[Tensor, "links paths"], ends: Float[Tensor, "pairs paths"]) -> None:
        """Take over the paths.

        Raises:
            ValueError: other numbers of links, pairs or paths than the layer was made for.
        """
        for name, own, new in (("routing", self.routing, routing), ("ends", self.ends, ends)):
            if own.shape != new.shape:
                raise ValueError(f"TrafficLayer: {name}: expected shape {tuple(own.shape)}; got {tuple(new.shape)}.")
            own.copy_(new)

    @property
    def capacities(self) -> Float[Tensor, " links"]:
        """Of the links."""
        return self.log_capacities.exp()

    def forward(self, demands: Float[Tensor, "batch pairs"]) -> Float[Tensor, "batch pairs"]:
        """What arrives of each pair's demand."""
        return self.solve(demands).value @ self.ends.mT

    def solve(self, demands: Float[Tensor, "batch pairs"]) -> QPSolution:
        """The flows of the paths, with the prices of links and pairs."""
        paths = self.routing.shape[1]
        eye = torch.eye(paths, dtype=demands.dtype, device=demands.device)
        worth = 1 - self.detour * (self.routing.sum(0) - 1)
        G = torch.cat([self.routing, self.ends, -eye])
        sides = [self.capacities.expand(len(demands), -1), demands, demands.new_zeros(len(demands), paths)]
        return quadratic_program(self.spread * eye, -worth, G, torch.cat(sides, 1), throw="warn")


@register_model(family="optimization", task="traffic", accepts=TrafficLayer)
def traffic(**arguments: Any) -> TrafficLayer:
    """Largest flows over paths of a network whose capacities are learnt; by default of the size of Abilene."""
    return TrafficLayer(**{"links": 28, "pairs": 40, "paths": 120, **arguments})
