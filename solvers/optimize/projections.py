"""Euclidean projections in closed form: onto the simplex, boxes, and balls of the L1 and L2 norm."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..transforms import any_true, not_compiled, plain
from .simplex import along, sparsemax


@not_compiled
def project_simplex(
    points: Float[Tensor, "..."],
    radius: float | Float[Tensor, "..."] = 1.0,
    dim: int = -1,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """The nearest non-negative vectors that sum to `radius`.

    Args:
        points: any real tensor; -inf excludes an entry.
        radius: positive; a tensor broadcasts against `points` with length one along `dim`, and is differentiable.
        dim: the dimension that is projected.
        mask: True keeps an entry; broadcast against `points`.

    Returns:
        The projections, in shape and dtype of `points`; computed in float32 at least.

    Raises:
        ValueError: `dim` is empty, or a slice along it is wholly masked; `radius` is not positive, or does not fit.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra 2008, equation 3; it is r sparsemax(points / r).
    """
    if not isinstance(radius, Tensor) and radius == 1:
        return sparsemax(points, dim, mask)
    x = _wide(points, dim, "project_simplex")
    size = _radius(radius, x, dim, "project_simplex")
    return (size * sparsemax(x / size, dim, mask)).to(points.dtype)


@not_compiled
def project_box(
    points: Float[Tensor, "..."],
    lower: float | Float[Tensor, "..."] | None = None,
    upper: float | Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """The nearest points between `lower` and `upper`.

    Args:
        points: any real tensor.
        lower, upper: the bounds; tensors broadcast against `points`, and are differentiable. None for no bound.

    Returns:
        The projections, in shape and dtype of `points`. On a bound itself the derivative is that of the inside.

    Raises:
        ValueError: a lower bound is above the upper one, or is NaN, and the message names the first such entry; a bound
            does not broadcast to the shape of `points`.
    """
    low, high = _bound(lower, points, "lower"), _bound(upper, points, "upper")
    if low is not None and high is not None:
        empty = plain(~(low <= high))
        if any_true(empty):
            first = tuple(empty.nonzero()[0].tolist())
            raise ValueError(f"project_box: the box is empty at {first}, where lower is not below or equal to upper.")
    # Not clamp: at a tie it shares the derivative out.
    inside = points if low is None else torch.where(points < low, low, points)
    return inside if high is None else torch.where(inside > high, high, inside)


@not_compiled
def project_l2_ball(
    points: Float[Tensor, "..."], radius: float | Float[Tensor, "..."] = 1.0, dim: int = -1
) -> Float[Tensor, "..."]:
    """The nearest vectors whose Euclidean norm is `radius` at most.

    Args:
        points: any real tensor.
        radius: positive; a tensor broadcasts against `points` with length one along `dim`, and is differentiable.
        dim: the dimension of the vectors.

    Returns:
        The projections, in shape and dtype of `points`; computed in float32 at least. Inside the ball and on its
        surface the map is the identity, its derivative too.

    Raises:
        ValueError: `dim` is empty; `radius` is not positive, or does not fit.
    """
    x = _wide(points, dim, "project_l2_ball")
    size = _radius(radius, x, dim, "project_l2_ball")
    # Squares of the quotient neither overflow nor vanish.
    largest = x.detach().abs().amax(dim, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    squares = (x / scale).square().sum(dim, keepdim=True)
    outside = scale * squares.detach().sqrt() > size.detach()
    norm = scale * torch.where(outside, squares, 1).sqrt()
    return torch.where(outside, x * (size / norm), x).to(points.dtype)


@not_compiled
def project_l1_ball(
    points: Float[Tensor, "..."], radius: float | Float[Tensor, "..."] = 1.0, dim: int = -1
) -> Float[Tensor, "..."]:
    """The nearest vectors whose absolute values sum to `radius` at most: small entries become exactly zero.

    Args:
        points: any real tensor.
        radius: positive; a tensor broadcasts against `points` with length one along `dim`, and is differentiable.
        dim: the dimension of the vectors.

    Returns:
        The projections, in shape and dtype of `points`; computed in float32 at least. Inside the ball and on its
        surface the map is the identity, its derivative too.

    Raises:
        ValueError: `dim` is empty; `radius` is not positive, or does not fit.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra 2008, section 4.
    """
    x = _wide(points, dim, "project_l1_ball")
    size = _radius(radius, x, dim, "project_l1_ball")
    signs = x.detach().sign()
    outside = x.detach().abs().sum(dim, keepdim=True) > size.detach()
    surface = signs * project_simplex(signs * x, size, dim)
    return torch.where(outside, surface, x).to(points.dtype)


def _wide(points: Tensor, dim: int, name: str) -> Tensor:
    """Checked, and in float32 at least."""
    if not points.is_floating_point():
        raise TypeError(f"{name}: points must have a real floating-point type; got {points.dtype}.")
    if points.ndim == 0:
        raise ValueError(f"{name}: points must have at least one dimension; got a tensor of shape ().")
    if points.shape[dim] == 0:
        raise ValueError(f"{name}: dim={dim} is empty in points of shape {tuple(points.shape)}.")
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def _radius(radius: float | Tensor, points: Tensor, dim: int, name: str) -> Tensor:
    size = radius if isinstance(radius, Tensor) else torch.tensor(float(radius), dtype=points.dtype)
    wrong = ~((size > 0) & (size < torch.inf))
    if any_true(wrong):
        first = plain(size).broadcast_to(plain(wrong).shape)[plain(wrong)].flatten()[0]
        raise ValueError(f"{name}: radius must be positive and finite; got {float(first):g}.")
    return along(size, points, dim, f"{name}: radius")


def _bound(bound: float | Tensor | None, points: Tensor, name: str) -> Tensor | None:
    if bound is None:
        return None
    tensor = bound if isinstance(bound, Tensor) else torch.tensor(float(bound), dtype=points.dtype)
    try:
        return tensor.to(points).expand(points.shape)
    except RuntimeError as error:
        raise ValueError(
            f"project_box: {name} has to broadcast to the shape of the points, {tuple(points.shape)}; "
            f"got {tuple(tensor.shape)}."
        ) from error
