"""ODE-Nets: image classifiers whose features are the end of a trajectory."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, Controller, Method, ODESolution
from ...solvers.ode.adjoint import Adjoint
from ..classifier import PooledClassifier
from ..registry import register_model
from .layer import NeuralODE


class ConcatConv2d(nn.Module):
    """A 3 x 3 convolution that sees the time as one more channel.

    Args:
        inputs: channels without the time.
        outputs: channels.

    Source: Chen et al. 2018, section 3.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs + 1, outputs, 3, padding=1)

    def forward(
        self, t: Float[Tensor, ""] | Float[Tensor, " batch"], x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """The convolution of x at time t, which is one number, or one a sample."""
        time = t.to(x.dtype).reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return self.conv(torch.cat([time, x], dim=1))


class ConvField(nn.Module):
    """dy/dt = norm3(conv2(t, act(norm2(conv1(t, act(norm1(y))))))): a pre-activation residual block with time.

    Args:
        channels: of the state.
        groups: of the group normalisations.

    Source: Chen et al. 2018, section 3; groups of at most 32 as in their code.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, channels) for _ in range(3))
        self.conv1, self.conv2 = ConcatConv2d(channels, channels), ConcatConv2d(channels, channels)
        self.act = nn.ReLU()

    def forward(
        self, t: Float[Tensor, ""] | Float[Tensor, " batch"], y: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The derivative at time t and state y."""
        hidden = self.conv1(t, self.act(self.norm1(y)))
        return self.norm3(self.conv2(t, self.act(self.norm2(hidden))))


class ODENet(PooledClassifier):
    """Image classifier: a convolutional stem, a neural ODE in place of residual blocks, and a linear head.

    The stem is convolution, normalisation and rectification, then strided 4 x 4 convolutions; the last has none of
    them behind it. The features are the normalised and rectified end of the trajectory; the head is average pooling
    and one linear layer. Unlike Chen et al. the strides follow the image: `stem_strides`.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        stem_channels: output channels of the stem's convolutions; the last are those of the state.
        stem_strides: their strides: 1 for a 3 x 3 convolution, 2 for a 4 x 4 one.
        augment: channels of zeros appended to the state (ANODE).
        groups: of the group normalisations; at most one a channel is used.
        t: start and end of the trajectory.
        solver, controller, rtol, atol, max_steps: of the `NeuralODE`.
        adjoint: likewise; None takes `CheckpointAdjoint(recursive=True)`, whose memory hardly grows with the steps.

    Attributes:
        num_classes, num_features, in_chans, input_layers, feature_info: as of `PooledClassifier`.

    Raises:
        ValueError: channels and strides of the stem do not fit together, or the groups do not divide the channels.

    Source: Chen et al. 2018, section 3; Dupont et al. 2019 for the augmentation.
    """

    input_layers = ("stem.0",)

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 1,
        stem_channels: tuple[int, ...] = (64, 64, 64),
        stem_strides: tuple[int, ...] = (1, 2, 2),
        augment: int = 0,
        groups: int = 32,
        t: tuple[float, float] = (0.0, 1.0),
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        max_steps: int = 1000,
    ) -> None:
        super().__init__()
        if len(stem_channels) != len(stem_strides) or not stem_channels or not set(stem_strides) <= {1, 2}:
            raise ValueError(
                f"ODENet: stem_channels {tuple(stem_channels)} and stem_strides {tuple(stem_strides)} must be of one "
                "length, at least 1, and every stride 1 or 2."
            )
        channels = stem_channels[-1] + augment
        for width in (*stem_channels, channels):
            if width % min(groups, width):
                raise ValueError(f"ODENet: {groups} groups do not divide {width} channels.")
        self.num_classes, self.num_features, self.in_chans = num_classes, channels, in_chans
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((in_chans, *stem_channels), stem_channels, stem_strides, strict=False):
            if layers:
                layers += [nn.GroupNorm(min(groups, inputs), inputs), nn.ReLU()]
            layers.append(nn.Conv2d(inputs, outputs, 3 if stride == 1 else 4, stride, padding=1))
        self.stem = nn.Sequential(*layers)
        self.ode = NeuralODE(
            ConvField(channels, min(groups, channels)),
            t=t,
            augment=augment,
            solver=solver,
            controller=controller,
            adjoint=CheckpointAdjoint(recursive=True) if adjoint is None else adjoint,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
        )
        self.norm = nn.GroupNorm(min(groups, channels), channels)
        self.classifier = self.new_classifier(num_classes)
        spans = list(itertools.accumulate(stem_strides, operator.mul))
        rectified = [i for i, layer in enumerate(self.stem) if isinstance(layer, nn.ReLU)]
        self.feature_info = [
            {"num_chs": width, "reduction": span, "module": f"stem.{i}"}
            for width, span, i in zip(stem_channels, spans, rectified, strict=False)
        ]
        self.feature_info.append({"num_chs": channels, "reduction": spans[-1], "module": "norm"})

    def solve(self, images: Float[Tensor, "batch in_chans height width"]) -> ODESolution[Tensor]:
        """The trajectory of the images' states: how many steps it took, and where it led."""
        return self.ode.solve(self.stem(images))

    def forward_levels(
        self, images: Float[Tensor, "batch in_chans height width"]
    ) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The rectified layers of the stem, then the end of the trajectory, normalised and rectified."""
        x = images
        for layer in self.stem:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                yield x
        yield self.norm(self.ode(x)).relu()


@register_model(family="ode", task="image-classification", accepts=ODENet)
def ode_net_small(**arguments: Any) -> ODENet:
    """The ODE-Net of Chen et al. 2018 for images of about 28 x 28 pixels: 0.21 M parameters."""
    return ODENet(**arguments)


@register_model(family="ode", task="image-classification", accepts=ODENet)
def ode_net_tiny(**arguments: Any) -> ODENet:
    """An ODE-Net for images of about 8 x 8 pixels, its state as large as the image."""
    return ODENet(**{"stem_channels": (32,), "stem_strides": (1,), "groups": 8, **arguments})


@register_model(family="ode", task="image-classification", accepts=ODENet)
def anode_net_small(**arguments: Any) -> ODENet:
    """An augmented ODE-Net for images of about 28 x 28 pixels: 48 channels of the stem and 16 of zeros."""
    return ODENet(**{"stem_channels": (48, 48, 48), "augment": 16, "groups": 16, **arguments})


@register_model(family="ode", task="image-classification", accepts=ODENet)
def anode_net_tiny(**arguments: Any) -> ODENet:
    """An augmented ODE-Net for images of about 8 x 8 pixels: 24 channels of the stem and 8 of zeros."""
    return ODENet(**{"stem_channels": (24,), "stem_strides": (1,), "augment": 8, "groups": 8, **arguments})
