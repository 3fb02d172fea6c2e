"""Isotonic regression by pooling adjacent violators, a whole batch at a time."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..transforms import any_true, not_compiled, plain


@not_compiled
def project_isotonic(
    points: Float[Tensor, "..."],
    weights: Float[Tensor, "..."] | None = None,
    dim: int = -1,
    increasing: bool = True,
) -> Float[Tensor, "..."]:
    """Isotonic regression: the nearest sequences that never fall, in the (weighted) Euclidean norm.

    A solution is constant on blocks, with the weighted mean of the points in each. Which entries make a block does not
    change with small changes of the points, and so derivatives of every order are those of the means.

    Args:
        points: any real tensor.
        weights: positive, broadcast against `points`, differentiable; None for ones.
        dim: the dimension along which values may not fall.
        increasing: False for sequences that never rise.

    Returns:
        The projections, in shape and dtype of `points`; computed in float32 at least.

    Raises:
        ValueError: a weight is not positive and finite; the weights do not fit.
        TypeError: integer points.

    Source: Best and Chakravarti 1990 (pooling in any order leads to the same blocks).
    """
    if not points.is_floating_point():
        raise TypeError(f"project_isotonic: points must have a real floating-point type; got {points.dtype}.")
    if points.ndim == 0:
        raise ValueError("project_isotonic: points must have at least one dimension; got a tensor of shape ().")
    x = points.movedim(dim, -1)
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    w = torch.ones_like(x) if weights is None else _weights(weights, points, dim).to(x.dtype)
    blocks = pool(finest(x if increasing else -x), finest(w))
    return block_means(x, blocks, w).to(points.dtype).movedim(-1, dim)


def pool(points: Tensor, weights: Tensor | None = None) -> Tensor:
    """For every entry the number of its block, (..., n), counted from zero along the last dimension.

    Blocks are those of the regression by sequences that never fall. No derivative: numbers are integers. Give points
    in `finest` precision: which of two means is larger is decided by their last digits where points are equal.
    """
    return _Pool.apply(points.detach(), torch.ones_like(points) if weights is None else weights.detach())


def finest(points: Tensor) -> Tensor:
    """The points in float64, where the device has it."""
    return points if points.device.type == "mps" else points.double()


def block_means(points: Tensor, blocks: Tensor, weights: Tensor | None = None) -> Tensor:
    """For every entry the weighted mean of the points in its block, (..., n); differentiable in points and weights."""
    if weights is None:
        weights = torch.ones_like(points)
    total = torch.zeros_like(points).scatter_add(-1, blocks, weights * points)
    weight = torch.zeros_like(points).scatter_add(-1, blocks, weights)
    return total.gather(-1, blocks) / weight.gather(-1, blocks)


def block_offsets(points: Tensor, blocks: Tensor) -> Tensor:
    """The points less the mean of their block: exact to the last digit of the differences, not of the points."""
    begins = torch.cat([torch.ones_like(blocks[..., :1]), blocks.diff(dim=-1)], -1)
    place = torch.arange(blocks.shape[-1], device=blocks.device)
    first = (begins * place).cummax(-1).values
    local = points - points.detach().gather(-1, first)
    return local - block_means(local, blocks)


class _Pool(torch.autograd.Function):
    """An operation on integers, so that vmap calls it once, on plain tensors."""

    @staticmethod
    def forward(points: Tensor, weights: Tensor) -> Tensor:
        """Numbers of the blocks."""
        n = points.shape[-1]
        return _pool_rows(points.reshape(-1, n), weights.reshape(-1, n)).reshape(points.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Integers have no derivative."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[None, None]:
        """None."""
        return None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        """None."""
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], points: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        """What is mapped over is one more leading dimension."""
        front = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((points, weights), in_dims, strict=True)
        ]
        return _Pool.apply(*front), 0


def _pool_rows(points: Tensor, weights: Tensor) -> Tensor:
    """Rounds over all rows at once, each merging every run of blocks whose means fall.

    Blocks that violate the order end up in one in any case. A round leaves fewer of them, and few rounds suffice unless
    each merger causes only the next one.
    """
    rows, n = points.shape
    device = points.device
    row = torch.arange(rows, device=device).repeat_interleave(n)
    label = torch.arange(rows * n, device=device)
    mean, weight = points.flatten(), weights.flatten()
    while True:
        falls = (mean[:-1] > mean[1:]) & (row[:-1] == row[1:])
        if not falls.any():
            break
        begins = torch.cat([falls.new_ones(1), ~falls])
        into = begins.cumsum(0) - 1
        row = row[begins]
        total = mean.new_zeros(len(row)).index_add_(0, into, weight * mean)
        weight = mean.new_zeros(len(row)).index_add_(0, into, weight)
        mean = total / weight
        label = into[label]
    label = label.reshape(rows, n)
    return label - label[:, :1]


def _weights(weights: Tensor, points: Tensor, dim: int) -> Tensor:
    wrong = ~((weights > 0) & (weights < torch.inf))
    if any_true(wrong):
        first = plain(weights)[plain(wrong)].flatten()[0]
        raise ValueError(f"project_isotonic: weights must be positive and finite; got {float(first):g}.")
    try:
        return weights.expand(points.shape).movedim(dim, -1)
    except RuntimeError as error:
        raise ValueError(
            f"project_isotonic: weights have to broadcast to the shape of the points, {tuple(points.shape)}; "
            f"got {tuple(weights.shape)}."
        ) from error
