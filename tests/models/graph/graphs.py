"""Small random graphs."""

import torch

from restpoint.models.graph import Graph


def random_graph(nodes=9, features=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    words = torch.rand(nodes, features, generator=generator, dtype=dtype)
    words = words * (torch.rand(nodes, features, generator=generator) < 0.5)
    edges = torch.randint(nodes, (2, 2 * nodes), generator=generator)
    return Graph.of(edges, words, undirected=True)
