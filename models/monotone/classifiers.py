"""Image classifiers whose features are the unique rest point of a monotone layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers import Anderson, Solution
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ..classifier import PooledClassifier
from ..deq.layer import Problem
from ..registry import register_model
from .layer import ForwardBackward, MonotoneDEQ, PeacemanRachford, Splitting
from .operators import Certificate, ConvOperator, DenseOperator, MultiTierOperator, State

Images = Float[Tensor, "batch in_chans height width"]


class MonotoneClassifier(PooledClassifier):
    """What the three kinds have in common: a linear injection, the layer, a readout, pooling, one linear layer.

    A subclass sets `stem`, `mon` and what `PooledClassifier` asks for, and may override `inject` and `read`.
    """

    stem: nn.Module
    mon: MonotoneDEQ
    input_layers = ("stem.0",)

    def inject(self, images: Images) -> State:
        """The injection U x + b."""
        return self.stem(images)

    def read(self, state: State) -> Iterator[Tensor]:
        """The feature maps of `feature_info`, from the rest point."""
        yield state

    def problem(self, images: Images) -> Problem:
        """The fixed-point problem whose solution the features are made of, as `restpoint.solvers.diagnose` takes it."""
        return self.mon.problem(self.inject(images))

    def solve_problem(self, problem: Problem) -> Solution[Any]:
        """The rest point of images, given as their `problem`."""
        return self.mon.solve_problem(problem)

    def solve(self, images: Images) -> Solution[Any]:
        """The rest point as a Solution: how many steps each image took, how well it converged."""
        return self.solve_problem(self.problem(images))

    def certificate(self) -> Certificate:
        """Margin, norm bound and sensitivity of the layer."""
        return self.mon.certificate()

    def forward_levels(self, images: Images) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The feature maps, the last of which is classified."""
        yield from self.read(self.mon(self.inject(images)))


