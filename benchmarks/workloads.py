"""Functions with a known contraction, for the fixed-point benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Map = Callable[[Tensor], Tensor]


def mlp(radius: float, batch: int = 64, width: int = 512, seed: int = 0) -> tuple[Map, Tensor]:
    """Two layers on (batch, width) whose Jacobian at the rest point has the given spectral radius."""
    block, x = mlp_block(radius, batch, width, seed)
    return lambda z: block(z) + x, torch.zeros(batch, width)


def mlp_block(radius: float, batch: int = 64, width: int = 512, seed: int = 0) -> tuple[Map, Tensor]:
    """The same function before its injection is added, at any precision, and the injection (batch, width)."""
    rng = torch.Generator().manual_seed(seed)
    first = torch.randn(width, width, generator=rng) / width**0.5
    second = torch.randn(width, width, generator=rng) / width**0.5
    x = torch.randn(batch, width, generator=rng)

    def block(z: Tensor, scale: float) -> Tensor:
        return scale * (torch.tanh(z @ first.to(z.dtype).T) @ second.to(z.dtype).T)

    scale = _scale_of(lambda scale: lambda z: block(z, scale) + x, radius, torch.zeros(batch, width))
    return lambda z: block(z, scale), x


def gradient_step(radius: float, batch: int = 64, width: int = 128, seed: int = 0) -> tuple[Map, Tensor]:
    """A gradient step on a quadratic, whose Jacobian is symmetric with eigenvalues evenly from 0 to `radius`."""
    rng = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=rng))
    hessian = (basis * torch.linspace(1 - radius, 1.0, width)) @ basis.T
    x = torch.randn(batch, width, generator=rng)
    return (lambda z: z - (z @ hessian - x)), torch.zeros(batch, width)


def convolution(
    radius: float, batch: int = 32, channels: int = 64, size: int = 16, expansion: int = 2, seed: int = 0
) -> tuple[Map, Tensor]:
    """Two 3x3 convolutions and group norms on (batch, channels, size, size), `expansion` times as wide inside."""
    rng = torch.Generator().manual_seed(seed)
    inner = expansion * channels
    first = torch.randn(inner, channels, 3, 3, generator=rng) / (9 * channels) ** 0.5
    second = torch.randn(channels, inner, 3, 3, generator=rng) / (9 * inner) ** 0.5
    x = torch.randn(batch, channels, size, size, generator=rng)

    def scaled(scale: float) -> Map:
        def block(z: Tensor) -> Tensor:
            hidden = functional.group_norm(functional.conv2d(z, first, padding=1), 8).relu()
            return scale * functional.group_norm(functional.conv2d(hidden, second, padding=1) + x, 8)

        return block

    z0 = torch.zeros(batch, channels, size, size)
    return scaled(_scale_of(scaled, radius, z0)), z0


def _scale_of(scaled: Callable[[float], Map], radius: float, z0: Tensor) -> float:
    """The scale at which the Jacobian at the rest point has the wanted spectral radius, by bisection."""
    low, high = 0.01, 3.0
    for _ in range(8):
        middle = (low + high) / 2
        if _radius(scaled(middle), z0) < radius:
            low = middle
        else:
            high = middle
    return low


def _radius(f: Map, z0: Tensor) -> float:
    rng = torch.Generator().manual_seed(1)
    z = z0
    for _ in range(60):
        z = 0.5 * z + 0.5 * f(z)
    v, growth = torch.randn(z.shape, generator=rng), []
    for _ in range(30):
        _, v = torch.func.jvp(f, (z,), (v,))
        size = v.norm()
        v = v / size
        growth.append(size.log())
    return float(torch.stack(growth[15:]).mean().exp())
