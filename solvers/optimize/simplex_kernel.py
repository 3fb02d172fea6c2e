"""Thresholds of simplex maps by Newton's method, and the derivatives of the maps in closed form.

Every map here is p_i = [1 + (alpha - 1) (z_i - theta)]_+ ^ (1 / (alpha - 1)) with the theta for which p sums to one.
The q-norm (q = 1 / (alpha - 1) >= 1) of the entries above a threshold is convex and falls with the threshold, and so
Newton's method that starts on the left stays there. The product of its residual and slope shrinks at least by four a
step, which bounds the steps whatever the scores are; on random scores four to six suffice. Nothing is sorted.

All functions work along the last dimension. Those of thresholds want scores whose largest in every slice is zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..transforms import recording_tangents, tangents_of_others


def centred(scores: Tensor) -> Tensor:
    """Scores less the largest of their slice, which no map of theirs depends on.

    Raises:
        ValueError: a slice of nothing but -inf; the message names the first.
    """
    top = scores.amax(-1, keepdim=True)
    excluded = torch.isneginf(top)
    if excluded.any():
        first = tuple(excluded.squeeze(-1).nonzero()[0].tolist())
        where = f"the slice at {first} of the other dimensions" if first else "the only slice"
        raise ValueError(f"{where} is wholly masked, or all its scores are -inf: no weights can sum to one there.")
    return scores - top


def _most_steps(x: Tensor) -> int:
    """Steps after which residual times slope, at most n^2 at the start, is below the resolution of the type."""
    return math.ceil((2 * math.log(x.shape[-1]) - math.log(torch.finfo(x.dtype).eps)) / math.log(4)) + 2


def _close(x: Tensor) -> float:
    """What a sum may miss before the last step, which makes up for nearly all of it."""
    return (16 + x.shape[-1] / 512) * torch.finfo(x.dtype).eps


def sparsemax_weights(x: Tensor) -> Tensor:
    """Entries above the threshold, less it: they sum to one."""
    tau = torch.full_like(x[..., :1], -1)
    p = (x - tau).clamp_min_(0)
    scratch = torch.empty_like(p)
    before = None
    for _ in range(_most_steps(x)):
        support = torch.sign(p, out=scratch).sum(-1, keepdim=True)
        excess = p.sum(-1, keepdim=True) - 1
        # For a support that did not change, the last step's threshold is exact, but for what it lost where it is small.
        if before is not None and not ((support != before) | (excess.abs() > _close(x))).any():
            break
        tau = tau + excess / support
        torch.sub(x, tau, out=p).clamp_min_(0)
        before = support
    return p


def entmax15_roots(x: Tensor) -> Tensor:
    """Entries of x / 2 above the threshold, less it: their squares sum to one."""
    half = x / 2
    tau = torch.full_like(x[..., :1], -1)
    r = (half - tau).clamp_min_(0)
    scratch = torch.empty_like(r)
    for _ in range(_most_steps(x)):
        # Sums go by halves; a norm would lose digits on the way along a million small entries.
        norm = torch.mul(r, r, out=scratch).sum(-1, keepdim=True).sqrt()
        excess = norm - 1
        tau = tau + excess * norm / r.sum(-1, keepdim=True)
        torch.sub(half, tau, out=r).clamp_min_(0)
        if not (excess.abs() > _close(x)).any():
            break
    return r


def entmax_weights(x: Tensor, alpha: Tensor) -> Tensor:
    """The weights for any 1 <= alpha <= 2; alpha has length one along the last dimension.

    Written in log p = log1p(a u) / a, a = alpha - 1, which stays accurate as a tends to zero and p to softmax.
    """
    info = torch.finfo(x.dtype)
    a = (alpha - 1).clamp_min(info.tiny**0.5)
    # Exponentials that underflow take ten times as long as others, and what is below this counts for nothing.
    lowest = math.log(info.tiny) + 7

    def logarithms(theta: Tensor) -> Tensor:
        return (a * (x - theta)).clamp_min_(-1).log1p_().div_(a).clamp_min_(lowest)

    theta = torch.zeros_like(x[..., :1])
    for _ in range(_most_steps(x)):
        log = logarithms(theta)
        # p^(2 - alpha), but for where p is zero: nothing of what is too small to count.
        slope = (log * (1 - a)).exp_().mul_((log - lowest).sign_()).sum(-1, keepdim=True)
        total = log.exp_().sum(-1, keepdim=True)
        theta = theta + torch.expm1(a * total.log()) / a * total.pow(1 - a) / slope
        if not ((total - 1).abs() > _close(x)).any():
            break
    log = logarithms(theta)
    counts = (log - lowest).sign_()
    p = log.exp_().mul_(counts)
    # Where all weights are small, the threshold is known to the digits of one only.
    return p.div_(p.sum(-1, keepdim=True))


def _tangent(s: Tensor, direction: Tensor) -> Tensor:
    """The symmetric Jacobian diag(s) - s s' / sum(s), times a direction."""
    weighted = s * direction
    mean = weighted.sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    return torch.addcmul(weighted, s, mean, value=-1)


