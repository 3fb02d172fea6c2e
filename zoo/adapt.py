"""Pretrained weights under another number of classes or of input channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .weights import load_state

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Weights (out, channels, ...) that answer an input of equal channels as `weight` (out, old, ...) does.

    Where the new number is a multiple of the old one, the weights are repeated, which keeps what tells the old
    channels apart; otherwise, as from colour to grey, every new channel gets the sum over the old ones. Both are
    scaled so that the sum over channels stays what it was.
    """
    old = weight.shape[1]
    if channels % old == 0:
        return torch.cat([weight] * (channels // old), dim=1) * (old / channels)
    total = weight.sum(dim=1, keepdim=True)
    return torch.cat([total] * channels, dim=1) / channels


def transfer(source: nn.Module, target: nn.Module) -> None:
    """Copy the state of `source` into `target`, which differs from it in its number of input channels only.

    Raises:
        CheckpointError: the model does not say which of its layers read the input, one of them cannot be adapted, or
            another tensor changed its shape too.
    """
    name = type(target).__name__
    layers: tuple[str, ...] = tuple(getattr(target, "input_layers", ()))
    if not layers:
        raise CheckpointError(
            f"{name} has no `input_layers`, so its pretrained weights cannot be adapted to another in_chans."
        )
    load_state(target, source.state_dict(), f"The pretrained {name}", without=[f"{layer}." for layer in layers])
    for layer in layers:
        _transfer_layer(source.get_submodule(layer), target.get_submodule(layer), f"{name}.{layer}")


def _transfer_layer(old: nn.Module, new: nn.Module, name: str) -> None:
    # A linear layer reads pixels and channels in one dimension, and a grouped convolution only some of the channels.
    if not isinstance(old, CONVOLUTIONS) or not isinstance(new, CONVOLUTIONS) or old.groups != 1:
        raise CheckpointError(f"{name} is {old}; only an ungrouped convolution can be adapted to another in_chans.")
    with torch.no_grad():
        adapted = adapt_channels(old.weight, new.weight.shape[1])
        if not nn.utils.parametrize.is_parametrized(new, "weight"):
            new.weight.copy_(adapted)
        elif any(True for _ in new.parametrizations.weight.buffers()):  # type: ignore[union-attr]
            # Spectral norm keeps singular vectors of the weight, and these would be those of another one.
            raise CheckpointError(
                f"{name} has a parametrization with a memory; it cannot be adapted to another in_chans."
            )
        else:
            # The right inverse: weight norm splits it into length and direction again.
            new.weight = adapted
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
