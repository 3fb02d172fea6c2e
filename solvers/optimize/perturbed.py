"""Argmax over anything that a maximiser can search, smoothed by noise and asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ..options import check_integer, check_real

Maximizer = Callable[[Tensor], Tensor]


def perturbed_argmax(
    scores: Float[Tensor, "batch n"],
    maximizer: Maximizer | None = None,
    *,
    temperature: float = 1.0,
    samples: int = 100,
    generator: Generator | None = None,
) -> Float[Tensor, "batch n"]:
    """The mean of argmax_y <y, scores + temperature Z> over normal noise Z: smooth in the scores, whatever y are.

    Choose it where the argmax itself is wanted with a gradient, and y are the vertices of something that can only be
    searched: paths, matchings, rankings. Its derivatives, of any order and in any mode, are unbiased estimates by the
    noise's density; their standard error falls with the root of `samples`, and grows as the temperature falls.

    Args:
        scores: real.
        maximizer: takes scores (k, n) and returns the y (k, n) of largest <y, scores> of each row, without a gradient;
            None takes the one-hot vectors.
        temperature: of the noise, positive.
        samples: of the noise, the same number for every row.
        generator: of the noise; None takes torch's.

    Returns:
        Means in the convex hull of the y, in the dtype of `scores`.

    Raises:
        ValueError: the temperature is not positive, no sample is asked for, or what the maximiser returns does not fit.

    Source: Berthet et al. 2020, Learning with differentiable perturbed optimizers, definition 2.1 and proposition 3.1.
    """
    noise, found = _draw(scores, maximizer, temperature, samples, generator)
    return _means(scores, noise, found, temperature)


def _means(scores: Tensor, noise: Tensor, found: Tensor, temperature: float) -> Tensor:
    """Means over the samples, (batch, n), that move with the scores."""
    # Importance weights of the noise seen from moved scores: one here, and all derivatives are those of the mean.
    moved = (scores - scores.detach()) / temperature
    weight = ((noise * moved).sum(2, keepdim=True) - moved.square().sum(1, keepdim=True) / 2).exp()
    centre = found.mean(0)
    return centre + ((found - centre) * weight).mean(0)


def perturbed_loss(
    scores: Float[Tensor, "batch n"],
    target: Float[Tensor, "batch n"],
    maximizer: Maximizer | None = None,
    *,
    temperature: float = 1.0,
    samples: int = 100,
    generator: Generator | None = None,
) -> Float[Tensor, " batch"]:
    """The Fenchel-Young loss of `perturbed_argmax`: convex, with the gradient perturbed_argmax(scores) - target.

    Its gradient needs no derivative of the argmax, and so has far less noise; the second derivative is that of
    `perturbed_argmax`. Forward mode raises.

    Args:
        scores: real.
        target: the y that is wanted.
        maximizer, temperature, samples, generator: as of `perturbed_argmax`.

    Returns:
        E max_y <y, scores + temperature Z> - <target, scores>, which is least, not zero, where the means are `target`.

    Raises:
        ValueError: as `perturbed_argmax`; targets of another shape.

    Source: Berthet et al. 2020, section 4.
    """
    if target.shape != scores.shape:
        raise ValueError(f"target: expected shape {tuple(scores.shape)} as of scores; got {tuple(target.shape)}.")
    noise, found = _draw(scores, maximizer, temperature, samples, generator)
    return _Largest.apply(scores, noise, found, temperature) - (target * scores).sum(1)


class _Largest(torch.autograd.Function):
    """The mean of the largest <y, scores + temperature Z>, whose derivative is the mean of the y."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, found: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores, noise, found)
        ctx.temperature = temperature
        return (found * (scores + temperature * noise)).sum(2).mean(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        scores, noise, found = ctx.saved_tensors
        return gradients[0].unsqueeze(1) * _means(scores, noise, found, ctx.temperature), None, None, None


def _draw(
    scores: Tensor, maximizer: Maximizer | None, temperature: float, samples: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Noise and what it makes the largest, (samples, batch, n) each."""
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"scores: expected real (batch, n); got {scores.dtype} of shape {tuple(scores.shape)}.")
    check_real("", "temperature", temperature, lambda t: t > 0, "positive and finite")
    check_integer("", "samples", samples)
    noise = torch.randn(samples, *scores.shape, dtype=scores.dtype, device=scores.device, generator=generator)
    with torch.no_grad():
        searched = (scores.detach() + temperature * noise).flatten(0, 1)
        found = (one_hot_argmax if maximizer is None else maximizer)(searched)
        if not isinstance(found, Tensor) or found.shape != searched.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"maximizer(scores): expected shape {tuple(searched.shape)}; got {what}.")
    return noise, found.detach().to(scores.dtype).unflatten(0, (samples, -1))


def one_hot_argmax(scores: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """One at the largest entry of each row."""
    return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
