"""Multiscale deep equilibrium models (MDEQ), with the names, shapes and operations of the published ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers import LU, Broyden, FixedPointLinear, ImplicitAdjoint, Solution
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ..classifier import PooledClassifier
from ..registry import register_model
from .layer import Problem
from .mdeq_parts import Maps, MultiscaleCell, MultiscaleStage, conv_layer

Images = Float[Tensor, "batch in_chans height width"]


def _unit(inputs: int, outputs: int, side: int, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    return [conv_layer(inputs, outputs, side, stride, bias), nn.BatchNorm2d(outputs), nn.ReLU()]


class Bottleneck(nn.Module):
    """What widens a branch before the head: 1 x 1, 3 x 3, 1 x 1 with a projected shortcut, four times `width` out.

    Args:
        inputs: channels.
        width: of the 3 x 3 convolution.

    Source: He et al. 2015, figure 5, as in HRNet's classification head; its batch normalisations have no parameters.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = conv_layer(inputs, width, 1), nn.BatchNorm2d(width, affine=False)
        self.conv2, self.bn2 = conv_layer(width, width), nn.BatchNorm2d(width, affine=False)
        self.conv3, self.bn3 = conv_layer(width, outputs, 1), nn.BatchNorm2d(outputs, affine=False)
        self.downsample = nn.Sequential(conv_layer(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h w"]:
        """The block."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class _Multiscale(nn.Module):
    """Stem and equilibrium stage, which classifiers and segmenters share.

    Args:
        in_chans: channels of the image.
        channels: of the branches.
        expansion: of the blocks.
        dropout: variational, of whole channels, inside the blocks.
        halvings: 0 to 2: how often the stem halves the image.
        post_affine: whether the cell's last normalisation has parameters.
        backward_steps: budget of the backward solve, where `adjoint` is None.
        solver, adjoint, rtol, atol, max_steps: of the `DEQ`; None takes `Broyden()`, forward and backward.
    """

    def _build(
        self, in_chans: int, channels: tuple[int, ...], expansion: int, dropout: float, halvings: int,
        post_affine: bool, backward_steps: int, solver: FixedPointSolver | None, adjoint: AnyAdjoint | None,
        rtol: float, atol: float, max_steps: int,
    ) -> None:  # fmt: skip
        if halvings not in (0, 1, 2) or not channels:
            raise ValueError(
                f"{type(self).__name__}: halvings must be 0, 1 or 2, and channels not empty; got {halvings} and "
                f"{channels}."
            )
        width = channels[0]
        strides = [2 if k < halvings else 1 for k in range(2)]
        self.downsample = nn.Sequential(*_unit(in_chans, width, 3, strides[0]), *_unit(width, width, 3, strides[1]))
        self.stage0: nn.Module = nn.Identity()
        if halvings > 0 or len(channels) > 2:
            self.stage0 = nn.Sequential(*_unit(width, width, 1))
        solver = Broyden(memory=max_steps) if solver is None else solver
        if adjoint is None:
            linear = FixedPointLinear(solver=Broyden(memory=backward_steps), rtol=rtol, max_steps=backward_steps)
            adjoint = ImplicitAdjoint(linear)
        self.fullstage = MultiscaleStage(
            MultiscaleCell(channels, expansion, dropout, post_affine), channels,
            solver=solver, adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps,
        )  # fmt: skip

    def problem(self, images: Images) -> Problem:
        """The fixed-point problem of images, as `restpoint.solvers.diagnose` takes it."""
        return self.fullstage.problem(self.stage0(self.downsample(images)))

    def solve_problem(self, problem: Problem) -> Solution[Any]:
        """The rest point, one map a branch, of images given as their `problem`."""
        return self.fullstage.solve_problem(problem)

    def solve(self, images: Images) -> Solution[Any]:
        """The rest point as a Solution: how many steps each image took, how well it converged."""
        return self.solve_problem(self.problem(images))

    def rest_point(self, images: Images) -> Maps:
        """The rest point, one map a branch, the finest first; NaN for images whose solve met a NaN or an infinity."""
        return self.fullstage(self.stage0(self.downsample(images)))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters whose size is no complexity: the lengths that weight normalisation splits off."""
        return {name for name, _ in self.named_parameters() if name.endswith("weight_g")}


class MDEQ(_Multiscale, PooledClassifier):
    """Image classifier on the joint rest point of several resolutions.

    The stem's output is injected into the finest branch alone, and the solve starts from zero. In the head each branch
    is widened, the finer ones are brought down and added to the coarser ones, and the sum is widened once more.

    Batch normalisation outside the cell makes training and evaluation different maps, as it does in any network;
    dropout's mask is one a solve. State dicts have the names and shapes of the published weights.

    Where it differs from the published code: samples stop one by one, the solver's step is halved where it would lead
    astray, and a backward solve that has not reached `rtol` after `backward_steps` warns.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        channels: of the branches, the finest first; multiples of 8.
        head_channels: of the bottlenecks behind each branch, a quarter of what they return.
        final_channels: of the features.
        expansion: of the blocks: their hidden channels are `expansion` times the branch's.
        dropout: probability of variational dropout inside the blocks.
        halvings: 0 to 2: how often the stem halves the image.
        post_affine: whether the cell's last normalisation has a scale and a shift.
        backward_steps: budget of the backward solve, where `adjoint` is None.
        solver, adjoint, rtol, atol, max_steps: of the `DEQ`; None takes `Broyden()`, forward and backward.

    Raises:
        ValueError: an option out of range.

    Source: Bai, Koltun and Kolter 2020, Multiscale deep equilibrium models, section 4 and appendices A and B.
    """

    input_layers = ("downsample.0",)

    def __init__(
        self, *, num_classes: int = 10, in_chans: int = 3, channels: tuple[int, ...] = (24, 24),
        head_channels: tuple[int, ...] = (8, 16), final_channels: int = 200, expansion: int = 5, dropout: float = 0.25,
        halvings: int = 0, post_affine: bool = False, backward_steps: int = 20,
        solver: FixedPointSolver | None = None, adjoint: AnyAdjoint | None = None, rtol: float = 1e-3,
        atol: float = 0.0, max_steps: int = 18,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(head_channels) != len(channels):
            raise ValueError(f"MDEQ: head_channels {head_channels} and channels {channels} differ in length.")
        self._build(
            in_chans, channels, expansion, dropout, halvings, post_affine, backward_steps, solver, adjoint, rtol, atol,
            max_steps,
        )  # fmt: skip
        self.num_classes, self.num_features, self.in_chans = num_classes, final_channels, in_chans
        wide = [4 * width for width in head_channels]
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(c, width)) for c, width in zip(channels, head_channels, strict=True)
        )
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(*_unit(fine, coarse, 3, 2, bias=True)) for fine, coarse in itertools.pairwise(wide)
        )
        self.final_layer = nn.Sequential(*_unit(wide[-1], final_channels, 1, bias=True))
        self.classifier = self.new_classifier(num_classes)
        spans = [2 ** (halvings + k) for k in range(len(channels))]
        self.feature_info = [
            {"num_chs": c, "reduction": span, "module": f"fullstage.branches.{k}"}
            for k, (c, span) in enumerate(zip(channels, spans, strict=True))
        ]
        self.feature_info.append({"num_chs": final_channels, "reduction": spans[-1], "module": "final_layer"})

    def read(self, state: Maps) -> Float[Tensor, "batch channels h w"]:
        """The features, from a rest point."""
        y = self.incre_modules[0](state[0])
        for z, widen, down in zip(state[1:], list(self.incre_modules)[1:], self.downsamp_modules, strict=True):
            y = widen(z) + down(y)
        return self.final_layer(y)

    def forward_levels(self, images: Images) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The branches at rest, then what the head makes of them."""
        state = self.rest_point(images)
        yield from state
        yield self.read(state)

    def forward_head(self, features: Tensor | Maps, pre_logits: bool = False) -> Tensor:
        """Logits of features, or of a rest point; with `pre_logits` the pooled features."""
        return super().forward_head(self.read(features) if isinstance(features, tuple) else features, pre_logits)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See `PooledClassifier`."""
        return {"stem": r"^downsample" if coarse else r"^downsample\.(\d+)", "body": r"^(?!downsample\.|classifier)"}


