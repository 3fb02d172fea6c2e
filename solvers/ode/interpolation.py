"""Dense output: the solution between its steps."""

from __future__ import annotations

import torch
from torch import Tensor


def polynomial(coefficients: Tensor, theta: Tensor) -> Tensor:
    """sum_p theta^p coefficients_p.

    Args:
        coefficients: (points, p + 1, batch, n).
        theta: (points,) or (points, batch).

    Returns:
        (points, batch, n).
    """
    degree = coefficients.shape[1]
    powers = theta.unsqueeze(1) ** torch.arange(degree, device=theta.device).view(-1, *[1] * (theta.ndim - 1))
    powers = powers.to(coefficients.dtype)
    if theta.ndim == 1:
        flat = coefficients.reshape(*coefficients.shape[:2], -1)
        return torch.bmm(powers.unsqueeze(1), flat).view(len(theta), *coefficients.shape[2:])
    return (powers.unsqueeze(-1) * coefficients).sum(1)
