"""A graph whose nodes have features, as the models of this family take it."""

from __future__ import annotations

import dataclasses
import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .sparse import Pattern

POWERS = 50


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes with sparse features, and directed edges; several graphs are one whose parts are not connected.

    Attributes:
        edges: row i has the nodes that node i hears of. An undirected edge is there both ways.
        entries: which features each node has: a row a node, a column a feature.
        values: of these.
    """

    edges: Pattern
    entries: Pattern
    values: Float[Tensor, " entries"]

    @staticmethod
    def of(edge_index: Tensor, features: Tensor, undirected: bool = False) -> Graph:
        """A graph of dense features.

        Args:
            edge_index: (2, edges), of each edge the node that it comes from and the one that it leads to; an edge given
                twice is one.
            features: (nodes, features); zeros are left out.
            undirected: add the opposite of every edge.

        Raises:
            ValueError: the edges are no two rows of integers, or name nodes that do not exist.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be a matrix, a row a node; got {tuple(features.shape)}.")
        if edge_index.ndim != 2 or len(edge_index) != 2:
            raise ValueError(f"edge_index must have two rows; got {tuple(edge_index.shape)}.")
        source, target = edge_index
        if undirected:
            source, target = torch.cat([source, target]), torch.cat([target, source])
        row, column = features.nonzero(as_tuple=True)
        nodes = len(features)
        entries = Pattern.of(row, column, (nodes, features.shape[1]))
        return Graph(Pattern.of(target, source, (nodes, nodes)), entries, features[entries.row, entries.column])

    def __post_init__(self) -> None:
        nodes = self.entries.shape[0]
        if self.edges.shape != (nodes, nodes):
            raise ValueError(f"Graph: there are features of {nodes} nodes, and edges among {self.edges.shape[0]}.")
        if self.values.shape != (len(self.entries),):
            raise ValueError(
                f"Graph: expected {len(self.entries)} values of features, one an entry; got {tuple(self.values.shape)}."
            )

    def __len__(self) -> int:
        """The number of nodes."""
        return self.entries.shape[0]

    @property
    def features(self) -> int:
        """How many features there are."""
        return self.entries.shape[1]

    @functools.cached_property
    def looped(self) -> Pattern:
        """The edges, and one from every node to itself."""
        own = torch.arange(len(self), device=self.edges.row.device)
        row, column = torch.cat([self.edges.row, own]), torch.cat([self.edges.column, own])
        return Pattern.of(row, column, self.edges.shape)

    @functools.cached_property
    def weights(self) -> Float[Tensor, " edges"]:
        """Of the looped edges: D^-1/2 (A + I) D^-1/2 with the degrees D, after Kipf and Welling 2017."""
        degree = self.looped.starts.diff().to(self.values.dtype)
        return (degree[self.looped.row] * degree[self.looped.column]).rsqrt()

    @functools.cached_property
    def perron(self) -> float:
        """An upper bound on the largest eigenvalue of the matrix of `weights`, 1 up to rounding if all edges go both
        ways.

        The bound max_i (A x)_i / x_i holds for every positive x and is tight at the Perron eigenvector, which some
        powers of the matrix come close to.

        Source: Collatz 1942 and Wielandt 1950.
        """
        weights = self.weights.double()
        x = self.looped.starts.diff().double().sqrt().unsqueeze(1)
        least = torch.inf
        for _ in range(POWERS):
            after = self.looped.matmul(weights, x)
            least = min(least, float((after / x).max()))
            # Averaging with the old one keeps it positive, and damps what would oscillate.
            x = (after + x) / (after + x).max()
            if least <= 1 + 1e-12:
                break
        return least

    def read(
        self, weight: Float[Tensor, "features width"], values: Tensor | None = None
    ) -> Float[Tensor, "nodes width"]:
        """The features of every node times a matrix; `values` replaces their own."""
        return self.entries.matmul(self.values if values is None else values, weight)

    def permuted(self, order: Int[Tensor, " nodes"]) -> Graph:
        """The same graph, in which node i is what node order[i] was."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        edges = Pattern.of(place[self.edges.row], place[self.edges.column], self.edges.shape)
        row, column = place[self.entries.row], self.entries.column
        entries = Pattern.of(row, column, self.entries.shape)
        return Graph(edges, entries, self.values[torch.argsort(row * self.features + column)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Graph:
        """On this device, with features of this type."""
        device = self.values.device if device is None else device
        values = self.values.to(device, self.values.dtype if dtype is None else dtype)
        return Graph(self.edges.to(device), self.entries.to(device), values)