class MDEQSegmenter(_Multiscale):
    """Semantic segmentation on the joint rest point of several resolutions.

    The branches are brought to the finest one's resolution side by side, and two 1 x 1 convolutions classify every
    position.

    Args:
        num_classes: of a pixel.
        others: as of `MDEQ`.

    Attributes:
        num_classes, in_chans: as given.

    Source: Bai, Koltun and Kolter 2020, section 5.3; the head as in Sun et al. 2019 (HRNetV2).
    """

    def __init__(
        self, *, num_classes: int = 19, in_chans: int = 3, channels: tuple[int, ...] = (32, 64, 128, 256),
        expansion: int = 5, dropout: float = 0.0, halvings: int = 2, post_affine: bool = True,
        backward_steps: int = 27, solver: FixedPointSolver | None = None, adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-3, atol: float = 0.0, max_steps: int = 26,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build(
            in_chans, channels, expansion, dropout, halvings, post_affine, backward_steps, solver, adjoint, rtol, atol,
            max_steps,
        )  # fmt: skip
        self.num_classes, self.in_chans = num_classes, in_chans
        total = sum(channels)
        self.last_layer = nn.Sequential(
            *_unit(total, total, 1, bias=True), conv_layer(total, num_classes, 1, bias=True)
        )

    def forward(self, images: Images) -> Float[Tensor, "batch num_classes h w"]:
        """Logits of every position of the finest branch: `2 ** halvings` pixels of the image each way."""
        state = self.rest_point(images)
        size = state[0].shape[2:]
        coarse = [F.interpolate(z, size=size, mode="bilinear", align_corners=True) for z in state[1:]]
        return self.last_layer(torch.cat([state[0], *coarse], dim=1))


_SMALL: dict[str, Any] = {"channels": (32, 64, 128, 256)}
_LARGE: dict[str, Any] = {"channels": (80, 160, 320, 640)}
_XL: dict[str, Any] = {"channels": (88, 176, 352, 704), "expansion": 6}
_CIFAR_LARGE: dict[str, Any] = {**_SMALL, "head_channels": (14, 28, 56, 112), "final_channels": 1680, "dropout": 0.3}
_IMAGENET: dict[str, Any] = {
    "num_classes": 1000, "head_channels": (32, 64, 128, 256), "final_channels": 2048, "dropout": 0.0, "halvings": 2,
    "post_affine": True, "max_steps": 26, "backward_steps": 27,
}  # fmt: skip


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_tiny(**arguments: Any) -> MDEQ:
    """MDEQ for CIFAR-10, two branches: 0.159 M parameters."""
    return MDEQ(**arguments)


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_large(**arguments: Any) -> MDEQ:
    """MDEQ for CIFAR-10, four branches: 11.10 M parameters."""
    return MDEQ(**{**_CIFAR_LARGE, **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_large_reg(**arguments: Any) -> MDEQ:
    """MDEQ for CIFAR-10, four branches, as trained with Jacobian regularisation: 11.10 M parameters."""
    return MDEQ(**{**_CIFAR_LARGE, **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_small_imagenet(**arguments: Any) -> MDEQ:
    """MDEQ for ImageNet, small: 16.81 M parameters."""
    return MDEQ(**{**_IMAGENET, **_SMALL, "head_channels": (24, 48, 96, 192), **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_small_imagenet_reg(**arguments: Any) -> MDEQ:
    """MDEQ for ImageNet, small, as trained with Jacobian regularisation: 18.61 M parameters."""
    small = {**_IMAGENET, **_SMALL, "head_channels": (28, 56, 112, 224), "post_affine": False}
    return MDEQ(**{**small, **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_large_imagenet(**arguments: Any) -> MDEQ:
    """MDEQ for ImageNet, large: 67.06 M parameters."""
    return MDEQ(**{**_IMAGENET, **_LARGE, **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_large_imagenet_reg(**arguments: Any) -> MDEQ:
    """MDEQ for ImageNet, large, as trained with Jacobian regularisation: 67.06 M parameters."""
    return MDEQ(**{**_IMAGENET, **_LARGE, "post_affine": False, **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def mdeq_xl_imagenet(**arguments: Any) -> MDEQ:
    """MDEQ for ImageNet, extra large: 90.46 M parameters."""
    return MDEQ(**{**_IMAGENET, **_XL, **arguments})


@register_model(family="mdeq", task="semantic-segmentation", accepts=MDEQSegmenter)
def mdeq_small_cityscapes(**arguments: Any) -> MDEQSegmenter:
    """MDEQ for segmentation of Cityscapes, small: 8.97 M parameters."""
    return MDEQSegmenter(**arguments)


@register_model(family="mdeq", task="semantic-segmentation", accepts=MDEQSegmenter)
def mdeq_large_cityscapes(**arguments: Any) -> MDEQSegmenter:
    """MDEQ for segmentation of Cityscapes, large: 55.96 M parameters."""
    return MDEQSegmenter(**{**_LARGE, **arguments})


@register_model(family="mdeq", task="semantic-segmentation", accepts=MDEQSegmenter)
def mdeq_xl_cityscapes(**arguments: Any) -> MDEQSegmenter:
    """MDEQ for segmentation of Cityscapes, extra large: 79.55 M parameters."""
    return MDEQSegmenter(**{**_XL, **arguments})


@register_model(family="mdeq", task="image-classification", accepts=MDEQ)
def test_mdeq(**arguments: Any) -> MDEQ:
    """A small MDEQ for tests, without dropout, whose backward solve is direct: freshly drawn it is no contraction."""
    small = {"channels": (8, 8), "head_channels": (4, 4), "final_channels": 16, "expansion": 1, "dropout": 0.0}
    return MDEQ(**{**small, "adjoint": ImplicitAdjoint(LU()), **arguments})
