"""The length of the first step, for the batch or for every sample.

Source: Hairer, Norsett, Wanner 1993, section II.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .method import Carry
from .problem import Problem


def first_step(problem: Problem, t: float, y: Tensor, carry: Carry) -> float:
    """A first step with which Euler's method would be about as accurate as the tolerance asks."""
    rhs, tolerance, order = problem.rhs, problem.tolerance, problem.method.error_order or 1
    assert problem.times.listed is not None
    span = problem.times.listed[-1] - t
    slope, scale = problem.method.derivative(rhs, t, y, carry), tolerance.scale(y)
    d0, d1 = tolerance.batch_ratio(y, scale), tolerance.batch_ratio(slope, scale)
    guess = 1e-6 * abs(span) if min(d0, d1) < 1e-5 or not math.isfinite(d0 + d1) else 0.01 * d0 / d1
    guess = min(guess, abs(span))
    h = math.copysign(guess, span)
    change = rhs(t + h, y + h * slope) - slope
    largest = max(d1, tolerance.batch_ratio(change, scale) / guess)
    if not math.isfinite(largest):
        return guess
    second = max(1e-6 * abs(span), guess * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / order)
    return min(100 * guess, second, abs(span))


def first_steps(problem: Problem, t: Tensor, y: Tensor, carry: Carry, span: Tensor) -> Tensor:
    """As `first_step`, for every sample (batch,)."""
    rhs, tolerance, order = problem.rhs, problem.tolerance, problem.method.error_order or 1
    slope, scale = problem.method.derivative(rhs, t, y, carry), tolerance.scale(y)
    d0, d1 = tolerance.sample_ratio(y, scale), tolerance.sample_ratio(slope, scale)
    small = (torch.minimum(d0, d1) < 1e-5) | ~(d0 + d1).isfinite()
    guess = torch.minimum(torch.where(small, 1e-6 * span.abs(), 0.01 * d0 / d1), span.abs())
    h = guess * span.sign()
    change = rhs(t + h, y + h.to(y.dtype).unsqueeze(-1) * slope) - slope
    largest = torch.maximum(d1, tolerance.sample_ratio(change, scale) / guess)
    second = torch.where(
        largest <= 1e-15, torch.clamp(guess * 1e-3, min=1e-6 * span.abs()), (0.01 / largest) ** (1 / order)
    )
    second = torch.minimum(torch.minimum(100 * guess, second), span.abs())
    return torch.where(largest.isfinite(), second, guess) * span.sign()
