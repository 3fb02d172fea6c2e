"""The parts of a multiscale equilibrium model: a branch's block, the fusion of resolutions, and the stage of both."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..dropout import VariationalDropout
from .layer import DEQ

Maps = tuple[Tensor, ...]
GROUPS = 8
POST_GROUPS = 4


def conv_layer(inputs: int, outputs: int, side: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size but for its stride, its weight drawn from N(0, 0.01)."""
    conv = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=bias)
    nn.init.normal_(conv.weight, std=0.01)
    return conv


class WeightNormConv2d(nn.Module):
    """A convolution without bias whose filters are `weight_g` times the unit vectors along `weight_v`.

    torch's parametrization would store the same two tensors under other names than published weights do.

    Args:
        inputs: channels.
        outputs: channels.
        side: odd height and width of the kernel.

    Source: Salimans and Kingma 2016, equation 2, per output channel.
    """

    def __init__(self, inputs: int, outputs: int, side: int = 3) -> None:
        super().__init__()
        v = torch.empty(outputs, inputs, side, side).normal_(std=0.01)
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True))
        self.weight_v = nn.Parameter(v)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """The convolution."""
        v = self.weight_v
        weight = self.weight_g * v / torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, padding=v.shape[-1] // 2)

    def extra_repr(self) -> str:
        """The shape, for repr()."""
        return str(tuple(self.weight_v.shape))


class MultiscaleBlock(nn.Module):
    """The block of one branch: gn3(relu(z + gn2(drop(conv2(relu(gn1(conv1 z)))) + x))).

    Args:
        channels: of the branch.
        expansion: the hidden channels are `expansion * channels`.
        dropout: probability with which whole channels behind conv2 are dropped, one mask a solve.

    Source: Bai, Koltun and Kolter 2020, figure 2 and appendix A.
    """

    def __init__(self, channels: int, expansion: int, dropout: float) -> None:
        super().__init__()
        hidden = expansion * channels
        self.conv1, self.gn1 = WeightNormConv2d(channels, hidden), nn.GroupNorm(GROUPS, hidden)
        self.conv2, self.gn2 = WeightNormConv2d(hidden, channels), nn.GroupNorm(GROUPS, channels)
        self.gn3 = nn.GroupNorm(GROUPS, channels)
        self.drop = VariationalDropout(dropout, channelwise=True)

    def forward(self, z: Tensor, x: Tensor | None) -> Tensor:
        """The block at state z with the injection x, or none."""
        inner = self.drop(self.conv2(torch.relu(self.gn1(self.conv1(z)))))
        inner = self.gn2(inner if x is None else inner + x)
        return self.gn3(torch.relu(inner + z))


class _Branch(nn.Module):
    def __init__(self, channels: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MultiscaleBlock(channels, expansion, dropout)])

    def forward(self, z: Tensor, x: Tensor | None) -> Tensor:
        return self.blocks[0](z, x)


class _Up(nn.Module):
    """To a finer resolution: 1 x 1 convolution, normalisation, nearest neighbour."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("conv", conv_layer(inputs, outputs, 1))
        self.net.add_module("gnorm", nn.GroupNorm(GROUPS, outputs))

    def forward(self, z: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(self.net(z), size=like.shape[2:], mode="nearest")


class _Down(nn.Module):
    """To a coarser resolution: strided convolutions with normalisation, all but the last rectified."""

    def __init__(self, inputs: int, outputs: int, halvings: int) -> None:
        super().__init__()
        self.net = nn.Sequential()
        for k in range(halvings):
            last = k + 1 == halvings
            width = outputs if last else inputs
            step = nn.Sequential()
            step.add_module("conv", conv_layer(inputs, width, 3, 2))
            step.add_module("gnorm", nn.GroupNorm(GROUPS, width))
            if not last:
                step.add_module("relu", nn.ReLU())
            self.net.append(step)

    def forward(self, z: Tensor, like: Tensor) -> Tensor:
        return self.net(z)


class _Same(nn.Module):
    def forward(self, z: Tensor, like: Tensor) -> Tensor:
        return z


def _fuse(channels: tuple[int, ...], to: int, source: int) -> nn.Module:
    if source == to:
        return _Same()
    if source > to:
        return _Up(channels[source], channels[to])
    return _Down(channels[source], channels[to], to - source)


class MultiscaleCell(nn.Module):
    """f(z, x) of a tuple of states, each branch at half the resolution of the one before.

    Every branch runs its block, with the injection in branch 0 alone; then every branch becomes the sum of all, each
    brought to its resolution, rectified, convolved 1 x 1 and normalised.

    Args:
        channels: of the branches, the finest first.
        expansion: of the blocks.
        dropout: of the blocks.
        post_affine: whether the last normalisation has a scale and a shift of its own.

    Source: Bai, Koltun and Kolter 2020, section 4.1 and appendix A.
    """

    def __init__(self, channels: tuple[int, ...], expansion: int, dropout: float, post_affine: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_Branch(c, expansion, dropout) for c in channels)
        count = range(len(channels))
        self.fuse_layers = nn.ModuleList(nn.ModuleList(_fuse(channels, i, j) for j in count) for i in count)
        self.post_fuse_layers = nn.ModuleList()
        for width in channels:
            post = nn.Sequential()
            post.add_module("relu", nn.ReLU())
            post.add_module("conv", WeightNormConv2d(width, width, 1))
            post.add_module("gnorm", nn.GroupNorm(POST_GROUPS, width, affine=post_affine))
            self.post_fuse_layers.append(post)

    def forward(self, z: Maps, x: Float[Tensor, "batch channels height width"]) -> Maps:
        """f(z, x)."""
        own = [branch(z[i], x if i == 0 else None) for i, branch in enumerate(self.branches)]
        fused = []
        for like, layers, post in zip(own, self.fuse_layers, self.post_fuse_layers, strict=True):
            parts: list[Tensor] = [
                layer(z_j, like) for layer, z_j in zip(cast(nn.ModuleList, layers), own, strict=True)
            ]
            total = functools.reduce(torch.add, parts)
            fused.append(post(total))
        return tuple(fused)


@dataclasses.dataclass(frozen=True)
class ZeroTiers:
    """z0 = 0 of every branch, for an injection: halved, rounded up, from branch to branch."""

    channels: tuple[int, ...]

    def __call__(self, x: Float[Tensor, "batch channels height width"]) -> Maps:
        """The zeros."""
        height, width = x.shape[2:]
        tiers = []
        for channels in self.channels:
            tiers.append(x.new_zeros(len(x), channels, height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
        return tuple(tiers)


class MultiscaleStage(DEQ):
    """The equilibrium layer of a `MultiscaleCell`, whose parts have the names that published weights give them.

    The cell's parts are the layer's own (`fullstage.branches...`); the cell, which holds the same modules, is not
    registered a second time.

    Args:
        cell: f(z, x).
        channels: of the branches.
        options: of `DEQ`.
    """

    def __init__(self, cell: MultiscaleCell, channels: tuple[int, ...], **options: object) -> None:
        super().__init__(cell, state=ZeroTiers(channels), **options)  # type: ignore[arg-type]
        del self._modules["cell"]
        self.__dict__["cell"] = cell
        self.branches, self.fuse_layers = cell.branches, cell.fuse_layers
        self.post_fuse_layers = cell.post_fuse_layers
