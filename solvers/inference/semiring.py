"""Semirings: one recursion, and what it computes.

A value has its components in front: (size, batch, ...). A recursion adds with `sum`, multiplies with `times`, and
reads its answer off component 0 (or 1, where a second quantity rides along). Which parts an answer is made of is the
derivative of the answer with respect to the parts: autograd walks the recursion back, and `sum` decides where to.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..transforms import tangents_of_others


class Semiring(abc.ABC):
    """The base: multiplication adds logarithms, component by component.

    Attributes:
        size: components of a value.
        operands: tensors of potentials that are lifted together.
    """

    size: int = 1
    operands: int = 1

    def lift(self, *potentials: Tensor) -> Tensor:
        """Log-potentials (batch, ...) as values (size, batch, ...)."""
        return potentials[0].unsqueeze(0)

    @abc.abstractmethod
    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Sum over the dimension `dim`, counted from the last: -1, -2, ..."""

    def times(self, x: Tensor, *others: Tensor) -> Tensor:
        """The product, broadcast."""
        for y in others:
            x = x + y
        return x

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        """x over y, and x where y is zero; not for choices, which cannot be taken back."""
        dead = torch.isneginf(y[:1])
        return x - torch.where(dead, 0.0, y)

    def only(self, keep: Tensor, x: Tensor) -> Tensor:
        """x where `keep`, and the neutral value of `sum` elsewhere."""
        return torch.where(keep, x, self.zeros((1,) * (x.ndim - 1), x))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., n, k) by (..., k, m)."""
        return self.sum(self.times(x.unsqueeze(-1), y.unsqueeze(-3)), -2)

    def zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The neutral value of `sum`, (size, *shape)."""
        return self.lift(*[like.new_full(shape, -math.inf)] * self.operands)

    def ones(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The neutral value of `times`, (size, *shape)."""
        return like.new_zeros((self.size, *shape))


class Log(Semiring):
    """The logarithm of a sum of exponentials: log-partitions, and by their derivatives marginals."""

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Logsumexp whose derivatives are zero where everything is minus infinity."""
        out: Tensor = LogSumExp.apply(x, dim)
        return out


class Max(Semiring):
    """The largest: the best structure's score; its derivative is the structure. Of equals the first counts."""

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """The maximum, whose derivative goes to one entry."""
        return x.max(dim).values


class KMax(Semiring):
    """The k largest in descending order, component by component; minus infinity where there are fewer."""

    def __init__(self, k: int) -> None:
        self.size = k

    def lift(self, *potentials: Tensor) -> Tensor:
        """The potential in front, and no second best."""
        (x,) = potentials
        return torch.cat([x.unsqueeze(0), x.new_full((self.size - 1, *x.shape), -math.inf)])

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """The k best of all entries' k best."""
        x = x.movedim((0, dim), (-2, -1)).flatten(-2)
        return x.topk(self.size, dim=-1).values.movedim(-1, 0)

    def times(self, x: Tensor, *others: Tensor) -> Tensor:
        """The k best of all pairs."""
        for y in others:
            pairs = (x.unsqueeze(1) + y.unsqueeze(0)).flatten(0, 1)
            x = pairs.topk(self.size, dim=0).values
        return x

    def ones(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Zero in front, and no second best."""
        one = self.zeros(shape, like)
        one[0] = 0.0
        return one


class Sample(Semiring):
    """As `Log`, but the derivative of a sum goes to one entry, drawn in proportion: a sample is a derivative."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Logsumexp forward, a draw backward."""
        out: Tensor = _Draw.apply(x, dim, self.generator)
        return out


class Entropy(Semiring):
    """Log-partition and entropy together: sums of terms that are not negative, and so nothing cancels.

    Source: Li and Eisner 2009 (the first-order expectation semiring), in the normalised form of Hernando et al. 2005.
    """

    size = 2

    def lift(self, *potentials: Tensor) -> Tensor:
        """A part has no entropy of its own."""
        return torch.stack([potentials[0], torch.zeros_like(potentials[0])])

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """The chain rule: entropy of the choice, and the mean of what is chosen from."""
        total, log_share, share = _shares(x[0], dim)
        return torch.stack([total, (share * (x[1] - log_share)).sum(dim)])


class Divergence(Semiring):
    """Two log-partitions, p's and q's, and KL(p | q), by the chain rule."""

    size = 3
    operands = 2

    def lift(self, *potentials: Tensor) -> Tensor:
        """The potentials of p and of q."""
        p, q = potentials
        return torch.stack([p, q, torch.zeros_like(p)])

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Divergence of the choice, and the mean under p of what is chosen from."""
        total, log_share, share = _shares(x[0], dim)
        other, log_other, _ = _shares(x[1], dim)
        # What p excludes costs nothing; what only q excludes is an infinite divergence.
        excluded = share == 0
        log_other = torch.where(torch.isneginf(x[1]) & ~excluded, -math.inf, log_other)
        ratio = (x[2] + log_share - log_other).masked_fill(excluded, 0.0)
        return torch.stack([total, other, (share * ratio).sum(dim)])


def _shares(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp of x, and the share of every entry: its logarithm (zero where the share is zero), and itself."""
    total: Tensor = LogSumExp.apply(x, dim)
    dead = torch.isneginf(x)
    # Masked before and after, so that no infinity meets another one in the derivative either.
    base = total.masked_fill(torch.isneginf(total), 0.0).unsqueeze(dim)
    log_share = (x.masked_fill(dead, 0.0) - base).masked_fill(dead, 0.0)
    return total, log_share, log_share.exp().masked_fill(dead, 0.0)


class LogSumExp(torch.autograd.Function):
    """Logsumexp with a derivative of zero, to every order, where all entries are minus infinity.

    torch.logsumexp has NaN there.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        """The sum."""
        return torch.logsumexp(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the weights are computed from."""
        x, ctx.dim = inputs
        ctx.save_for_backward(x, output)
        # What is saved for forward mode is held whatever the hooks of checkpointing say. In here tangents are switched
        # off in any case: an open level says that they may come.
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Weights times the gradient."""
        x, total = ctx.saved_tensors
        return grad.unsqueeze(ctx.dim) * _weights(x, total, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        """The weighted sum of the tangents."""
        with tangents_of_others(*ctx.saved_tensors) as (x, total):
            return (_weights(x, total, ctx.dim) * tangent).sum(ctx.dim)

    @staticmethod
    def vmap(info: Any, dims: tuple[int, None], x: Tensor, dim: int) -> tuple[Tensor, int]:
        """What is mapped over is one more leading dimension."""
        return LogSumExp.apply(x.movedim(dims[0], 0), dim + 1 if dim >= 0 else dim), 0


def _weights(x: Tensor, total: Tensor, dim: int) -> Tensor:
    return (x - total.masked_fill(torch.isneginf(total), 0.0).unsqueeze(dim)).exp()


class _Draw(torch.autograd.Function):
    """Logsumexp whose backward pass sends the gradient to one entry, drawn from the softmax."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, generator: torch.Generator | None) -> Tensor:
        """Logsumexp."""
        out = torch.logsumexp(x, dim)
        ctx.save_for_backward(x, out)
        ctx.dim, ctx.generator = dim, generator
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, at the entry that is drawn."""
        x, out = ctx.saved_tensors
        index = draw((x - out.unsqueeze(ctx.dim)).movedim(ctx.dim, -1), ctx.generator).unsqueeze(-1)
        chosen = torch.zeros_like(x).movedim(ctx.dim, -1).scatter(-1, index, grad.unsqueeze(-1))
        return chosen.movedim(-1, ctx.dim), None, None


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index per row of log-weights (..., n), by inverting the cumulative distribution; 0 where all are excluded.

    The uniform draw is in float64, whatever the logits' type: float32 cannot tell shares below 1e-7 from zero.
    """
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top.masked_fill(torch.isneginf(top), 0.0)).nan_to_num(nan=-math.inf).double().exp()
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    point = torch.rand(total.shape, dtype=torch.float64, device=total.device, generator=generator) * total
    # The first entry whose cumulative weight exceeds the point has a weight itself.
    index = (cumulative <= point).sum(-1, keepdim=True)
    last = (weights > 0).to(torch.uint8).mul(torch.arange(1, weights.shape[-1] + 1, device=weights.device)).argmax(-1)
    return torch.minimum(index.squeeze(-1), last)
