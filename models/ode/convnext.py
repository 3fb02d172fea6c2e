"""ConvNeXt with neural ODEs in place of its stages; the block is timm's own."""

from __future__ import annotations

import itertools
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


class _NoShortcut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class ConvNeXtField(nn.Module):
    """dy/dt = h(y + t b): what timm's ConvNeXt block adds to its input, with the time as a learnt bias per channel.

    A residual stage y + h(y) is Euler's method with steps of 1 for dy/dt = h(y). h is a depthwise 7 x 7 convolution,
    layer normalisation, an MLP over channels and a learnt scale per channel; it is smooth, and by its normalisation
    bounded, so that a trajectory exists for all times and cannot blow up.

    Args:
        channels: of the state.
        layer_scale: initial value of the scale.

    Source: Liu et al. 2022 (the block, timm's `ConvNeXtBlock`); Chen et al. 2018 (residual blocks as Euler steps).
    """

    def __init__(self, channels: int, layer_scale: float) -> None:
        super().__init__()
        # timm takes seconds to import; only who builds such a model should wait for it.
        from timm.models.convnext import ConvNeXtBlock

        block: Any = ConvNeXtBlock(channels, ls_init_value=layer_scale)
        # Left out instead of subtracted again, which would cancel digits.
        block.shortcut = _NoShortcut()
        self.block = block
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, t: Float[Tensor, ""] | Float[Tensor, " batch"], y: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The derivative at time t, one number or one a sample, and state y."""
        return self.block(y + t.to(y.dtype).reshape(-1, 1, 1, 1) * self.bias.view(1, -1, 1, 1))


class ODEConvNeXt(PooledClassifier):
    """Image classifier: ConvNeXt, each of whose stages is a trajectory.

    A stem of strided patches; per stage, a normalisation and a 2 x 2 convolution of stride 2 (but before the first),
    then a neural ODE; the features are the normalised end of the last trajectory, the head is average pooling and one
    linear layer.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        channels: of each stage.
        patch: side and stride of the stem's patches in pixels.
        layer_scale: initial scale of the fields.
        t: start and end of every trajectory.
        solver, controller, rtol, atol, max_steps: of each `NeuralODE`.
        adjoint: likewise; None takes `CheckpointAdjoint(recursive=True)`, whose memory hardly grows with the steps.

    Attributes:
        num_classes, num_features, in_chans, input_layers, feature_info: as of `PooledClassifier`.

    Raises:
        ValueError: there is no stage.

    Source: Liu et al. 2022, with the neural ODEs of Chen et al. 2018.
    """

    input_layers = ("stem.0",)

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        channels: tuple[int, ...] = (64, 128, 256),
        patch: int = 2,
        layer_scale: float = 0.1,
        t: tuple[float, float] = (0.0, 1.0),
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        max_steps: int = 1000,
    ) -> None:
        super().__init__()
        from timm.layers import LayerNorm2d

        if not channels:
            raise ValueError("ODEConvNeXt: channels must name at least one stage.")
        self.num_classes, self.num_features, self.in_chans = num_classes, channels[-1], in_chans
        self.feature_info = [
            {"num_chs": width, "reduction": patch * 2**i, "module": f"stages.{i}"} for i, width in enumerate(channels)
        ]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels[0], patch, stride=patch), LayerNorm2d(channels[0]))
        between = [nn.Sequential(LayerNorm2d(a), nn.Conv2d(a, b, 2, stride=2)) for a, b in itertools.pairwise(channels)]
        odes = [
            NeuralODE(
                ConvNeXtField(width, layer_scale),
                t=t,
                solver=solver,
                controller=controller,
                adjoint=CheckpointAdjoint(recursive=True) if adjoint is None else adjoint,
                rtol=rtol,
                atol=atol,
                max_steps=max_steps,
            )
            for width in channels
        ]
        self.stages = nn.ModuleList(
            nn.Sequential(down, ode) for down, ode in zip([nn.Identity(), *between], odes, strict=True)
        )
        self.norm = LayerNorm2d(channels[-1])
        self.classifier = self.new_classifier(num_classes)

    def solve(self, images: Float[Tensor, "batch in_chans height width"]) -> list[ODESolution[Tensor]]:
        """The trajectory of each stage: how many steps it took, and where it led."""
        solutions: list[ODESolution[Tensor]] = []
        x = self.stem(images)
        for stage in self.stages:
            down, ode = stage.children()
            solutions.append(ode.solve(down(x)))  # type: ignore[operator]
            x = solutions[-1].value[-1]
        return solutions

    def forward_levels(
        self, images: Float[Tensor, "batch in_chans height width"]
    ) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The end of each trajectory, the last one normalised."""
        x = self.stem(images)
        for stage in self.stages[:-1]:
            x = stage(x)
            yield x
        yield self.norm(self.stages[-1](x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters form a layer, after `PooledClassifier.group_matcher`: each stage is one."""
        stem = r"^stem" if coarse else r"^stem\.(\d+)"
        return {"stem": stem, "stages": [(r"^stages\.(\d+)", None), (r"^norm", (len(self.stages),))]}


@register_model(family="ode", task="image-classification", accepts=ODEConvNeXt)
def ode_convnext_tiny(**arguments: Any) -> ODEConvNeXt:
    """A ConvNeXt of three neural ODEs for images of about 32 x 32 pixels."""
    return ODEConvNeXt(**arguments)


@register_model(family="ode", task="image-classification", accepts=ODEConvNeXt)
def test_ode_convnext(**arguments: Any) -> ODEConvNeXt:
    """A ConvNeXt of two neural ODEs, small enough for tests."""
    return ODEConvNeXt(**{"channels": (8, 16), **arguments})
