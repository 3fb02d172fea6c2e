"""Linear operators W for which I - W is at least m times the identity, so that equilibria are unique."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

State = Any
Linear = Callable[[State], State]


class Certificate(NamedTuple):
    """What is known of z = relu(W z + b) without solving it.

    Attributes:
        margin: m > 0 with <v, (I - W) v> >= m |v|^2 for every v, so that there is exactly one rest point for every b.
        norm: an upper bound on the spectral norm of I - W.
        sensitivity: 1 / m: |z(b) - z(b')| <= sensitivity |b - b'|, Euclidean norms over a sample.
        step: margin / norm^2, the forward-backward step of the best guaranteed rate.
        rate: sqrt(1 - (margin / norm)^2), by which that step shrinks the distance to the rest point at least.

    Source: Winston and Kolter 2020, proposition 1 and section 3; Pabbaraju et al. 2021, theorem 1 (sensitivity).
    """

    margin: float
    norm: float

    @property
    def sensitivity(self) -> float:  # noqa: D102
        return 1.0 / self.margin

    @property
    def step(self) -> float:  # noqa: D102
        return self.margin / self.norm**2

    @property
    def rate(self) -> float:  # noqa: D102
        return math.sqrt(max(0.0, 1.0 - (self.margin / self.norm) ** 2))


@dataclasses.dataclass(frozen=True)
class Assembled:
    """An operator's weights as one solve needs them, with the graph to its parameters.

    Attributes:
        apply: v -> W v, the batch in front.
        resolvent: alpha -> the map v -> (I + alpha (I - W))^{-1} v; None where no factorisation is at hand.
    """

    apply: Linear
    resolvent: Callable[[float], Linear] | None = None


class MonotoneOperator(nn.Module, abc.ABC):
    """W = (1 - m) I - A'A + B - B', so that I - W = m I + A'A + (B' - B): what every kind of layer has in common.

    Args:
        margin: m > 0.

    Raises:
        ValueError: margin is not positive, and nothing would be guaranteed.

    Source: Winston and Kolter 2020, proposition 1.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        if not margin > 0.0 or not math.isfinite(margin):
            raise ValueError(f"{type(self).__name__}: margin must be positive and finite; got {margin}.")
        self.margin = margin

    @abc.abstractmethod
    def assemble(self, state: State) -> Assembled:
        """The operator for states of the shapes and types of `state`.

        Raises:
            ValueError: the state does not fit; the message says what was expected.
        """

    @abc.abstractmethod
    def factor_norms(self) -> tuple[Tensor, Tensor]:
        """Upper bounds on the spectral norms of A and of B - B'."""

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """Margin and norm bound of the operator as its parameters are now."""
        a, skew = (float(norm) for norm in self.factor_norms())
        # The symmetric and the skew part add up; their norms bound the sum.
        return Certificate(self.margin, self.margin + a**2 + skew)


class DenseOperator(MonotoneOperator):
    """A fully connected operator on states (batch, features).

    Args:
        features: length of the state.
        margin: m.
    """

    def __init__(self, features: int, margin: float = 0.1) -> None:
        super().__init__(margin)
        self.features = features
        # A Gaussian matrix with this deviation has spectral norm 1.
        self.A, self.B = (nn.Parameter(torch.randn(features, features) * 0.5 / features**0.5) for _ in range(2))

    def matrix(self) -> Tensor:
        """W (features, features)."""
        eye = torch.eye(self.features, dtype=self.A.dtype, device=self.A.device)
        return (1 - self.margin) * eye - self.A.mT @ self.A + self.B - self.B.mT

    def assemble(self, state: State) -> Assembled:
        """See `MonotoneOperator`; the resolvent is one LU factorisation."""
        if not isinstance(state, Tensor) or state.ndim != 2 or state.shape[1] != self.features:
            raise ValueError(f"DenseOperator: expected a state (batch, {self.features}); got {_shapes(state)}.")
        weight = self.matrix()

        def resolvent(alpha: float) -> Linear:
            eye = torch.eye(self.features, dtype=weight.dtype, device=weight.device)
            lu, pivots = torch.linalg.lu_factor((1 + alpha) * eye - alpha * weight)
            # Rows are samples, so the system is transposed: v V' = (V v')'.
            return lambda v: torch.linalg.lu_solve(lu, pivots, v.mT).mT

        return Assembled(lambda v: v @ weight.mT, resolvent)

    def factor_norms(self) -> tuple[Tensor, Tensor]:
        """The norms themselves."""
        return torch.linalg.matrix_norm(self.A, 2), torch.linalg.matrix_norm(self.B - self.B.mT, 2)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"{self.features}, margin={self.margin}"


