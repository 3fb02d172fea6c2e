"""Forward-backward of linear chains, and its derivatives in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from ..transforms import inside_vmap

Recursion = Callable[[Tensor, Tensor], Tensor]

MODERATE = 20.0
"""Potentials up to here, in absolute value, need no logarithms."""


class Weights(NamedTuple):
    """What a forward pass leaves.

    Attributes:
        value: the log-partition (batch,).
        last: probabilities of the last state (batch, states).
        into: of every transition its weight among those into the same state; as the potentials.
        sums: of those weights, over where they come from; one (batch, states) per step.
    """

    value: Tensor
    last: Tensor
    into: Tensor
    sums: list[Tensor]


def forward_scores(edges: Tensor, unary: Tensor, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The log-partition (batch,), and the forward scores of every position, each (batch, states).

    Scores are those of all prefixes that end in a state, less the largest of the position: kept near zero, they do
    not lose digits as the chain gets longer, which sums of a thousand terms in float32 do.

    Args:
        edges: (batch, length - 1, states, states).
        unary: (batch, length, states).
        valid: (length, batch), False beyond a sequence's length; None where there is nothing beyond.
    """
    scores, top = _centre(unary.select(1, 0))
    kept, tops = [scores], [top]
    for t, (edge, own) in enumerate(zip(edges.unbind(1), unary.unbind(1)[1:], strict=True), 1):
        raw, _ = _combine(scores.unsqueeze(2) + edge, own)
        following, top = _centre(raw)
        if valid is not None:
            following, top = hold(valid[t], following, top, scores, 0.0)
        scores = following
        kept.append(scores)
        tops.append(top)
    return torch.cat(tops, 1).sum(1) + torch.logsumexp(scores, 1), kept


def forward_weights(edges: Tensor, unary: Tensor, valid: Tensor | None, moderate: bool) -> Weights:
    """The forward pass of which `backward_weights` makes marginals.

    Args:
        edges, unary, valid: as of `forward_scores`.
        moderate: no potential is larger than `MODERATE` in absolute value.
    """
    into = torch.empty_like(edges, memory_format=torch.contiguous_format)
    run = _by_probabilities if moderate else _by_scores
    value, last, sums = run(edges, unary, valid, into.unbind(1))
    return Weights(value, last, into, sums)


