"""Random quadratic and linear programmes whose optimum exists, and how far a point is from being one."""

import torch

D = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def quadratic(batch, n, m, p, seed=0):
    """Q, q, G, h, A, b with a feasible point, and about half of the inequalities active."""
    g = generator(seed)
    root = torch.randn(batch, n, n, generator=g, dtype=D)
    Q = root @ root.mT / n + 0.1 * torch.eye(n, dtype=D)
    q, x = (torch.randn(batch, n, generator=g, dtype=D) for _ in range(2))
    G, A = (torch.randn(batch, rows, n, generator=g, dtype=D) for rows in (m, p))
    h = (G @ x[..., None])[..., 0] + torch.rand(batch, m, generator=g, dtype=D)
    return Q, q, G, h, A, (A @ x[..., None])[..., 0]


def linear(batch, n, m, p, seed=0):
    """c, G, h, A, b whose optimum is one vertex: n - p inequalities are active, with positive multipliers."""
    g = generator(seed)
    G, A = (torch.randn(batch, rows, n, generator=g, dtype=D) for rows in (m, p))
    x, y = (torch.randn(batch, k, generator=g, dtype=D) for k in (n, p))
    active = (torch.arange(m) < n - p).to(D)
    slack = (1 - active) * (0.1 + torch.rand(batch, m, generator=g, dtype=D))
    z = active * (0.1 + torch.rand(batch, m, generator=g, dtype=D))
    c = -(G.mT @ z[..., None] + A.mT @ y[..., None])[..., 0]
    return c, G, (G @ x[..., None])[..., 0] + slack, A, (A @ x[..., None])[..., 0]


def times(matrix, x):
    return torch.einsum("...ij,...j->...i", matrix, x)


def violation(problem, solution):
    """The largest violation of an optimality condition (batch,)."""
    Q, q, G, h, A, b = problem
    x, (z, y) = solution.value, solution.duals
    slack = h - times(G, x)
    stationarity = times(Q, x) + q + times(G.mT, z) + times(A.mT, y)
    parts = [stationarity, slack.clamp_max(0), times(A, x) - b, z.clamp_max(0), z * slack]
    return torch.cat([part.detach() for part in parts], 1).abs().amax(1)