class ConvOperator(MonotoneOperator):
    """A convolutional operator on states (batch, channels, height, width) with periodic borders.

    Periodic convolutions are block-diagonal in the frequencies, one (channels, channels) block each, and so is their
    resolvent: both cost one Fourier transform there and back and one product a frequency.

    Args:
        channels: of the state.
        kernel: odd side of the kernels of A and B. W reaches `2 * kernel - 1` pixels through A'A.
        margin: m.

    Raises:
        ValueError: `kernel` is even.

    Source: Winston and Kolter 2020, section 3.3 and appendix C.
    """

    def __init__(self, channels: int, kernel: int = 3, margin: float = 0.1) -> None:
        super().__init__(margin)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"ConvOperator: kernel must be odd; got {kernel}.")
        self.channels, self.kernel = channels, kernel
        self.A, self.B = (nn.Parameter(_kernel(channels, channels, kernel)) for _ in range(2))

    def assemble(self, state: State) -> Assembled:
        """See `MonotoneOperator`; the resolvent is one inverse a frequency."""
        if not isinstance(state, Tensor) or state.ndim != 4 or state.shape[1] != self.channels:
            raise ValueError(
                f"ConvOperator: expected a state (batch, {self.channels}, height, width); got {_shapes(state)}."
            )
        sides = tuple(state.shape[2:])
        if min(sides) < self.kernel:
            raise ValueError(f"ConvOperator: {sides} pixels are fewer than the kernel's {self.kernel}.")
        a, b = self._spectrum(self.A, sides), self._spectrum(self.B, sides)
        eye = torch.eye(self.channels, dtype=a.dtype, device=a.device)
        weight = (1 - self.margin) * eye - a.mH @ a + b - b.mH

        def through(blocks: Tensor) -> Linear:
            return lambda v: _filter(v, blocks)

        return Assembled(through(weight), lambda alpha: through(torch.linalg.inv((1 + alpha) * eye - alpha * weight)))

    def _spectrum(self, kernel: Tensor, sides: tuple[int, ...]) -> Tensor:
        """The blocks (frequencies, channels, channels) of the convolution with `kernel` centred on the origin."""
        half = self.kernel // 2
        padded = F.pad(kernel, (0, sides[1] - self.kernel, 0, sides[0] - self.kernel))
        blocks = torch.fft.rfft2(padded.roll((-half, -half), dims=(2, 3)))
        return blocks.permute(2, 3, 0, 1).flatten(0, 1)

    def factor_norms(self) -> tuple[Tensor, Tensor]:
        """Bounds for images of any size: the sum over the kernel's taps of each one's spectral norm."""
        skew = self.B - self.B.transpose(0, 1).flip(2, 3)
        return tap_norm(self.A), tap_norm(skew)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"{self.channels}, kernel={self.kernel}, margin={self.margin}"


