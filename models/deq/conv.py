"""A small convolutional equilibrium classifier: stem, one block iterated to its rest point, linear head."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...solvers import Solution
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ..classifier import PooledClassifier
from ..dropout import VariationalDropout
from ..registry import register_model
from .layer import DEQ, Problem

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus}


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BranchCell(nn.Module):
    """A block of two convolutions with the input injected before its second normalisation: MDEQ's branch block.

    f(z, x) = norm3(act(s z + norm2(conv2(drop(act(norm1(conv1 z)))) + x)))

    Its last layer is a group normalisation, so every image f(z, x) lies in one ball and by Brouwer's theorem a rest
    point exists; that it is unique and found quickly is what training with a penalty on the Jacobian is for.

    Args:
        channels: of the state and of the injection.
        groups: of the group normalisations.
        expansion: the hidden channels are `expansion * channels`.
        skip: the weight s of the skip connection: 1 in MDEQ. A rest point has no long path that it would shorten, and
            without it the Jacobian is smaller and the rest point found sooner.
        gain: initial scale of norm2; above 1 the block outweighs the skip connection, and the start is contractive.
        dropout: probability with which whole hidden channels are dropped, one mask a solve.
        activation: "relu" as in MDEQ, or a smooth one, with which the rest point is a differentiable function
            everywhere.

    Source: Bai, Koltun and Kolter 2020, appendix A (the block, its injection and its initialisation).
    """

    def __init__(
        self, channels: int, groups: int = 8, expansion: int = 1, skip: float = 1.0, gain: float = 2.0,
        dropout: float = 0.0, activation: str = "silu",
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = expansion * channels
        self.conv1, self.conv2 = _conv(channels, hidden), _conv(hidden, channels)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, c) for c in (hidden, channels, channels))
        self.drop = VariationalDropout(dropout, channelwise=True)
        self.activation = ACTIVATIONS[activation]()
        self.skip = skip
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.01)
        nn.init.constant_(self.norm2.weight, gain)

    def forward(
        self, z: Float[Tensor, "batch channels height width"], x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """f(z, x)."""
        u = self.drop(self.activation(self.norm1(self.conv1(z))))
        u = self.norm2(self.conv2(u) + x)
        return self.norm3(self.activation(u + self.skip * z if self.skip else u))


class ConvDEQ(PooledClassifier):
    """Image classifier whose features are the rest point of one block.

    The stem brings the image to the state's resolution and makes the injection x; the features are z = f(z, x), found
    from z = 0; the head is average pooling and one linear layer.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        channels: of the state.
        stem_channels: output channels of the stem's first convolutions.
        stem_strides: their strides; one more convolution of stride 1 makes the injection.
        groups, expansion, skip, gain, dropout, activation: of the `BranchCell`.
        solver, adjoint, rtol, atol, max_steps, norm, supervise: of the `DEQ`.

    Attributes:
        num_classes, num_features, in_chans, input_layers, feature_info: as of `PooledClassifier`.
    """

    input_layers = ("stem.0.0",)

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 1,
        channels: int = 64,
        stem_channels: tuple[int, ...] = (32, 64),
        stem_strides: tuple[int, ...] = (2, 2),
        groups: int = 8,
        expansion: int = 1,
        skip: float = 0.0,
        gain: float = 2.0,
        dropout: float = 0.0,
        activation: str = "silu",
        solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 50,
        norm: str | None = None,
        supervise: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"ConvDEQ: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        if len(stem_channels) != len(stem_strides):
            raise ValueError(
                f"ConvDEQ: stem_channels {tuple(stem_channels)} and stem_strides {tuple(stem_strides)} "
                "differ in length."
            )
        self.num_classes, self.num_features, self.in_chans = num_classes, channels, in_chans
        widths, act = (in_chans, *stem_channels), ACTIVATIONS[activation]
        layers: list[nn.Module] = [
            nn.Sequential(_conv(a, b, stride), nn.GroupNorm(groups, b), act())
            for a, b, stride in zip(widths, widths[1:], stem_strides, strict=False)
        ]
        norm_x = nn.GroupNorm(groups, channels)
        nn.init.constant_(norm_x.weight, gain)
        self.stem = nn.Sequential(*layers, nn.Sequential(_conv(widths[-1], channels), norm_x))
        self.deq = DEQ(
            BranchCell(channels, groups, expansion, skip, gain, dropout, activation),
            solver=solver,
            adjoint=adjoint,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
            norm=norm,
            supervise=supervise,
        )
        self.classifier = self.new_classifier(num_classes)
        spans = list(itertools.accumulate(stem_strides, operator.mul))
        self.feature_info = [
            {"num_chs": width, "reduction": span, "module": f"stem.{i}"}
            for i, (width, span) in enumerate(zip(stem_channels, spans, strict=True))
        ]
        self.feature_info.append({"num_chs": channels, "reduction": (1, *spans)[-1], "module": "deq"})

    def problem(self, images: Float[Tensor, "batch in_chans height width"]) -> Problem:
        """The fixed-point problem whose solution the features are, as `restpoint.solvers.diagnose` takes it."""
        return self.deq.problem(self.stem(images))

    def solve_problem(self, problem: Problem) -> Solution[Tensor]:
        """The features of images, given as their `problem`."""
        return self.deq.solve_problem(problem)

    def solve(self, images: Float[Tensor, "batch in_chans height width"]) -> Solution[Tensor]:
        """The features as a Solution: how many steps each image took, how well it converged."""
        return self.deq.solve(self.stem(images))

    def forward_levels(
        self, images: Float[Tensor, "batch in_chans height width"]
    ) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The output of each layer of the stem but the injection, then the rest point."""
        *layers, injection = self.stem
        x = images
        for layer in layers:
            x = layer(x)
            yield x
        yield self.deq(injection(x))


@register_model(family="deq", task="image-classification", accepts=ConvDEQ)
def conv_deq_tiny(**arguments: Any) -> ConvDEQ:
    """A convolutional equilibrium classifier for images of about 8 x 8 pixels, its state as large as the image."""
    return ConvDEQ(**{"channels": 32, "stem_channels": (32,), "stem_strides": (1,), **arguments})


@register_model(family="deq", task="image-classification", accepts=ConvDEQ)
def conv_deq_small(**arguments: Any) -> ConvDEQ:
    """A convolutional equilibrium classifier for images of about 28 x 28 pixels, its state a quarter as wide."""
    return ConvDEQ(**arguments)
