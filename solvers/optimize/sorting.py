"""Sorting, ranking and choosing the largest, made differentiable: projections onto the permutahedron."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..transforms import any_true, not_compiled, plain
from .isotonic import block_means, block_offsets, finest, pool
from .simplex import along


@not_compiled
def soft_sort(
    values: Float[Tensor, "..."],
    dim: int = -1,
    temperature: float | Float[Tensor, "..."] = 1.0,
    descending: bool = False,
) -> Float[Tensor, "..."]:
    """Values in order, with a derivative towards each of them that is a mean over its neighbours.

    The smaller the temperature, the nearer to `torch.sort`, and equal to it below the smallest gap of two values. As it
    grows, all tend to the mean. The sum is that of the values at any temperature.

    Args:
        values: any real tensor.
        dim: the dimension that is sorted.
        temperature: positive, in the units of the values; a tensor broadcasts against them with length one along
            `dim`, and is differentiable.
        descending: the largest first.

    Returns:
        The soft order, in shape and dtype of `values`; computed in float32 at least.

    Raises:
        ValueError: `temperature` is not positive and finite, or does not fit.

    Source: Blondel, Teboul, Berthet and Djolonga 2020, with the quadratic regularisation.
    """
    x = _prepare(values, dim, "soft_sort")
    heat = _temperature(temperature, values, dim, "soft_sort")
    n = x.shape[-1]
    falling = torch.arange(n, 0, -1, device=x.device, dtype=x.dtype) / heat
    found = _project_falling(falling, x.sort(dim=-1, descending=True).values)
    return (found if descending else found.flip(-1)).to(values.dtype).movedim(-1, dim)


@not_compiled
def soft_rank(
    values: Float[Tensor, "..."],
    dim: int = -1,
    temperature: float | Float[Tensor, "..."] = 1.0,
    descending: bool = False,
) -> Float[Tensor, "..."]:
    """Ranks from 1 to n, with a derivative towards each value.

    The smaller the temperature, the nearer to whole ranks, and equal to them below the smallest gap of two values.
    As it grows, all tend to (n + 1) / 2. The sum is n (n + 1) / 2 at any temperature, and equal values share their
    ranks.

    Args:
        values: any real tensor.
        dim: the dimension that is ranked.
        temperature: positive, in the units of the values: their difference that is worth one rank. A tensor
            broadcasts against the values with length one along `dim`, and is differentiable.
        descending: the largest value has rank 1.

    Returns:
        The soft ranks, in shape and dtype of `values`; computed in float32 at least.

    Raises:
        ValueError: `temperature` is not positive and finite, or does not fit.

    Source: Blondel, Teboul, Berthet and Djolonga 2020, with the quadratic regularisation.
    """
    x = _prepare(values, dim, "soft_rank")
    heat = _temperature(temperature, values, dim, "soft_rank")
    ranks = torch.arange(x.shape[-1], 0, -1, device=x.device, dtype=x.dtype)
    found = _project((-x if descending else x) / heat, ranks)
    return found.to(values.dtype).movedim(-1, dim)


@not_compiled
def soft_topk(
    values: Float[Tensor, "..."], k: int, dim: int = -1, temperature: float | Float[Tensor, "..."] = 1.0
) -> Float[Tensor, "..."]:
    """Weights from 0 to 1 that sum to k: ones for the k largest, as far as the temperature lets them.

    Args:
        values: any real tensor.
        k: from 1 to the length of `dim`.
        dim: the dimension of the choice.
        temperature: positive, in the units of the values: the k-th and the next value that are farther apart give
            weights of exactly 1 and 0. A tensor broadcasts against the values with length one along `dim`, and is
            differentiable.

    Returns:
        The weights, in shape and dtype of `values`; computed in float32 at least. With k = 1 they are `sparsemax` of
        values / temperature.

    Raises:
        ValueError: `k` is not in that range; `temperature` is not positive and finite, or does not fit.

    Source: Blondel, Teboul, Berthet and Djolonga 2020, on the permutahedron of k ones.
    """
    x = _prepare(values, dim, "soft_topk")
    n = x.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"soft_topk: k must lie between 1 and {n}, the length of dim={dim}; got {k}.")
    heat = _temperature(temperature, values, dim, "soft_topk")
    ones = (torch.arange(n, device=x.device) < k).to(x.dtype)
    return _project(x / heat, ones).to(values.dtype).movedim(-1, dim)


@not_compiled
def project_permutahedron(
    points: Float[Tensor, "..."], vertex: Float[Tensor, "..."], dim: int = -1
) -> Float[Tensor, "..."]:
    """The nearest points in the convex hull of all permutations of `vertex`.

    Args:
        points: any real tensor.
        vertex: broadcast against `points`; its order does not matter. Differentiable.
        dim: the dimension that is permuted.

    Returns:
        The projections, in shape and dtype of `points`; computed in float32 at least.

    Raises:
        ValueError: `vertex` does not fit.

    Source: Blondel, Teboul, Berthet and Djolonga 2020 (the reduction to isotonic regression).
    """
    x = _prepare(points, dim, "project_permutahedron")
    try:
        w = vertex.expand(points.shape).movedim(dim, -1).to(x.dtype)
    except RuntimeError as error:
        raise ValueError(
            f"project_permutahedron: vertex has to broadcast to the shape of the points, {tuple(points.shape)}; "
            f"got {tuple(vertex.shape)}."
        ) from error
    return _project(x, w.sort(dim=-1, descending=True).values).to(points.dtype).movedim(-1, dim)


def _project(points: Tensor, falling: Tensor) -> Tensor:
    """The projection of `points` onto the permutahedron of `falling`, which never rises along the last dimension."""
    ordered, order = points.sort(dim=-1, descending=True)
    found = _project_falling(ordered, falling)
    return found.gather(-1, order.argsort(-1))


def _project_falling(points: Tensor, vertex: Tensor) -> Tensor:
    """The same where neither of both ever rises: on blocks, the points moved to the mean of the vertex.

    Less the points it is the regression itself, but where the points are large beside the vertex, as at low
    temperatures, that difference would have lost the vertex's digits.
    """
    points, vertex = torch.broadcast_tensors(points, vertex)
    blocks = pool(finest(vertex) - finest(points))
    return block_offsets(points, blocks) + block_means(vertex, blocks)


def _prepare(values: Tensor, dim: int, name: str) -> Tensor:
    """In float32 at least, with the dimension in question last."""
    if not values.is_floating_point():
        raise TypeError(f"{name}: values must have a real floating-point type; got {values.dtype}.")
    if values.ndim == 0:
        raise ValueError(f"{name}: values must have at least one dimension; got a tensor of shape ().")
    x = values.movedim(dim, -1)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _temperature(temperature: float | Tensor, values: Tensor, dim: int, name: str) -> Tensor:
    """One a slice, the dimension in question last."""
    heat = temperature if isinstance(temperature, Tensor) else torch.tensor(float(temperature), dtype=torch.float64)
    wrong = ~((heat > 0) & (heat < torch.inf))
    if any_true(wrong):
        first = plain(heat)[plain(wrong)].flatten()[0]
        raise ValueError(f"{name}: temperature must be positive and finite; got {float(first):g}.")
    return along(heat, values, dim, f"{name}: temperature").movedim(dim, -1)
