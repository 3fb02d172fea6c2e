"""The losses that belong to the simplex maps, as cross-entropy belongs to softmax."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..options import check_real
from .simplex import entmax, entmax15, sparsemax


def fenchel_young_loss(
    scores: Float[Tensor, "..."],
    target: Tensor,
    alpha: float = 1.5,
    dim: int = -1,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """The convex loss whose gradient is entmax(scores) - target: zero where, and only where, the map gives the target.

    Unlike cross-entropy (alpha = 1), it becomes exactly zero once the right score leads by a margin of 1 / (alpha - 1).

    Args:
        scores: real; -inf excludes an entry.
        target: class indices, without the dimension `dim`; or weights that sum to one along it, in the shape of scores.
        alpha: 1 is softmax, 1.5 `entmax15`, 2 `sparsemax`; in [1, 2].
        dim: the dimension of the classes.
        mask: True keeps an entry; broadcast against `scores`.

    Returns:
        Losses without the dimension `dim`; infinite where the target has weight on an excluded entry.

    Raises:
        ValueError: alpha is not in [1, 2]; shapes do not fit; an empty or wholly masked slice.

    Source: Blondel, Martins and Niculae 2020, Learning with Fenchel-Young losses, table 1 and proposition 2.
    """
    check_real("", "alpha", alpha, lambda a: 1 <= a <= 2, "in [1, 2]")
    x = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).movedim(dim, -1)
    if target.is_floating_point():
        if target.shape != scores.shape:
            raise ValueError(f"target: expected shape {tuple(scores.shape)} as of scores; got {tuple(target.shape)}.")
        y = target.movedim(dim, -1).to(x.dtype)
    else:
        if target.shape != x.shape[:-1]:
            raise ValueError(
                f"target: expected shape {tuple(x.shape[:-1])} of class indices; got {tuple(target.shape)}."
            )
        y = torch.nn.functional.one_hot(target, x.shape[-1]).to(x.dtype)
    if alpha == 1:
        most = x.logsumexp(-1)
    else:
        p = sparsemax(x) if alpha == 2 else entmax15(x) if alpha == 1.5 else entmax(x, alpha)
        most = (p * x.masked_fill(p == 0, 0.0)).sum(-1) - _negentropy(p, alpha)
    return most + _negentropy(y, alpha) - torch.where(y > 0, y * x, 0.0).sum(-1)


def _negentropy(p: Tensor, alpha: float) -> Tensor:
    """Tsallis' negative entropy, which is zero at the corners."""
    if alpha == 1:
        return torch.special.xlogy(p, p).sum(-1)
    # The power of zero has no derivative for small alpha.
    support = p > 0
    powers = torch.where(support, torch.where(support, p, 1.0).pow(alpha), 0.0)
    return (powers.sum(-1) - 1) / (alpha * (alpha - 1))
