"""Dropout whose mask stays what it is while a solver runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class MaskShape:
    """What one call of a `VariationalDropout` needs: its mask's shape without the batch, type, place and rate."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    p: float

    def draw(self, batch: int) -> Tensor:
        """A new mask (batch, *shape): 0 with probability p, else 1 / (1 - p)."""
        keep = 1.0 - self.p
        return torch.empty(batch, *self.shape, dtype=self.dtype, device=self.device).bernoulli_(keep).div_(keep)


# What the dropouts inside one evaluation of a cell do: append to a list (record), or take the next mask (replay).
_calls: ContextVar[list[MaskShape] | Iterator[Tensor] | None] = ContextVar("_calls", default=None)


class VariationalDropout(nn.Module):
    """Dropout for the inside of an equilibrium cell: one mask a solve, shared by all evaluations and the backward pass.

    `torch.nn.Dropout` draws anew at every evaluation, so that a solver chases a map that never holds still. Here the
    surrounding `DEQ` draws each mask once a forward pass and hands it, with the batch in front, to every evaluation.
    The module itself stores nothing. Outside a solve it is ordinary dropout.

    Args:
        p: probability that an entry is dropped.
        channelwise: drop whole channels (dimension 1) instead of entries.

    Raises:
        ValueError: p lies outside [0, 1).

    Source: Gal and Ghahramani 2016, section 4 (masks shared over time); Bai et al. 2019 (over solver steps).
    """

    def __init__(self, p: float = 0.5, channelwise: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"VariationalDropout: p must lie in [0, 1); got {p}.")
        self.p = p
        self.channelwise = channelwise

    def forward(self, x: Tensor) -> Tensor:
        """`x` (batch, ...) with entries or channels dropped while training."""
        if not self.training or self.p == 0.0:
            return x
        shape = (x.shape[1],) + (1,) * (x.ndim - 2) if self.channelwise else tuple(x.shape[1:])
        needed = MaskShape(shape, x.dtype, x.device, self.p)
        calls = _calls.get()
        if calls is None:
            return x * needed.draw(len(x))
        if isinstance(calls, list):
            calls.append(needed)
            return x
        mask = next(calls, None)
        if mask is None:
            raise RuntimeError(
                "VariationalDropout: this solve holds no mask for this call. A DEQ draws masks for the dropouts among "
                "its cell's modules, which every evaluation must call in the same order; give the cell as an nn.Module."
            )
        if mask.shape[1:] != needed.shape:
            raise RuntimeError(
                f"VariationalDropout: this call needs a mask of shape (batch, {_sizes(needed.shape)}), and the solve "
                f"drew one of (batch, {_sizes(mask.shape[1:])}) for it. Every evaluation must call the cell's dropouts "
                "in the same order, with the same shapes."
            )
        if len(mask) != len(x):
            raise RuntimeError(
                f"VariationalDropout: expected the batch of the state in front, {len(mask)}, got {len(x)}: a mask "
                "belongs to a sample. Drop before samples are split or joined."
            )
        return x * mask.to(x.dtype)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"p={self.p}, channelwise={self.channelwise}"


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def active_dropouts(module: nn.Module) -> bool:
    """Whether any `VariationalDropout` in `module` would drop something now."""
    return any(isinstance(m, VariationalDropout) and m.training and m.p > 0 for m in module.modules())


def inside_solve() -> bool:
    """Whether a surrounding solve is handing out masks at this moment."""
    return _calls.get() is not None


@contextlib.contextmanager
def recording() -> Iterator[list[MaskShape]]:
    """Inside, dropouts let everything pass and append what they need to the list."""
    shapes: list[MaskShape] = []
    token = _calls.set(shapes)
    try:
        yield shapes
    finally:
        _calls.reset(token)


@contextlib.contextmanager
def replaying(masks: tuple[Tensor, ...]) -> Iterator[None]:
    """Inside, dropouts use `masks` in the order of their calls."""
    token = _calls.set(iter(masks))
    try:
        yield
    finally:
        _calls.reset(token)