class MultiTierOperator(MonotoneOperator):
    """A convolutional operator on a tuple of states, each tier at half the resolution of the one before.

    A maps every tier to itself and, by a strided convolution, to the next one; B stays within its tier. Through -A'A
    neighbouring tiers influence each other both ways, and the margin holds for all of them together. Borders are
    zeros, so there is no resolvent in closed form: solve by forward-backward splitting.

    Args:
        channels: of each tier, the finest first.
        kernel: odd side of the kernels.
        margin: m.

    Raises:
        ValueError: `kernel` is even or there is no tier.

    Source: Winston and Kolter 2020, appendix C ("multi-tier" networks).
    """

    def __init__(self, channels: tuple[int, ...], kernel: int = 3, margin: float = 0.1) -> None:
        super().__init__(margin)
        if kernel < 1 or kernel % 2 == 0 or not channels:
            raise ValueError(
                f"MultiTierOperator: kernel must be odd and channels not empty; got {kernel} and {channels}."
            )
        self.channels, self.kernel = tuple(channels), kernel
        self.A = nn.ParameterList(_kernel(c, c, kernel) for c in channels)
        self.B = nn.ParameterList(_kernel(c, c, kernel) for c in channels)
        self.down = nn.ParameterList(_kernel(fine, coarse, kernel) for fine, coarse in itertools.pairwise(channels))

    def assemble(self, state: State) -> Assembled:
        """See `MonotoneOperator`; there is no resolvent."""
        tiers = state if isinstance(state, tuple) else ()
        fits = len(tiers) == len(self.channels) and all(
            tier.ndim == 4 and tier.shape[1] == c for tier, c in zip(tiers, self.channels, strict=True)
        )
        if fits:
            sides = [tier.shape[2:] for tier in tiers]
            fits = all(
                (fine[0] + 1) // 2 == coarse[0] and (fine[1] + 1) // 2 == coarse[1]
                for fine, coarse in itertools.pairwise(sides)
            )
        if not fits:
            raise ValueError(
                f"MultiTierOperator: expected a tuple of tiers of {self.channels} channels, each (batch, channels, "
                f"height, width) and half as wide, rounded up, as the one before; got {_shapes(state)}."
            )
        kernels = list(zip(self.A, self.B, strict=True))
        pad = self.kernel // 2
        skew = [b - b.transpose(0, 1).flip(2, 3) for _, b in kernels]

        def apply(tiers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            image = [F.conv2d(z, a, padding=pad) for z, (a, _) in zip(tiers, kernels, strict=True)]
            for i, down in enumerate(self.down):
                image[i + 1] = image[i + 1] + F.conv2d(tiers[i], down, stride=2, padding=pad)
            result = []
            for i, (z, (a, _)) in enumerate(zip(tiers, kernels, strict=True)):
                back = F.conv_transpose2d(image[i], a, padding=pad)
                if i < len(self.down):
                    odd = [(side + 1) % 2 for side in z.shape[2:]]
                    back = back + F.conv_transpose2d(
                        image[i + 1], self.down[i], stride=2, padding=pad, output_padding=odd
                    )
                result.append((1 - self.margin) * z - back + F.conv2d(z, skew[i], padding=pad))
            return tuple(result)

        return Assembled(apply)

    def factor_norms(self) -> tuple[Tensor, Tensor]:
        """Bounds for images of any size, by each block's taps."""
        blocks = torch.zeros(len(self.channels), len(self.channels))
        for i, kernel in enumerate(self.A):
            blocks[i, i] = tap_norm(kernel)
        for i, kernel in enumerate(self.down):
            blocks[i + 1, i] = tap_norm(kernel)
        # The norm of a block matrix is at most that of the matrix of its blocks' norms.
        skew = max(tap_norm(b - b.transpose(0, 1).flip(2, 3)) for b in self.B)
        return torch.linalg.matrix_norm(blocks, 2), skew

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"{self.channels}, kernel={self.kernel}, margin={self.margin}"


def tap_norm(kernel: Tensor) -> Tensor:
    """An upper bound on the spectral norm of the convolution with `kernel` (out, in, height, width), of any stride.

    A convolution is a sum over its taps of a shift, whose norm is at most 1, and a matrix between channels.
    """
    return torch.linalg.matrix_norm(kernel.flatten(2).permute(2, 0, 1), 2).sum()


def _kernel(inputs: int, outputs: int, side: int) -> Tensor:
    # At every frequency the block is a Gaussian matrix of spectral norm about 1.
    return torch.randn(outputs, inputs, side, side) * (0.5 / (inputs * side**2) ** 0.5)


def _filter(v: Tensor, blocks: Tensor) -> Tensor:
    """`v` (batch, channels, height, width) multiplied by one block (channels, channels) a frequency."""
    spectrum = torch.fft.rfft2(v)
    batch, channels, rows, columns = spectrum.shape
    product = blocks @ spectrum.permute(2, 3, 1, 0).reshape(rows * columns, channels, batch)
    back = product.reshape(rows, columns, channels, batch).permute(3, 2, 0, 1)
    return torch.fft.irfft2(back, s=v.shape[2:])


def _shapes(state: State) -> str:
    return str([tuple(leaf.shape) for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)])
