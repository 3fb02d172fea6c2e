"""Maps onto the probability simplex: sparsemax, 1.5-entmax, and alpha-entmax whose alpha can be learnt."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..transforms import any_true, not_compiled, plain
from .simplex_kernel import Entmax, Entmax15, Sparsemax


@not_compiled
def sparsemax(
    scores: Float[Tensor, "..."], dim: int = -1, mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Euclidean projection of `scores` onto the probability simplex.

    The sparse relative of softmax: argmin_p |p - scores|^2 over the simplex. Choose it where exact zeros are wanted;
    choose `entmax15` where the weights should come out of zero smoothly. Derivatives of every order are exact, those
    of the support being zero.

    Args:
        scores: any real tensor; -inf excludes an entry. A NaN or +inf makes its slice NaN.
        dim: the dimension that is projected.
        mask: True keeps an entry; broadcast against `scores`.

    Returns:
        Non-negative weights that sum to one along `dim`, in the dtype of `scores`; computed in float32 at least.

    Raises:
        ValueError: `dim` is empty, or a slice along it is wholly masked; the message names the first such slice.
        TypeError: integer scores.
        IndexError: `scores` has no dimension `dim`.

    Source: Martins and Astudillo 2016, equation 2 and section 2.5 (its Jacobian).
    """
    return _finish(Sparsemax.apply(_prepare(scores, dim, mask, "sparsemax")), scores, dim)


@not_compiled
def entmax15(
    scores: Float[Tensor, "..."], dim: int = -1, mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """1.5-entmax of `scores`: between softmax and `sparsemax`, sparse and with a continuous Jacobian.

    Args:
        scores: any real tensor; -inf excludes an entry. A NaN or +inf makes its slice NaN.
        dim: the dimension that is projected.
        mask: True keeps an entry; broadcast against `scores`.

    Returns:
        Non-negative weights that sum to one along `dim`, in the dtype of `scores`; computed in float32 at least.

    Raises:
        ValueError: `dim` is empty, or a slice along it is wholly masked; the message names the first such slice.
        TypeError: integer scores.
        IndexError: `scores` has no dimension `dim`.

    Source: Peters, Niculae and Martins 2019, section 3.
    """
    weights, _ = Entmax15.apply(_prepare(scores, dim, mask, "entmax15"))
    return _finish(weights, scores, dim)


@not_compiled
def entmax(
    scores: Float[Tensor, "..."],
    alpha: float | Float[Tensor, "..."] = 1.5,
    dim: int = -1,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """alpha-entmax of `scores`: softmax at alpha = 1, `entmax15` at 1.5, `sparsemax` at 2, and all between.

    Args:
        scores: any real tensor; -inf excludes an entry. A NaN or +inf makes its slice NaN.
        alpha: from 1 to 2. A tensor broadcasts against `scores`, with length one along `dim`, and is differentiable:
            one alpha a head of an attention has shape (heads, 1, 1).
        dim: the dimension that is projected.
        mask: True keeps an entry; broadcast against `scores`.

    Returns:
        Non-negative weights that sum to one along `dim`, in the dtype of `scores`; computed in float32 at least.

    Raises:
        ValueError: `dim` is empty, or a slice along it is wholly masked, and the message names the first such slice;
            `alpha` is not in [1, 2], or does not fit the scores.
        TypeError: integer scores.
        IndexError: `scores` has no dimension `dim`.

    Source: Peters, Niculae and Martins 2019, section 3; Correia, Niculae and Martins 2019, proposition 1 (the
    gradient towards alpha).
    """
    if not isinstance(alpha, Tensor):
        if alpha == 1.5:
            return entmax15(scores, dim, mask)
        if alpha == 2:
            return sparsemax(scores, dim, mask)
        alpha = torch.tensor(alpha, dtype=torch.float64)
    outside = ~((alpha >= 1) & (alpha <= 2))
    if any_true(outside):
        wrong = plain(alpha)[plain(outside)].flatten()[0]
        raise ValueError(f"entmax: alpha must lie in [1, 2]; got {float(wrong):g}.")
    x = _prepare(scores, dim, mask, "entmax")
    one_a_slice = along(alpha, scores, dim, "entmax: alpha")
    return _finish(Entmax.apply(x, one_a_slice.movedim(dim, -1)), scores, dim)


def along(value: Tensor, points: Tensor, dim: int, name: str) -> Tensor:
    """`value`, of which every slice of `points` along `dim` has one: in their shape but for length one along `dim`.

    On the device of the points and in their type, or in float32 where that is finer.

    Raises:
        ValueError: it does not broadcast to that shape; the message calls it `name`.
    """
    shape = list(points.shape)
    shape[dim] = 1
    try:
        # Both at once: not every device has the type that the value comes in.
        return value.to(points.device, torch.promote_types(points.dtype, torch.float32)).expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} has to broadcast to shape {tuple(shape)}, one along dim={dim}; got {tuple(value.shape)}."
        ) from error


def _prepare(scores: Tensor, dim: int, mask: Tensor | None, name: str) -> Tensor:
    """Checked and masked scores, in float32 at least, with the dimension of the map last."""
    if not scores.is_floating_point():
        raise TypeError(f"{name}: scores must have a real floating-point type; got {scores.dtype}.")
    if scores.ndim == 0:
        raise ValueError(f"{name}: scores must have at least one dimension; got a tensor of shape ().")
    x = scores.movedim(dim, -1)
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: dim={dim} is empty in scores of shape {tuple(scores.shape)}; nothing sums to one.")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if mask is None:
        return x
    try:
        kept = mask.expand(scores.shape).movedim(dim, -1)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: mask has to broadcast to the shape of the scores, {tuple(scores.shape)}; got {tuple(mask.shape)}."
        ) from error
    return torch.where(kept, x, -torch.inf)


def _finish(weights: Tensor, scores: Tensor, dim: int) -> Tensor:
    return weights.to(scores.dtype).movedim(-1, dim)