def _by_scores(
    edges: Tensor, unary: Tensor, valid: Tensor | None, into: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Exponentials are of differences to the largest: no scale overflows or loses the small ones."""
    scores, top = _centre(unary.select(1, 0))
    sums, tops = [], [top]
    for t, (edge, own, weights) in enumerate(zip(edges.unbind(1), unary.unbind(1)[1:], into, strict=True), 1):
        torch.add(scores.unsqueeze(2), edge, out=weights)
        raw, total = _combine(weights, own)
        # A state that cannot be reached has sum zero; every other one contains exp(0).
        sums.append(total.clamp_(min=1))
        following, top = _centre(raw)
        if valid is not None:
            following, top = hold(valid[t], following, top, scores, 0.0)
        scores = following
        tops.append(top)
    end = torch.logsumexp(scores, 1)
    last = (scores - end.masked_fill(torch.isneginf(end), 0.0).unsqueeze(1)).exp()
    return torch.cat(tops, 1).sum(1) + end, last, sums


def _by_probabilities(
    edges: Tensor, unary: Tensor, valid: Tensor | None, into: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same without logarithms, in half the time: probabilities of prefixes, normalised at every step.

    A sum over prefixes is at least exp(-20), and so what underflows is below 1e-25 of it.
    """
    factors = unary.exp()
    share, norm = normalise(factors[:, 0])
    sums, norms = [], [norm]
    for t, (edge, own, weights) in enumerate(zip(edges.unbind(1), factors.unbind(1)[1:], into, strict=True), 1):
        total = torch.exp(edge, out=weights).mul_(share.unsqueeze(2)).sum(1)
        sums.append(total)
        following, norm = normalise(total * own)
        if valid is not None:
            following, norm = hold(valid[t], following, norm, share, 1.0)
        share = following
        norms.append(norm)
    return torch.cat(norms, 1).log().sum(1), share, sums


def backward_weights(weights: Weights, last: Tensor, valid: Tensor | None, out: Tensor) -> Tensor:
    """Marginals of transitions, into `out`, and of states.

    Args:
        weights: of the forward pass.
        last: `weights.last`, or times a factor per sample, which then multiplies all marginals.
        valid: as in the forward pass.
        out: as the potentials; may be `weights.into`.
    """
    share, states = last, [last]
    steps = list(zip(weights.into.unbind(1), weights.sums, out.unbind(1), strict=True))
    for t in range(len(steps), 0, -1):
        into, total, here = steps[t - 1]
        torch.mul(into, (share / total).unsqueeze(1), out=here)
        before = here.sum(2)
        if valid is not None:
            inside = valid[t].unsqueeze(1)
            before = torch.where(inside, before, share)
            states[-1] = share.masked_fill(~inside, 0.0)
        share = before
        states.append(share)
    if valid is not None:
        out.masked_fill_(~valid[1:].T[:, :, None, None], 0.0)
    return torch.stack(states[::-1], 1)


def _combine(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scores (batch, from, to) in place into exponentials over the largest; next raw scores, and the sums."""
    top = finite_top(scores.amax(1, keepdim=True))
    total = scores.sub_(top).exp_().sum(1)
    return total.log().add_(top.squeeze(1)).add_(own), total


def _centre(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less the largest, and the largest (batch, 1)."""
    top = raw.amax(1, keepdim=True)
    return raw - finite_top(top), top


def normalise(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over their sum, and the sum (batch, 1)."""
    total = weights.sum(1, keepdim=True)
    return weights / total, total


def finite_top(top: Tensor) -> Tensor:
    """A maximum to subtract: minus infinity less the lowest number is minus infinity, where less itself it is NaN."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def hold(inside: Tensor, following: Tensor, scale: Tensor, before: Tensor, one: float) -> tuple[Tensor, Tensor]:
    """Beyond the length everything stays what it was, and the scale is `one`."""
    inside = inside.unsqueeze(1)
    return torch.where(inside, following, before), torch.where(inside, scale, one)


def covariance_product(
    transitions: Tensor, states: Tensor, by_transition: Tensor | None, by_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The covariance of all parts times a direction: the derivative of the marginals, from the marginals alone.

    With S the sum of the direction over the parts of a structure, the covariance of a part with S is its marginal
    times E[S | part] - E[S], and given two neighbouring states, what comes before and after them are independent.
    The direction is centred first: conditional means stay small however long the chain is.

    Args:
        transitions: marginals (batch, length - 1, states, states).
        states: marginals (batch, length, states).
        by_transition: the direction, as `transitions`; None for zero.
        by_state: the direction, as `states`; None for zero.
    """
    inverse = states.clamp(min=torch.finfo(states.dtype).tiny).reciprocal()
    own, into, out, mean = torch.zeros_like(states), None, None, None
    if by_state is not None:
        own = by_state - (by_state * states).sum(2, keepdim=True)
    if by_transition is not None:
        weighted = by_transition * transitions
        into, out = weighted.sum(2), weighted.sum(3)
        mean = into.sum(2, keepdim=True)
        into = into.addcmul_(mean, states[:, 1:], value=-1)
        out = out.addcmul_(mean, states[:, :-1], value=-1)
    past, future = [own[:, 0]], [torch.zeros_like(own[:, 0])]
    steps = transitions.unbind(1)
    own_at, inverse_at = own.unbind(1), inverse.unbind(1)
    into_at = out_at = None
    if into is not None and out is not None:
        into_at, out_at = into.unsqueeze(2).unbind(1), out.unsqueeze(3).unbind(1)
    for t, step in enumerate(steps):
        carried = _carry(into_at[t] if into_at else None, past[-1].unsqueeze(1), step).squeeze(1)
        past.append(torch.addcmul(own_at[t + 1], carried, inverse_at[t + 1]))
    for t in range(len(steps) - 1, -1, -1):
        later = (own_at[t + 1] + future[-1]).unsqueeze(2)
        future.append(_carry(out_at[t] if out_at else None, steps[t], later).squeeze(2).mul_(inverse_at[t]))
    before, after = torch.stack(past, 1), torch.stack(future[::-1], 1)
    earlier = before[:, :-1] if mean is None else before[:, :-1] - mean
    total = earlier.unsqueeze(3) + (own + after)[:, 1:].unsqueeze(2)
    if by_transition is not None:
        total += by_transition
    return total.mul_(transitions), states * (before + after)


def _carry(start: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if start is None else torch.baddbmm(start, a, b)


class LogPartition(torch.autograd.Function):
    """The log-partition, whose derivative is the marginals."""

    @staticmethod
    def forward(
        ctx: Any, edges: Tensor, unary: Tensor, valid: Tensor | None, moderate: bool, recursion: Recursion
    ) -> Tensor:
        """(batch,); arguments as of `Marginals`."""
        weights = forward_weights(edges, unary, valid, moderate)
        ctx.save_for_backward(edges, unary, weights.last, weights.into, *weights.sums)
        ctx.rest = valid, moderate, recursion
        return weights.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Marginals times the gradient."""
        edges, unary, last, into, *sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            transitions, states = Marginals.apply(edges, unary, *ctx.rest)
            return transitions * grad[:, None, None, None], states * grad[:, None, None], None, None, None
        if inside_vmap() or _functorch.is_legacy_batchedtensor(grad):
            # Many gradients at once: they cannot be multiplied into what they share.
            transitions = torch.empty_like(into)
            states = backward_weights(Weights(grad, last, into, sums), last, ctx.rest[0], transitions)
            return transitions * grad[:, None, None, None], states * grad[:, None, None], None, None, None
        # Without retain_graph nobody looks at the weights again, and the marginals can take their place.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        transitions = torch.empty_like(into) if kept else into
        weights = Weights(grad, last, into, sums)
        states = backward_weights(weights, last * grad.unsqueeze(1), ctx.rest[0], transitions)
        return transitions, states, None, None, None


class Marginals(torch.autograd.Function):
    """Marginals of transitions and of states, differentiable to every order.

    Their derivative is `covariance_product`. Where the derivative of that is asked for, the plain recursion is recorded
    and differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any, edges: Tensor, unary: Tensor, valid: Tensor | None, moderate: bool, recursion: Recursion
    ) -> tuple[Tensor, Tensor]:
        """Marginals in the shapes of `edges` and `unary`.

        Args:
            ctx: of autograd.
            edges: (batch, length - 1, states, states).
            unary: (batch, length, states).
            valid: (length, batch), False beyond a sequence's length, or None.
            moderate: see `forward_weights`.
            recursion: maps edges and unary to the log-partition by steps that autograd can follow.
        """
        weights = forward_weights(edges, unary, valid, moderate)
        states = backward_weights(weights, weights.last, valid, weights.into)
        ctx.save_for_backward(edges, unary, weights.into, states)
        ctx.recursion = recursion
        ctx.set_materialize_grads(False)
        return weights.into, states

    @staticmethod
    def backward(
        ctx: Any, by_transition: Tensor | None, by_state: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Covariances times the gradient."""
        edges, unary, transitions, states = ctx.saved_tensors
        if by_transition is None and by_state is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():
            return *_recorded(ctx.recursion, edges, unary, by_transition, by_state), None, None, None
        with torch.autocast(edges.device.type, enabled=False):
            return *covariance_product(transitions, states, by_transition, by_state), None, None, None


def _recorded(
    recursion: Recursion, edges: Tensor, unary: Tensor, by_transition: Tensor | None, by_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The covariance product as a function that autograd can differentiate again."""
    edges = edges if edges.requires_grad else edges.detach().requires_grad_()
    unary = unary if unary.requires_grad else unary.detach().requires_grad_()
    inputs = (edges, unary)
    marginals = torch.autograd.grad(recursion(*inputs).sum(), inputs, create_graph=True, materialize_grads=True)
    pairs = [(m, g) for m, g in zip(marginals, (by_transition, by_state), strict=True) if g is not None]
    first, second = torch.autograd.grad(
        [m for m, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, materialize_grads=True
    )
    return first, second


def sample_states(
    edges: Tensor, scores: list[Tensor], valid: Tensor | None, n: int, draw: Callable[[Tensor], Tensor]
) -> Tensor:
    """States (n, batch, length) drawn backwards through the forward scores; -1 beyond the length."""
    state = draw(scores[-1].expand(n, *scores[-1].shape))
    states = [state]
    rows = torch.arange(len(edges), device=edges.device)
    for t in range(len(scores) - 1, 0, -1):
        into = edges.select(1, t - 1)[rows, :, state]
        before = draw(scores[t - 1] + into)
        if valid is not None:
            before = torch.where(valid[t], before, state)
            states[-1] = torch.where(valid[t], state, -1)
        state = before
        states.append(state)
    return torch.stack(states[::-1], 2)
