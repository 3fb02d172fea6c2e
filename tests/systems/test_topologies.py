"""The largest flow on networks: primal meets dual, prices are slopes, and what is not unique is reported.

`RESTPOINT_TOPOLOGY_ZOO=FOLDER pytest -s tests/systems/test_topologies.py -m exhaustive` runs over every network of the
Topology Zoo, whose GraphML files FOLDER holds; the suite has drawn networks.
"""

import os
from pathlib import Path

import pytest
import torch

from restpoint.models.optimization.traffic import degenerate, maximum_flow
from restpoint.train.data import DataError
from restpoint.train.data.traffic import network

D = torch.float64
STEP = 1e-6


def write(path, nodes, cables):
    """A connected network: a random tree, and further cables."""
    g = torch.Generator().manual_seed(nodes)
    links = {(int(torch.randint(i, (), generator=g)), i) for i in range(1, nodes)}
    while len(links) < cables:
        a, b = sorted(torch.randperm(nodes, generator=g)[:2].tolist())
        links.add((a, b))
    parts = [f'<node id="{n}"/>' for n in range(nodes)]
    parts += [f'<edge source="{a}" target="{b}"/>' for a, b in sorted(links)]
    path.write_text(
        f'<graphml xmlns="http://graphml.graphdrawing.org/xmlns"><graph edgedefault="undirected">{"".join(parts)}'
        "</graph></graphml>"
    )
    return path


def programme(path, seed, equal):
    """Capacities, demands, routing and ends: drawn, or all equal, where optima are degenerate."""
    net, mean = network(path, pairs=40, k=3)
    g = torch.Generator().manual_seed(seed)
    capacity = torch.empty(len(net.edges), dtype=D).uniform_(0.5, 3, generator=g)
    demand = mean.to(D) * (0.7 * torch.randn(len(mean), generator=g, dtype=D)).exp()
    if equal:
        capacity, demand = torch.ones_like(capacity), torch.ones_like(demand)
    return capacity, demand, net.routing.to(D), net.ends.to(D), g


def check(path, seed=0, equal=False):
    """Gap and violations relative to the total, and the slopes of the total beside the prices' word.

    Returns:
        The gap, the largest violation, whether the prices are unique along the direction looked at, and whether the
        solution is reported as degenerate.
    """
    capacity, demand, routing, ends, g = programme(path, seed, equal)
    sides = [capacity[None].requires_grad_(), demand[None].requires_grad_()]
    solution = maximum_flow(*sides, routing, ends)
    assert solution.converged.all(), f"{path}: {solution.report()}"
    links, pairs = capacity.numel(), demand.numel()
    prices = solution.duals.inequality[0].detach()
    own, of_pairs, flow = prices[:links], prices[links : links + pairs], solution.value[0].detach()
    total = -float(solution.objective.detach())
    bound = float(own @ capacity.detach() + of_pairs @ demand.detach())
    violations = [routing @ flow - capacity, ends @ flow - demand, -flow, 1 - routing.mT @ own - ends.mT @ of_pairs,
                  -prices]  # fmt: skip
    worst = max(float(v.detach().max()) for v in violations)
    # What autograd says are the prices.
    slopes = torch.autograd.grad(-solution.objective.sum(), sides)
    torch.testing.assert_close(torch.cat(slopes, 1)[0], prices[: links + pairs], rtol=0, atol=1e-9)
    # The optimum is concave in the right sides: prices lie between the slopes ahead and behind, and equal both where
    # these agree.
    along = [torch.randn(s.shape, generator=g, dtype=D) for s in sides]
    moved = [
        -float(
            maximum_flow(*(s.detach() + sign * a for s, a in zip(sides, along, strict=True)), routing, ends).objective
        )
        for sign in (STEP, -STEP)
    ]
    ahead, behind = (moved[0] - total) / STEP, (total - moved[1]) / STEP
    told = float(own @ along[0][0] + of_pairs @ along[1][0])
    rounding = 1e-7 * (1 + total)  # of a difference of two totals over a step of 1e-6
    assert ahead - rounding <= told <= behind + rounding, f"{path}: {ahead} {told} {behind}"
    return abs(total - bound) / max(1.0, total), worst, behind - ahead < rounding, bool(degenerate(solution)[0])


@pytest.mark.parametrize("nodes, cables", [(2, 1), (5, 6), (9, 16), (20, 24), (30, 60), (25, 24)])
def test_drawn_networks(tmp_path, nodes, cables):
    gap, worst, unique, _ = check(write(tmp_path / "drawn.graphml", nodes, cables), nodes)
    assert gap < 1e-8
    assert worst < 1e-8
    assert unique


@pytest.mark.parametrize("nodes, cables", [(5, 6), (9, 16), (20, 24), (30, 60)])
def test_equal_capacities_are_solved_and_reported_as_degenerate(tmp_path, nodes, cables):
    gap, worst, _, reported = check(write(tmp_path / "drawn.graphml", nodes, cables), nodes, equal=True)
    assert gap < 1e-8
    assert worst < 1e-8
    assert reported


@pytest.mark.exhaustive
@pytest.mark.parametrize("equal", [False, True])
def test_every_network_of_the_topology_zoo(equal):
    folder = os.environ.get("RESTPOINT_TOPOLOGY_ZOO")
    if folder is None:
        pytest.skip("RESTPOINT_TOPOLOGY_ZOO names no folder of GraphML files")
    files = sorted(Path(folder).rglob("*.graphml"))
    assert files, f"{folder} holds no GraphML file"
    found, unusable = {}, {}
    for i, path in enumerate(files):
        try:
            found[path.name] = check(path, i, equal)
        except DataError as error:
            unusable[path.name] = str(error)
    gaps, violations, unique, reported = zip(*found.values(), strict=True)
    print(
        f"{len(found)} networks, {len(unusable)} unusable: gap {max(gaps):.1e}, violation {max(violations):.1e}, "
        f"{sum(unique)} with one slope, {sum(reported)} reported as degenerate"
    )
    assert max(gaps) < 1e-8
    assert max(violations) < 1e-8
    # A kink that is not reported would be a silent error.
    assert all(one or told for one, told in zip(unique, reported, strict=True))
    assert all("holds no link" in message for message in unusable.values())
