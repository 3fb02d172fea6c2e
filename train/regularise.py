"""Penalties that keep an equilibrium model well-posed while it trains."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..models.deq.layer import Problem


def growth_penalty(problem: Problem, z: object, limit: float, powers: int) -> tuple[Tensor, float]:
    """How much a perturbation grows by one step of the transposed Jacobian, where that exceeds `limit`.

    A random vector is multiplied `powers` times by J^T, J = df/dz at the rest point, and normalised, which turns it
    towards the directions that decay slowest; its growth g = |J^T v| by one more product is then differentiated. With
    powers = 0 this is Hutchinson's estimate of the mean singular value, which says little about the largest.

    Args:
        problem: what was solved.
        z: the rest point; taken as a constant.
        limit: growth up to this is free.
        powers: products before the one that is measured.

    Returns:
        The mean over samples of max(0, g - limit)^2, differentiable in everything that f uses, and the mean g.

    Source: Bai, Koltun and Kolter 2021, equation 4, with a power iteration in place of the Frobenius norm.
    """
    leaves, structure = pytree.tree_flatten(z)
    points = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        image = pytree.tree_leaves(problem.f(pytree.tree_unflatten(points, structure), *problem.args))
        vectors = _unit([torch.randn_like(leaf) for leaf in image])[0]
        for _ in range(powers):
            products = torch.autograd.grad(image, points, vectors, retain_graph=True)
            vectors = _unit(list(products))[0]
        growth = _unit(list(torch.autograd.grad(image, points, vectors, create_graph=True)))[1]
    penalty = (growth - limit).clamp_min(0).square().mean()
    return penalty, float(growth.detach().mean())


def _unit(vectors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The vectors, scaled so that each sample's have norm one together, and the norms (batch,) before."""
    norms = torch.cat([v.flatten(1) for v in vectors], dim=1).norm(dim=1)
    tiny = torch.finfo(norms.dtype).tiny
    scaled = [v / norms.detach().clamp_min(tiny).view(-1, *[1] * (v.ndim - 1)) for v in vectors]
    return scaled, norms
