"""Vision transformers of one block at its rest point; the block is timm's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers import Solution
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ..classifier import PooledClassifier
from ..registry import register_model
from .layer import DEQ, Problem

WAVELENGTH = 10_000.0


class TokenCell(nn.Module):
    """f(z, x) = norm(blocks(z) - z + x): residual blocks of tokens as the cell of an equilibrium model.

    Residual blocks are blocks(z) = z + h(z). A rest point of them alone is a zero of h, the same for every image, if
    there is one at all: hence the injection x, and a norm around the sum. With these every image of f lies in one
    ball, so that by Brouwer's theorem there is a rest point, and on that ball dot-product attention is Lipschitz,
    which it is not on the whole space. The skip connection is taken out again, for a rest point has no long path that
    it would shorten: with it the Jacobian is P (I + h') / r, with a projection P and r the size (the root mean
    square) of what is normalised, and without it P h' / r, which leaves h more room. Where h is small, r is the size
    of x, so that f begins as a contraction by |h'| / `gain`, which timm's `init_values` makes as small as one likes.
    That it stays one is what training with a penalty on the Jacobian's growth is for.

    Args:
        blocks: maps tokens (batch, tokens, channels) to the same shape.
        channels: of the state and of the injection.

    Source: Bai, Kolter and Koltun 2019, section 3 (injection into every iteration, normalisation of the sum); Kim,
    Papamakarios and Mnih 2021 (where attention is Lipschitz).
    """

    def __init__(self, blocks: nn.Module, channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, z: Float[Tensor, "batch channels height width"], x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """f(z, x); the pixels of a map are its tokens."""
        tokens = z.flatten(2).transpose(1, 2)
        added = self.blocks(tokens) - tokens
        return self.norm(added + x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, z.shape[2:])


class AddPosition(nn.Module):
    """Adds to each pixel of a map sines and cosines of its row and column, of wavelengths from 2 pi to 20,000 pi.

    Nothing is learnt, so that maps may have any size.

    Source: Vaswani et al. 2017, section 3.5; for images Beyer, Zhai and Kolesnikov 2022.
    """

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The maps with their positions."""
        channels, height, width = maps.shape[1:]
        count = channels // 4
        exponents = torch.arange(count, device=maps.device, dtype=torch.float32) / max(count - 1, 1)
        frequencies = WAVELENGTH**-exponents
        row = torch.arange(height, device=maps.device, dtype=torch.float32).view(1, -1, 1)
        column = torch.arange(width, device=maps.device, dtype=torch.float32).view(1, 1, -1)
        angles = [(frequencies.view(-1, 1, 1) * place).expand(-1, height, width) for place in (row, column)]
        return maps + torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())]).to(maps.dtype)


class DEQViT(PooledClassifier):
    """Image classifier whose features are the rest point of a transformer block: a vision transformer of any depth.

    A 3 x 3 convolution and patches of it make the injection x; the features are z = f(z, x) with the `TokenCell` of
    timm's blocks, found from z = 0; the head is average pooling and one linear layer. Images may have any size that
    the patch divides.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        channels: of a token; a multiple of 4 and of `heads`.
        heads: of the attention.
        patch: side of a patch in pixels.
        depth: blocks in one evaluation of the cell.
        mlp_ratio: hidden channels of a block's MLP, in multiples of `channels`.
        layer_scale: initial size of what attention and MLP add to a token.
        gain: initial size of the injection.
        solver, adjoint, rtol, atol, max_steps, norm, supervise: of the `DEQ`.

    Attributes:
        num_classes, num_features, in_chans, input_layers, feature_info: as of `PooledClassifier`.

    Raises:
        ValueError: the channels do not divide as they must.

    Source: Dosovitskiy et al. 2021 (patches); Xiao et al. 2021 (a convolution before them); Bai, Kolter and Koltun
    2019 (the transformer at its rest point); the block is timm's `vision_transformer.Block`.
    """

    input_layers = ("stem.0",)

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        channels: int = 192,
        heads: int = 3,
        patch: int = 4,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.3,
        gain: float = 1.0,
        solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 50,
        norm: str | None = None,
        supervise: int = 0,
    ) -> None:
        super().__init__()
        # timm takes seconds to import; only who builds such a model should wait for it.
        from timm.layers import LayerNorm2d
        from timm.models.vision_transformer import Block

        if channels % math.lcm(4, heads):
            raise ValueError(f"DEQViT: channels must be a multiple of 4 and of heads={heads}; got {channels}.")
        self.num_classes, self.num_features, self.in_chans, self.patch = num_classes, channels, in_chans, patch
        self.feature_info = [{"num_chs": channels, "reduction": patch, "module": "deq"}]
        norm_x = LayerNorm2d(channels)
        nn.init.constant_(norm_x.weight, gain)
        early = channels // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, early, 3, padding=1), LayerNorm2d(early), nn.GELU(),
            nn.Conv2d(early, channels, patch, stride=patch), AddPosition(), norm_x,
        )  # fmt: skip
        blocks = [Block(channels, heads, mlp_ratio, qkv_bias=True, init_values=layer_scale) for _ in range(depth)]
        for block in blocks:
            # Fused attention has no second derivative and no forward one, which diagnosis and order=2 need.
            block.attn.fused_attn = False  # type: ignore[assignment]
        self.deq = DEQ(
            TokenCell(nn.Sequential(*blocks), channels),
            solver=solver,
            adjoint=adjoint,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
            norm=norm,
            supervise=supervise,
        )
        self.classifier = self.new_classifier(num_classes)

    def _inject(self, images: Tensor) -> Tensor:
        if images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise ValueError(
                f"DEQViT: the height and width of images must be multiples of the patch, {self.patch}; "
                f"got {tuple(images.shape[2:])}."
            )
        return self.stem(images)

    def problem(self, images: Float[Tensor, "batch in_chans height width"]) -> Problem:
        """The fixed-point problem whose solution the features are, as `restpoint.solvers.diagnose` takes it."""
        return self.deq.problem(self._inject(images))

    def solve_problem(self, problem: Problem) -> Solution[Tensor]:
        """The features of images, given as their `problem`."""
        return self.deq.solve_problem(problem)

    def solve(self, images: Float[Tensor, "batch in_chans height width"]) -> Solution[Tensor]:
        """The features as a Solution: how many steps each image took, how well it converged."""
        return self.deq.solve(self._inject(images))

    def forward_levels(
        self, images: Float[Tensor, "batch in_chans height width"]
    ) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The rest point."""
        yield self.deq(self._inject(images))


@register_model(family="deq", task="image-classification", accepts=DEQViT)
def deq_vit_tiny(**arguments: Any) -> DEQViT:
    """An equilibrium vision transformer for images of about 32 x 32 pixels, with the block of timm's vit_tiny."""
    return DEQViT(**arguments)


@register_model(family="deq", task="image-classification", accepts=DEQViT)
def deq_vit_small(**arguments: Any) -> DEQViT:
    """An equilibrium vision transformer for images of about 32 x 32 pixels, with the block of timm's vit_small."""
    return DEQViT(**{"channels": 384, "heads": 6, **arguments})


@register_model(family="deq", task="image-classification", accepts=DEQViT)
def test_deq_vit(**arguments: Any) -> DEQViT:
    """An equilibrium vision transformer small enough for tests."""
    return DEQViT(**{"channels": 32, "heads": 2, "mlp_ratio": 2.0, **arguments})