def _in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The dimension that vmap maps in front, made where there is none."""
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class Sparsemax(torch.autograd.Function):
    """Weights of scores; Martins and Astudillo 2016, section 2.5: the support is all that the Jacobian reads."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Weights."""
        return sparsemax_weights(centred(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep what the Jacobian is made of."""
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The symmetric Jacobian times the gradient."""
        return _tangent(ctx.saved_tensors[0].sign(), gradient)

    @staticmethod
    def jvp(ctx: Any, direction: Tensor) -> Tensor:
        """The Jacobian times the tangent."""
        with tangents_of_others(*ctx.saved_tensors) as (p,):
            return _tangent(p.sign(), direction)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int]:
        """What is mapped over is one more leading dimension."""
        return Sparsemax.apply(_in_front(x, in_dims[0], info.batch_size)), 0


class Entmax15(torch.autograd.Function):
    """Weights of scores and their square roots, of which the Jacobian is made.

    The roots are a second output, and not only kept, so that a derivative of the backward pass finds how they depend
    on the scores; Peters, Niculae and Martins 2019, section 3.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, and their roots."""
        r = entmax15_roots(centred(x))
        return r.square(), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the Jacobian is made of."""
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_weight: Tensor | None, by_root: Tensor | None) -> Tensor | None:
        """The symmetric Jacobian times the gradient, and what comes from the roots."""
        (r,) = ctx.saved_tensors
        gradient = None if by_weight is None else _tangent(r, by_weight)
        if by_root is not None:
            kept = r.sign() * by_root / 2
            own = torch.addcmul(kept, r, kept.sum(-1, keepdim=True) / r.sum(-1, keepdim=True), value=-1)
            gradient = own if gradient is None else gradient + own
        return gradient

    @staticmethod
    def jvp(ctx: Any, direction: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The Jacobian times the tangent."""
        if direction is None:
            return None, None
        with tangents_of_others(*ctx.saved_tensors) as (r,):
            mean = (r * direction).sum(-1, keepdim=True) / r.sum(-1, keepdim=True)
            moved = r.sign() * (direction - mean)
            return r * moved, moved / 2

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """What is mapped over is one more leading dimension."""
        return Entmax15.apply(_in_front(x, in_dims[0], info.batch_size)), (0, 0)


class Entmax(torch.autograd.Function):
    """Weights of scores and alpha; Correia, Niculae and Martins 2019, proposition 1, rewritten without cancellation.

    With w = log p, the weights at a fixed threshold change with alpha as p h, h = -w^2 phi(-(alpha - 1) w), and the
    threshold makes up for their sum.
    """

    @staticmethod
    def forward(x: Tensor, alpha: Tensor) -> Tensor:
        """Weights."""
        return entmax_weights(centred(x), alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep what the Jacobian is made of."""
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradient towards scores and alpha."""
        if gradient is None:
            return None, None
        p, alpha = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return _tangent(_escort_alone(p, alpha), gradient), None
        s, log = _escort(p, alpha)
        by_score = _tangent(s, gradient) if ctx.needs_input_grad[0] else None
        mean = (s * gradient).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
        return by_score, (_by_alpha(p, log, alpha) * (gradient - mean)).sum(-1, keepdim=True)

    @staticmethod
    def jvp(ctx: Any, direction: Tensor | None, of_alpha: Tensor | None) -> Tensor | None:
        """The Jacobian times the tangent."""
        with tangents_of_others(*ctx.saved_tensors) as (p, alpha):
            s, log = _escort(p, alpha)
            moved = None if direction is None else _tangent(s, direction)
            if of_alpha is None:
                return moved
            at_fixed_threshold = _by_alpha(p, log, alpha)
            total = at_fixed_threshold.sum(-1, keepdim=True)
            own = of_alpha * torch.addcmul(at_fixed_threshold, s, total / s.sum(-1, keepdim=True), value=-1)
            return own if moved is None else moved + own

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, alpha: Tensor) -> tuple[Tensor, int]:
        """What is mapped over is one more leading dimension."""
        size = info.batch_size
        return Entmax.apply(_in_front(x, in_dims[0], size), _in_front(alpha, in_dims[1], size)), 0


def _escort(p: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """p^(2 - alpha) on the support and zero beyond, and log p on the support and zero beyond."""
    support = p > 0
    # One in place of zero: its logarithm is zero, to any order of derivative.
    log = torch.where(support, p, 1).log()
    return torch.where(support, ((2 - alpha) * log).exp(), 0), log


def _escort_alone(p: Tensor, alpha: Tensor) -> Tensor:
    """The first of both; faster where nothing is recorded."""
    recorded = torch.is_grad_enabled() or recording_tangents()
    return _escort(p, alpha)[0] if recorded else p.pow(2 - alpha).mul_(p.sign())


def _by_alpha(p: Tensor, log: Tensor, alpha: Tensor) -> Tensor:
    return -p * log.square() * _phi((1 - alpha) * log)


def _phi(x: Tensor) -> Tensor:
    """(exp(x) - 1 - x) / x^2, for x >= 0 and to any order of derivative."""
    small = x < 0.5
    near = torch.where(small, x, 0)
    series = torch.full_like(near, 1 / math.factorial(16))
    for k in range(15, 1, -1):
        series = series * near + 1 / math.factorial(k)
    far = torch.where(small, 1, x)
    return torch.where(small, series, (torch.expm1(far) - far) / far.square())
