"""Forward-backward of linear chains with the same transitions at every step: memory of length x states.

What the general kernel keeps of every transition and sample is computed again on the way back, and what the shared
transitions receive is summed up as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chain_kernel import MODERATE, Marginals, finite_top, forward_scores, hold, normalise

SMALL = 1e-18
"""What underflows in float32 is, with factors of up to exp(20), less than 1e-11 of this."""


class SharedLogPartition(torch.autograd.Function):
    """The log-partition of a chain whose transitions are (states, states), or (batch, states, states).

    Second derivatives are those of the general kernel, with transitions for every step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shared: Tensor,
        unary: Tensor,
        valid: Tensor | None,
        moderate: bool,
        recursion: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """(batch,).

        Args:
            ctx: of autograd.
            shared: transitions.
            unary, valid, moderate, recursion: as of `Marginals`.
        """
        with torch.autocast(unary.device.type, enabled=False):
            found = None
            if moderate or (_moderate_beside_holes(shared) and _moderate_beside_holes(unary)):
                found = _by_probabilities(shared, unary, valid, check=not moderate)
            ctx.by_probabilities = found is not None
            value, last, kept = _by_scores(shared, unary, valid) if found is None else found
        ctx.save_for_backward(shared, unary, last, *kept)
        ctx.rest = valid, moderate, recursion
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        """Marginals times the gradient, summed up where they share a transition."""
        shared, unary, last, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            edges = at_every_step(shared, *unary.shape[:2])
            transitions, states = Marginals.apply(edges, unary, *ctx.rest)
            weighted = transitions * grad[:, None, None, None]
            return weighted.sum((0, 1) if shared.ndim == 2 else 1), states * grad[:, None, None], None, None, None
        with torch.autocast(unary.device.type, enabled=False):
            back = _back_by_probabilities if ctx.by_probabilities else _back_by_scores
            onto, states = back(shared, last, kept, ctx.rest[0], grad, ctx.needs_input_grad[0])
        return onto, states, None, None, None


def at_every_step(shared: Tensor, batch: int, length: int) -> Tensor:
    """Shared transitions as (batch, length - 1, states, states), without memory of their own."""
    states = shared.shape[-1]
    return shared.reshape(-1, 1, states, states).expand(batch, length - 1, states, states)


def _moderate_beside_holes(potentials: Tensor) -> bool:
    low, high = potentials.masked_fill(torch.isneginf(potentials), 0.0).aminmax()
    return bool((low >= -MODERATE) & (high <= MODERATE))


def _by_probabilities(
    shared: Tensor, unary: Tensor, valid: Tensor | None, check: bool
) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """Log-partition, the last probabilities, and of every step those before it and their sums into each state.

    Or None, with `check`, where a sum is so small that what underflows beside it might matter: moderate potentials
    rule that out, but with some of them excluded a state can hang on one that is improbable, or on none.
    """
    weights, factors = shared.exp(), unary.exp()
    share, norm = normalise(factors[:, 0])
    shares, sums, norms = [share], [], [norm]
    for t, own in enumerate(factors.unbind(1)[1:], 1):
        total = _through(share, weights)
        following, norm = normalise(total * own)
        if valid is not None:
            following, norm = hold(valid[t], following, norm, share, 1.0)
        share = following
        shares.append(share)
        sums.append(total)
        norms.append(norm)
    scales = torch.cat(norms, 1)
    if check and not bool((torch.stack(sums) >= SMALL).all() & (scales > 0).all()):
        return None
    return scales.log().sum(1), share, [*shares[:-1], *sums]


def _back_by_probabilities(
    shared: Tensor, last: Tensor, kept: Sequence[Tensor], valid: Tensor | None, grad: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """Marginals of the shared transitions, if wanted, and of states, times a factor (batch,)."""
    weights, steps = shared.exp(), len(kept) // 2
    shares, sums = kept[:steps], kept[steps:]
    share, states, ratios = last, [last], []
    for t in range(steps, 0, -1):
        ratio = share / sums[t - 1]
        # Rounding would add up over a long chain; but probabilities sum to one.
        before, _ = normalise(shares[t - 1] * _through(ratio, weights.mT))
        if valid is not None:
            inside = valid[t].unsqueeze(1)
            ratio, before = torch.where(inside, ratio, 0.0), torch.where(inside, before, share)
            states[-1] = torch.where(inside, share, 0.0)
        share = before
        states.append(share)
        ratios.append(ratio)
    own = torch.stack(states[::-1], 1) * grad[:, None, None]
    if not wanted:
        return None, own
    left, right = torch.stack(list(shares), 1), torch.stack(ratios[::-1], 1) * grad[:, None, None]
    onto = left.mT @ right
    return weights * (onto.sum(0) if shared.ndim == 2 else onto), own


def _by_scores(shared: Tensor, unary: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same at any scale, where the forward scores are kept."""
    value, scores = forward_scores(at_every_step(shared, *unary.shape[:2]), unary, valid)
    end = torch.logsumexp(scores[-1], 1, keepdim=True)
    return value, (scores[-1] - end.masked_fill(torch.isneginf(end), 0.0)).exp(), scores[:-1]


def _back_by_scores(
    shared: Tensor, last: Tensor, kept: Sequence[Tensor], valid: Tensor | None, grad: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    share, states = last, [last]
    onto = torch.zeros_like(shared)
    for t in range(len(kept), 0, -1):
        raw = kept[t - 1].unsqueeze(2) + shared
        weights = (raw - finite_top(raw.amax(1, keepdim=True))).exp()
        # A state that cannot be reached has sum zero; every other one contains exp(0).
        here = weights * (share / weights.sum(1).clamp(min=1)).unsqueeze(1)
        before = here.sum(2)
        if valid is not None:
            inside = valid[t].unsqueeze(1)
            before = torch.where(inside, before, share)
            here = torch.where(inside.unsqueeze(2), here, 0.0)
            states[-1] = torch.where(inside, share, 0.0)
        if wanted:
            here = here * grad[:, None, None]
            onto = onto + (here.sum(0) if shared.ndim == 2 else here)
        share = before
        states.append(share)
    return onto if wanted else None, torch.stack(states[::-1], 1) * grad[:, None, None]


def _through(x: Tensor, weights: Tensor) -> Tensor:
    """Rows (batch, states) times one matrix, or each times its own."""
    return x @ weights if weights.ndim == 2 else (x.unsqueeze(1) @ weights).squeeze(1)