class MonotoneFC(MonotoneClassifier):
    """One fully connected monotone layer on the whole image.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        side: height and width of the images, in pixels.
        features: length of the state.
        margin: m of the `DenseOperator`.
        splitting, solver, adjoint, rtol, atol, max_steps: of the `MonotoneDEQ`.

    Raises (from a forward pass):
        ValueError: an image has another size.

    Source: Winston and Kolter 2020, section 4 and appendix D ("FCmonDEQ").
    """

    def __init__(
        self, *, num_classes: int = 10, in_chans: int = 1, side: int = 28, features: int = 128, margin: float = 0.1,
        splitting: Splitting | None = None, solver: FixedPointSolver | None = None, adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4, atol: float = 0.0, max_steps: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features, self.in_chans, self.side = num_classes, features, in_chans, side
        # As a convolution of one position it reads channels like every other stem.
        self.stem = nn.Sequential(nn.Conv2d(in_chans, features, side, side))
        self.mon = MonotoneDEQ(
            DenseOperator(features, margin), splitting=splitting, solver=solver, adjoint=adjoint, rtol=rtol, atol=atol,
            max_steps=max_steps,
        )  # fmt: skip
        self.classifier = self.new_classifier(num_classes)
        self.feature_info = [{"num_chs": features, "reduction": side, "module": "mon"}]

    def inject(self, images: Images) -> Float[Tensor, "batch features"]:
        """U x + b."""
        if images.shape[2:] != (self.side, self.side):
            raise ValueError(f"MonotoneFC: expected images of {self.side} pixels; got {tuple(images.shape)}.")
        return self.stem(images).flatten(1)

    def read(self, state: Tensor) -> Iterator[Tensor]:
        """The rest point as a map of one pixel."""
        yield state[:, :, None, None]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features (batch, features) or (batch, features, 1, 1); with `pre_logits` the former."""
        flat = features.flatten(1)
        return flat if pre_logits else self.classifier(flat)


class MonotoneConv(MonotoneClassifier):
    """One convolutional monotone layer.

    Three liberties beside the paper: the injection may be strided, explicit layers may come before it, which make the
    state smaller and a step cheaper, and the head may begin with a convolution of stride 2 with normalisation. The
    paper's injection reads the image itself, and its head classifies every position of a slightly pooled map with
    weights of its own, which ties the model to one image size. `stem_channels=()`, `stride=1` and `readout=False`
    leave the liberties out.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        channels: of the state.
        stem_channels: of the explicit 3 x 3 convolutions of stride 2 before the injection, each normalised.
        stride: of the injection's 3 x 3 convolution.
        readout: whether the head begins with a convolution, before pooling.
        kernel, margin: of the `ConvOperator`.
        splitting, solver, adjoint, rtol, atol, max_steps: of the `MonotoneDEQ`.

    Source: Winston and Kolter 2020, section 3.3 and appendix D ("single convolutional").
    """

    def __init__(
        self, *, num_classes: int = 10, in_chans: int = 1, channels: int = 48, stem_channels: tuple[int, ...] = (16,),
        stride: int = 2, readout: bool = True, kernel: int = 3, margin: float = 0.5,
        splitting: Splitting | None = None, solver: FixedPointSolver | None = None, adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4, atol: float = 0.0, max_steps: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, channels, in_chans
        layers: list[nn.Module] = []
        for inputs, outputs in zip((in_chans, *stem_channels), stem_channels, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), *_normalised(outputs)]
        self.stem = nn.Sequential(*layers, nn.Conv2d((in_chans, *stem_channels)[-1], channels, 3, stride, padding=1))
        self.mon = MonotoneDEQ(
            ConvOperator(channels, kernel, margin), splitting=splitting, solver=solver, adjoint=adjoint, rtol=rtol,
            atol=atol, max_steps=max_steps,
        )  # fmt: skip
        conv = nn.Conv2d(channels, channels, 3, 2, padding=1, bias=False)
        self.readout = nn.Sequential(conv, *_normalised(channels)) if readout else nn.Identity()
        self.classifier = self.new_classifier(num_classes)
        reduction = stride * 2 ** len(stem_channels)
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": "mon"}]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features; with `pre_logits` what the last layer reads of them."""
        return super().forward_head(self.readout(features), pre_logits)


def _normalised(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(math.gcd(8, channels), channels), nn.ReLU()


class MonotoneMultiTier(MonotoneClassifier):
    """Several convolutional monotone layers of falling resolution with one joint rest point.

    The image is injected into the finest tier alone. The features are the tiers, averaged down to the coarsest one's
    resolution, side by side.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        channels: of the tiers, the finest first.
        kernel, margin: of the `MultiTierOperator`.
        splitting, solver, adjoint, rtol, atol, max_steps: of the `MonotoneDEQ`; the splitting is `ForwardBackward`,
            and the solver `Anderson()` unless another is given.

    Source: Winston and Kolter 2020, appendices C and D ("multi-tier").
    """

    def __init__(
        self, *, num_classes: int = 10, in_chans: int = 1, channels: tuple[int, ...] = (16, 32, 32), kernel: int = 3,
        margin: float = 0.5, splitting: Splitting | None = None, solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None, rtol: float = 1e-4, atol: float = 0.0, max_steps: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, sum(channels), in_chans
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels[0], 3, padding=1))
        self.bias = nn.ParameterList(torch.zeros(c) for c in channels[1:])
        self.mon = MonotoneDEQ(
            MultiTierOperator(channels, kernel, margin), splitting=splitting or ForwardBackward(0.3),
            solver=Anderson() if solver is None else solver, adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps,
        )  # fmt: skip
        self.classifier = self.new_classifier(num_classes)
        self.feature_info = [{"num_chs": sum(channels), "reduction": 2 ** (len(channels) - 1), "module": "mon"}]

    def inject(self, images: Images) -> tuple[Tensor, ...]:
        """U x + b for the finest tier, b for the others."""
        tiers = [self.stem(images)]
        for bias in self.bias:
            height, width = ((side + 1) // 2 for side in tiers[-1].shape[2:])
            tiers.append(bias.view(1, -1, 1, 1).expand(len(images), -1, height, width).to(tiers[0].dtype))
        return tuple(tiers)

    def read(self, state: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The tiers at the coarsest one's resolution, side by side."""
        height, width = state[-1].shape[2:]
        yield torch.cat([F.adaptive_avg_pool2d(tier, (height, width)) for tier in state], dim=1)

    def forward_head(self, features: Tensor | tuple[Tensor, ...], pre_logits: bool = False) -> Tensor:
        """Logits of features or of a rest point; with `pre_logits` the pooled features."""
        if isinstance(features, tuple):
            (features,) = self.read(features)
        return super().forward_head(features, pre_logits)


@register_model(family="monotone", task="image-classification", accepts=MonotoneFC)
def mon_fc_small(**arguments: Any) -> MonotoneFC:
    """A fully connected monotone operator network for images of 28 x 28 pixels: 128 features."""
    return MonotoneFC(**arguments)


@register_model(family="monotone", task="image-classification", accepts=MonotoneConv)
def mon_conv_small(**arguments: Any) -> MonotoneConv:
    """A convolutional monotone operator network for images of about 28 x 28 pixels, its state a quarter as wide."""
    # Of the steps tried on a validation set, trained weights need the fewest iterations with this one.
    return MonotoneConv(**{"splitting": PeacemanRachford(0.4), **arguments})


@register_model(family="monotone", task="image-classification", accepts=MonotoneMultiTier)
def mon_multi_small(**arguments: Any) -> MonotoneMultiTier:
    """A monotone operator network of three tiers for images of about 28 x 28 pixels."""
    return MonotoneMultiTier(**arguments)


@register_model(family="monotone", task="image-classification", accepts=MonotoneFC)
def test_mon_fc(**arguments: Any) -> MonotoneFC:
    """A fully connected monotone operator network for tests, on images of 12 x 12 pixels."""
    return MonotoneFC(**{"side": 12, "features": 16, "margin": 0.5, **arguments})


@register_model(family="monotone", task="image-classification", accepts=MonotoneConv)
def test_mon_conv(**arguments: Any) -> MonotoneConv:
    """A convolutional monotone operator network for tests."""
    return MonotoneConv(**{"channels": 8, "stem_channels": (), **arguments})


@register_model(family="monotone", task="image-classification", accepts=MonotoneMultiTier)
def test_mon_multi(**arguments: Any) -> MonotoneMultiTier:
    """A monotone operator network of two tiers for tests."""
    return MonotoneMultiTier(**{"channels": (8, 8), **arguments})
