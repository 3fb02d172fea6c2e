"""Random affine changes of small images, drawn and applied for a whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from ...solvers.options import options


@options
class Affine:
    """Rotate, scale, shear and shift every image by its own uniformly drawn amounts; what comes in is black.

    Attributes:
        rotate: largest angle in degrees, to either side.
        scale: largest relative change of size, up or down.
        shear: largest shear, as displacement per distance.
        shift: largest displacement along each axis in pixels.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        generator: Generator,
        mine: slice = slice(None),
        total: int | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """`images`, each changed; bilinear between pixels.

        Where several processes share a batch of `total`, and these images are `mine` of its rows, each image changes as
        it would if one process had them all.
        """
        _, _, height, width = images.shape
        batch = len(images) if total is None else total

        def draw(largest: float) -> Tensor:
            return ((torch.rand(batch, generator=generator) * 2 - 1) * largest)[mine]

        angle, size, shear = draw(math.radians(self.rotate)), 1 + draw(self.scale), draw(self.shear)
        # affine_grid maps output to input, both in [-1, 1]: two units are the width.
        across, down = draw(self.shift) * 2 / width, draw(self.shift) * 2 / height
        cosine, sine = angle.cos() * size, angle.sin() * size
        rows = [torch.stack([cosine, shear - sine, across], dim=1), torch.stack([sine, cosine, down], dim=1)]
        grid = F.affine_grid(torch.stack(rows, dim=1).to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
