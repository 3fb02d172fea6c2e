"""Continuous flows of images: a small U-Net carries noise to pixels, trained by matching or by likelihood."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional

from ...solvers.ode import CheckpointAdjoint, Controller, Method
from ...solvers.ode.adjoint import Adjoint
from ..registry import register_model
from .divergence import Divergence, named_divergence
from .layer import ContinuousFlow

Images = Float[Tensor, "batch channels height width"]


class TimeFeatures(nn.Module):
    """t, and sines and cosines of its first harmonics of period 2, through a perceptron: smooth, so that a solver can
    take long steps.

    Args:
        width: of the result.
        harmonics: how many.
    """

    def __init__(self, width: int, harmonics: int = 8) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, harmonics + 1), persistent=False)
        self.net = nn.Sequential(nn.Linear(1 + 2 * harmonics, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Float[Tensor, ""] | Float[Tensor, " batch"], like: Tensor) -> Float[Tensor, "rows features"]:
        """Features of one time, or of one a sample, in the type of `like`."""
        t = t.to(like.dtype).reshape(-1, 1)
        angles = t * self.frequencies.to(like.dtype)
        return self.net(torch.cat([t, angles.sin(), angles.cos()], dim=1))


class TimedBlock(nn.Module):
    """x + conv(act(time's scale and shift of norm(conv(act(norm(x)))))); the second convolution begins at zero.

    Args:
        channels: in and out.
        time: width of the time's features.
        groups: of the normalisations.

    Source: Ho et al. 2020, appendix B, with the scale and shift of Dhariwal and Nichol 2021.
    """

    def __init__(self, channels: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels, affine=False)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.film = nn.Linear(time, 2 * channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Images, time: Float[Tensor, "rows features"]) -> Images:
        """The block at the time with these features."""
        scale, shift = self.film(time).unsqueeze(-1).unsqueeze(-1).chunk(2, dim=1)
        hidden = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        return x + self.conv2(functional.silu(hidden * (1 + scale) + shift))


class ImageField(nn.Module):
    """A U-Net from an image and a time to the image's velocity, a(t, x) x + b(t, x) with images a and b.

    The product lets every pixel be stretched and squeezed about a centre of its own, as the field of a normal density
    does, without passing its value through the net.

    Args:
        in_chans: of the image.
        channels: of each level, the finest first; each further one has half the height and width.
        blocks: on the way down and again on the way up, of each level.
        patch: so many pixels squared are one pixel of the finest level.
        groups: of the normalisations.

    Source: U-Net with time: Ho et al. 2020; patches of pixels as channels: Shi et al. 2016.
    """

    def __init__(self, in_chans: int, channels: tuple[int, ...], blocks: int, patch: int, groups: int) -> None:
        super().__init__()
        time = 2 * channels[0]
        self.patch = patch
        self.time = TimeFeatures(time)
        self.stem = nn.Conv2d(in_chans * patch**2, channels[0], 3, padding=1)

        def stages(width: int) -> nn.ModuleList:
            return nn.ModuleList(TimedBlock(width, time, groups) for _ in range(blocks))

        self.down = nn.ModuleList(stages(width) for width in channels)
        self.up = nn.ModuleList(stages(width) for width in channels)
        pairs = list(itertools.pairwise(channels))
        self.coarser = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.finer = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.norm = nn.GroupNorm(groups, channels[0])
        self.head = nn.Conv2d(channels[0], 2 * in_chans * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, t: Float[Tensor, ""] | Float[Tensor, " batch"], y: Images) -> Images:
        """The velocity at time t, which is one number, or one a sample, and at the images y."""
        time = self.time(t, y)
        x = functional.pixel_unshuffle(y, self.patch).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        passed: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            if level:
                passed.append(x)
                x = self.coarser[level - 1](x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = block(x, time)
            if level:
                x = self.finer[level - 1](x) + passed.pop()
        x = self.head(functional.silu(self.norm(x)))
        slope, offset = functional.pixel_shuffle(x, self.patch).chunk(2, dim=1)
        return slope * y + offset


class ImageFlow(ContinuousFlow):
    """A continuous normalising flow of images of whole numbers 0 to levels - 1.

    A pixel v becomes v + u with uniform u in [0, 1) (`dequantise`), then x = logit(a + (1 - 2a)(v + u) / levels) / s
    with a = `margin` and s = (1 + log levels) / 2, which puts black near -2 and white near 2. The flow is that of x.
    The mean over u of the density of v + u is the probability of v, so that the mean over u of its logarithm, which
    `bits_per_dimension` tells, is a bound on the side of caution.

    Args:
        shape: channels, height and width; height and width are divisible by patch and by 2 for each further level.
        levels: of a pixel.
        channels, blocks, patch, groups: of the field's U-Net.
        margin: keeps the logit's argument away from 0 and 1.
        divergence: "exact", "rademacher", "gaussian" (Hutchinson's estimate with that noise) or "hutch++"; or any
            `Divergence`.
        t, solver, controller, rtol, atol, max_steps: of the `ContinuousFlow`.
        adjoint: likewise; None takes `CheckpointAdjoint(recursive=True)`, whose memory hardly grows with the steps.

    Raises:
        ValueError: sizes that do not fit together, an unknown divergence, a margin outside of [0, 1/2).

    Source: Lipman et al. 2023 (matching), Grathwohl et al. 2019 (likelihood); logit and margin: Dinh et al. 2017.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int] = (1, 28, 28),
        levels: int = 256,
        channels: tuple[int, ...] = (48, 64),
        blocks: int = 2,
        patch: int = 2,
        groups: int = 8,
        margin: float = 1e-6,
        divergence: str | Divergence = "rademacher",
        t: tuple[float, float] = (0.0, 1.0),
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        max_steps: int = 1000,
    ) -> None:
        span = patch * 2 ** (len(channels) - 1)
        if len(shape) != 3 or shape[1] % span or shape[2] % span:
            raise ValueError(
                f"ImageFlow: shape must be channels, height and width, both divisible by {span}, a patch of {patch} "
                f"pixels halved {len(channels) - 1} times; got {tuple(shape)}."
            )
        if any(width % groups for width in channels):
            raise ValueError(f"ImageFlow: {groups} groups do not divide the channels {tuple(channels)}.")
        if levels < 2 or not 0 <= margin < 0.5:
            raise ValueError(f"ImageFlow: needs 2 levels and a margin in [0, 1/2); got {levels} and {margin}.")
        super().__init__(
            ImageField(shape[0], tuple(channels), blocks, patch, groups),
            tuple(shape),
            divergence=named_divergence(divergence, "ImageFlow"),
            t=t,
            solver=solver,
            controller=controller,
            adjoint=CheckpointAdjoint(recursive=True) if adjoint is None else adjoint,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
        )
        self.levels, self.margin, self.scale = levels, margin, (1 + math.log(levels)) / 2

    def encode(self, values: Images) -> tuple[Images, Float[Tensor, " batch"]]:
        """From values in (0, levels) to the space of the flow, and log |det| of the map's Jacobian."""
        inside = self.margin + (1 - 2 * self.margin) * values / self.levels
        x = torch.logit(inside) / self.scale
        slope = math.log((1 - 2 * self.margin) / (self.levels * self.scale))
        return x, (slope - inside.log() - torch.log1p(-inside)).flatten(1).sum(1)

    def decode(self, x: Images) -> Images:
        """The inverse of `encode`: values, which at the margins may lie a little outside of (0, levels)."""
        return (torch.sigmoid(x * self.scale) - self.margin) * (self.levels / (1 - 2 * self.margin))

    def dequantise(
        self, pixels: Shaped[Tensor, "batch channels height width"]
    ) -> tuple[Images, Float[Tensor, " batch"]]:
        """Pixels with fresh uniform noise in the space of the flow, and log |det| of the map from v + u.

        Raises:
            ValueError: the pixels are not of the flow's shape, or are no numbers from 0 to levels - 1.
        """
        if pixels.shape[1:] != self.shape:
            raise ValueError(f"ImageFlow: expected pixels (batch, *{self.shape}), got {tuple(pixels.shape)}.")
        if len(pixels) and (int(pixels.min()) < 0 or int(pixels.max()) >= self.levels):
            raise ValueError(
                f"ImageFlow: pixels must be whole numbers from 0 to {self.levels - 1}; got {pixels.min()} to "
                f"{pixels.max()}."
            )
        like = next(self.parameters())
        # In float64, in which neither v + u nor its logit loses the noise of bright pixels.
        values = pixels.double() + torch.rand(pixels.shape, dtype=torch.float64, device=pixels.device)
        x, log_det = self.encode(values)
        return x.to(like.dtype), log_det.to(like.dtype)

    def pixel_log_prob(self, pixels: Shaped[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        """An unbiased estimate, in nats, of the mean of log p(v + u), which is at most log P(v).

        Raises:
            ValueError: as of `dequantise`.
        """
        x, log_det = self.dequantise(pixels)
        return self.log_prob(x) + log_det

    def bits_per_dimension(self, log_prob: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Nats of pixels, as `pixel_log_prob` gives them, as bits a dimension: what a code of them takes."""
        return -log_prob / (math.prod(self.shape) * math.log(2))

    def sample_pixels(self, n: int) -> UInt8[Tensor, "n channels height width"]:
        """Draw n images of whole numbers.

        Raises:
            ValueError: more than 256 levels.
        """
        if self.levels > 256:
            raise ValueError(f"ImageFlow: pixels of {self.levels} levels are more than 8 bits; use decode(sample(n)).")
        with torch.no_grad():
            return self.decode(self.sample(n)).floor().clamp(0, self.levels - 1).to(torch.uint8)


@register_model(family="flow", task="image-density", accepts=ImageFlow)
def image_flow_small(**arguments: Any) -> ImageFlow:
    """A continuous flow of small images, such as 28 x 28: a U-Net of two levels of 48 and 64 channels."""
    return ImageFlow(**arguments)


@register_model(family="flow", task="image-density", accepts=ImageFlow)
def image_flow_tiny(**arguments: Any) -> ImageFlow:
    """A continuous flow of tiny images, such as 8 x 8: a U-Net of two levels of 32 channels, without patches."""
    return ImageFlow(**{"shape": (1, 8, 8), "levels": 17, "channels": (32, 32), "patch": 1, **arguments})


@register_model(family="flow", task="image-density", accepts=ImageFlow)
def test_image_flow(**arguments: Any) -> ImageFlow:
    """An `ImageFlow` for tests: 4 x 4 pixels of 4 levels, two levels of 8 channels."""
    tiny = {"shape": (1, 4, 4), "levels": 4, "channels": (8, 8), "blocks": 1, "patch": 1}
    return ImageFlow(**{**tiny, **arguments})
