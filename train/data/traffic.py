"""Traffic on networks of the Topology Zoo: demands by a gravity model, and what of them arrives."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.optimization.traffic import TrafficLayer
from .batches import generator_of, part_of
from .source import DataError, register_data

Flows = tuple[Float[Tensor, "batch pairs"], Float[Tensor, "batch links"], Float[Tensor, "batch pairs"]]

SPACE = "{http://graphml.graphdrawing.org/xmlns}"
TRAIN, TEST = 256, 128


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of directed links, with a choice of paths.

    Attributes:
        nodes: their names.
        edges: pairs of nodes, each direction by itself.
        pairs: the pairs of nodes that send.
        routing: 1 where a path uses an edge (links, paths).
        ends: 1 where a path joins a pair (pairs, paths).
    """

    nodes: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    routing: Float[Tensor, "links paths"]
    ends: Float[Tensor, "pairs paths"]


def read_graphml(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Names of the nodes of the largest connected part, and its links, once in each direction.

    Raises:
        DataError: the file is no GraphML, or holds no link.
    """
    try:
        graph = ElementTree.parse(path).getroot().find(f"{SPACE}graph")
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} cannot be read as GraphML: {error}.") from error
    if graph is None:
        raise DataError(f"{path} cannot be read as GraphML: it holds no graph.")
    names = [node.attrib["id"] for node in graph.iter(f"{SPACE}node")]
    number = {name: i for i, name in enumerate(names)}
    links: dict[tuple[int, int], None] = {}
    for edge in graph.iter(f"{SPACE}edge"):
        a, b = number[edge.attrib["source"]], number[edge.attrib["target"]]
        if a != b:  # cables that are doubled are one link
            links |= {(a, b): None, (b, a): None}
    neighbours = _neighbours(len(names), list(links))
    reached: set[int] = set()
    for start in range(len(names)):
        part = {node for node, distance in enumerate(_distances(neighbours, start)) if distance < math.inf}
        reached = max(reached, part, key=len)
    if len(reached) < 2:
        raise DataError(f"{path} holds no link.")
    kept = sorted(reached)
    place = {node: i for i, node in enumerate(kept)}
    labels = [node.find(f"{SPACE}data[@key='{_label_key(path)}']") for node in graph.iter(f"{SPACE}node")]
    titles = tuple((labels[i].text or names[i]) if labels[i] is not None else names[i] for i in kept)  # type: ignore[union-attr]
    return titles, tuple((place[a], place[b]) for a, b in links if a in place)


def _label_key(path: Path) -> str:
    keys = ElementTree.parse(path).getroot().iter(f"{SPACE}key")
    return next((k.attrib["id"] for k in keys if k.get("attr.name") == "label" and k.get("for") == "node"), "")


def _neighbours(nodes: int, edges: list[tuple[int, int]]) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(nodes)]
    for a, b in edges:
        out[a].append(b)
    return out


def _distances(neighbours: list[list[int]], start: int) -> list[float]:
    distance = [math.inf] * len(neighbours)
    distance[start] = 0
    queue = [start]
    for node in queue:
        for other in neighbours[node]:
            if distance[other] == math.inf:
                distance[other] = distance[node] + 1
                queue.append(other)
    return distance


def shortest_paths(
    nodes: int, edges: tuple[tuple[int, int], ...], source: int, target: int, k: int
) -> list[tuple[int, ...]]:
    """The k shortest paths without a repeated node, by the number of links; fewer where there are no more.

    A best-first search by what is behind and the least that is ahead, so that hardly anything else is looked at. Links
    go both ways.
    """
    neighbours = _neighbours(nodes, list(edges))
    ahead = _distances(neighbours, target)
    found: list[tuple[int, ...]] = []
    queue: list[tuple[float, tuple[int, ...]]] = [(ahead[source], (source,))]
    while queue and len(found) < k:
        _, path = heapq.heappop(queue)
        if path[-1] == target:
            found.append(path)
            continue
        for node in neighbours[path[-1]]:
            if node not in path and ahead[node] < math.inf:
                heapq.heappush(queue, (len(path) + ahead[node], (*path, node)))
    return found


def network(path: Path, pairs: int, k: int, seed: int = 0) -> tuple[Network, Float[Tensor, " pairs"]]:
    """A network with the `pairs` largest demands of a gravity model, each over its `k` shortest paths.

    Demands are proportional to the product of the two nodes' masses, whose logarithms are normal.

    Raises:
        DataError: as `read_graphml`.

    Source: Roughan 2005, Simplifying the synthesis of internet traffic matrices (the gravity model).
    """
    nodes, edges = read_graphml(path)
    mass = torch.randn(len(nodes), generator=generator_of(seed, len(nodes)), dtype=torch.float64).exp()
    both = torch.outer(mass, mass).fill_diagonal_(0).flatten()
    chosen = both.topk(min(pairs, len(nodes) * (len(nodes) - 1))).indices.tolist()
    senders = tuple(divmod(place, len(nodes)) for place in chosen)
    number = {edge: i for i, edge in enumerate(edges)}
    routes = [
        (i, route) for i, pair in enumerate(senders) for route in shortest_paths(len(nodes), edges, pair[0], pair[1], k)
    ]
    routing, ends = torch.zeros(len(edges), len(routes)), torch.zeros(len(senders), len(routes))
    for place, (pair, route) in enumerate(routes):
        ends[pair, place] = 1
        for a, b in itertools.pairwise(route):
            routing[number[a, b], place] = 1
    demands = both[chosen]
    return Network(nodes, edges, senders, routing, ends), (demands / demands.mean()).float()


class FlowBatches:
    """Batches of demands, of the links' true capacities where they were felt, and of what arrived.

    Args:
        demands: (n, pairs).
        felt: the capacity of the links that were full, and NaN for the others (n, links).
        arrived: (n, pairs).
        batch_size: rows a batch.
        shuffle: a new order each epoch.
        seed: of the order.
        device: where the batches go.
    """

    def __init__(
        self, demands: Tensor, felt: Tensor, arrived: Tensor, batch_size: int, *, shuffle: bool = False, seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1; got {batch_size}.")
        self.tensors = demands, felt, arrived
        self.batch_size, self.shuffle, self.seed, self.device = batch_size, shuffle, seed, device

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def rows(self, place: int) -> int:
        """Rows in batch `place` of an epoch."""
        return min(self.batch_size, len(self.tensors[0]) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Flows]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        count = len(self.tensors[0])
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=generator_of(self.seed, index, 0))
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            rows = rows[part_of(len(rows), rank, world)]
            demands, felt, arrived = (tensor[rows].to(self.device) for tensor in self.tensors)
            yield demands, felt, arrived

    def __iter__(self) -> Iterator[Flows]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class TrafficSource:
    """Demands on a network of hidden capacities, and what of them arrived.

    Attributes:
        name: by which recipes and cards call it.
        network: with its paths.
        capacities: the true ones (links,).
        train, test: demands, felt capacities and arrivals, as `FlowBatches` takes them.
        split: the two parts in words.
        licence: of the topology.
        citation: where it comes from.
    """

    name: str
    network: Network
    capacities: Tensor
    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    split: str
    licence: str = "CC BY 4.0 (the topology); demands and capacities are drawn"
    citation: str = "Knight et al. 2011, The Internet Topology Zoo; gravity model after Roughan 2005"

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: the size of its network."""
        (links, paths), pairs = self.network.routing.shape, len(self.network.pairs)
        return {"links": links, "pairs": pairs, "paths": paths}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card."""
        return {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[FlowBatches, FlowBatches]:
        """Rows to train on, and those to measure: the test set, or the last `validation` of the others."""
        if validation >= len(self.train[0]):
            raise DataError(f"data.validation must lie in [0, {len(self.train[0])}); got {validation}.")
        train, held_out = self.train, self.test
        if validation:
            demands, felt, arrived = self.train
            train = demands[:-validation], felt[:-validation], arrived[:-validation]
            held_out = demands[-validation:], felt[-validation:], arrived[-validation:]
        training = FlowBatches(*train, batch_size, shuffle=True, seed=seed, device=device)
        return training, FlowBatches(*held_out, eval_batch_size, device=device)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> FlowBatches:
        """The rows that metrics are reported on, or the first so many of them."""
        demands, felt, arrived = (tensor[:limit] for tensor in self.test)
        return FlowBatches(demands, felt, arrived, batch_size, device=device)


def _load(name: str, file: str, data_dir: Path | None, pairs: int = 40, k: int = 3) -> TrafficSource:
    if data_dir is None:
        raise DataError(f"{name}: give the folder that holds graphml/{file} as data_dir.")
    places = [data_dir / "graphml" / file, data_dir / "topology-zoo" / "graphml" / file]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(f"{name}: there is no {places[0]}.")
    net, mean = network(path, pairs, k)
    generator = generator_of(7, len(net.nodes))
    # Hidden: what the mean demands would load a link with on their shortest paths, less or more of it.
    first = net.ends.cumsum(1).mul(net.ends).eq(1).any(0).float()
    load = net.routing @ (first * (net.ends.mT @ mean))
    capacities = (load + 0.3 * load.mean()) * torch.empty(len(load)).uniform_(0.4, 1.2, generator=generator)
    truth = TrafficLayer(links=len(net.edges), pairs=len(net.pairs), paths=net.routing.shape[1])
    truth.fit(net.routing, net.ends)
    truth.log_capacities.data.copy_(capacities.log())
    demands = mean * (0.7 * torch.randn(TRAIN + TEST, len(mean), generator=generator)).exp()
    with torch.no_grad():
        solved = truth.solve(demands)
    arrived = solved.value @ net.ends.mT
    full = solved.duals.inequality[:, : len(net.edges)] > 1e-6
    felt = torch.where(full, capacities, math.nan)
    parts = [(demands[rows], felt[rows], arrived[rows]) for rows in (slice(TRAIN), slice(TRAIN, None))]
    return TrafficSource(
        name, net, capacities, parts[0], parts[1],
        split=f"{TRAIN} matrices of demands train, {TEST} others are measured; {len(net.pairs)} pairs of nodes, "
        f"{net.routing.shape[1]} paths, {len(net.edges)} links of which {int(full.any(0).sum())} are ever full",
    )  # fmt: skip


@register_data
def traffic_abilene(data_dir: Path | None = None) -> TrafficSource:
    """Demands on Abilene, 11 nodes and 14 cables, with hidden capacities.

    Args:
        data_dir: holds graphml/Abilene.graphml, as the archive of the Topology Zoo does.

    Raises:
        DataError: no folder was given; the file is missing or damaged.
    """
    return _load("traffic_abilene", "Abilene.graphml", data_dir)
