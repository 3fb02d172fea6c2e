"""A conditional random field on top of a sequence model."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...solvers.inference import LinearChain, checks
from ...solvers.transforms import any_true, plain


class CRF(nn.Module):
    """Tags of a sequence, scored by what is seen at every position and by which tags follow one another.

    It takes the place of a softmax over tags at every position. Padding beyond `lengths` is never looked at.

    Args:
        num_tags: how many tags there are.
        device: of the parameters.
        dtype: of the parameters.
        allowed: which tag may follow which, (tags, tags), or (tags + 1, tags) with a last row of those that a sequence
            may start with; None for all.

    Attributes:
        transitions: score of tag j after tag i, (tags, tags).
        start: score of every tag at the first position, (tags,).
        end: score of every tag at the last position, (tags,).

    Raises:
        ValueError: there is no tag; `allowed` has another shape, or is not boolean.

    Source: Lafferty, McCallum and Pereira 2001; as the last layer of a network: Collobert et al. 2011, section 3.3.2.
    """

    forbidden: Tensor | None
    forbidden_start: Tensor | None

    def __init__(
        self,
        num_tags: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        allowed: Bool[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__()
        if num_tags < 1:
            raise ValueError(f"CRF: num_tags must be at least 1; got {num_tags}.")
        self.num_tags = num_tags
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags, device=device, dtype=dtype))
        self.start = nn.Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.end = nn.Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        rules = (None, None) if allowed is None else self._rules(allowed.to(device))
        # What a model is built with, and no weights.
        for name, rule in zip(("forbidden", "forbidden_start"), rules, strict=True):
            self.register_buffer(name, rule, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small numbers, so that at first every tag may follow every other."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def distribution(self, emissions: Float[Tensor, "..."], lengths: Int[Tensor, "..."] | None = None) -> LinearChain:
        """The distribution over tag sequences, which has k-best, samples, entropy and more.

        Args:
            emissions: score of every tag at every position, (batch, length, tags).
            lengths: (batch,), from 1 to `length`; None for the full length.

        Raises:
            ValueError: shapes that do not fit; a length of zero or beyond the emissions.
        """
        unary, _ = self._bounded(emissions, lengths)
        return LinearChain(self._moves(), unary, lengths)

    def forward(
        self,
        emissions: Float[Tensor, "..."],
        tags: Int[Tensor, "..."],
        lengths: Int[Tensor, "..."] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log-likelihood of the tags; its negative mean is the loss to train by.

        Args:
            emissions: score of every tag at every position, (batch, length, tags).
            tags: (batch, length), from 0 to `num_tags` - 1; anything beyond the lengths.
            lengths: (batch,), from 1 to `length`; None for the full length.

        Raises:
            ValueError: shapes that do not fit, tags that there are not, a length of zero or beyond the emissions; a
                sample to which `allowed` leaves no sequence.
        """
        unary, inside = self._bounded(emissions, lengths)
        if tags.shape != emissions.shape[:2] or tags.is_floating_point():
            raise ValueError(
                f"CRF: expected tags of shape {tuple(emissions.shape[:2])}, integers; "
                f"got {tuple(tags.shape)}, {tags.dtype}."
            )
        wrong = inside & ((tags < 0) | (tags >= self.num_tags))
        if any_true(wrong):
            place = tuple(plain(wrong).nonzero()[0].tolist())
            raise ValueError(
                f"CRF: the tag at {place} is {int(plain(tags)[place])}; expected 0 to {self.num_tags - 1}."
            )
        tags = tags.masked_fill(~inside, 0)
        own = unary.gather(2, tags.unsqueeze(2)).squeeze(2)
        transitions = self._moves()
        moves = transitions[tags[:, :-1], tags[:, 1:]]
        score = torch.where(inside, own, 0.0).sum(1) + torch.where(inside[:, 1:], moves, 0.0).sum(1)
        total = LinearChain(transitions, unary, lengths).log_partition
        if self.forbidden is not None and any_true(torch.isneginf(total)):
            sample = int(plain(torch.isneginf(total)).flatten().nonzero()[0])
            raise ValueError(f"CRF: the rules of which tag may follow which leave no sequence to sample {sample}.")
        return score - total

    def decode(
        self, emissions: Float[Tensor, "..."], lengths: Int[Tensor, "..."] | None = None
    ) -> Int[Tensor, "batch length"]:
        """The most probable tag sequence, -1 beyond the lengths.

        Raises:
            ValueError: as `distribution`.
        """
        return self.distribution(emissions, lengths).argmax

    def marginals(
        self, emissions: Float[Tensor, "..."], lengths: Int[Tensor, "..."] | None = None
    ) -> Float[Tensor, "batch length tags"]:
        """The probability of every tag at every position, zero beyond the lengths.

        Raises:
            ValueError: as `distribution`.
        """
        return self.distribution(emissions, lengths).marginals.states

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"num_tags={self.num_tags}"

    def _rules(self, allowed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Moves and starts that there are not."""
        n = self.num_tags
        if allowed.dtype != torch.bool or tuple(allowed.shape) not in ((n, n), (n + 1, n)):
            raise ValueError(
                f"CRF: expected allowed of shape {(n, n)} or {(n + 1, n)}, boolean; got {tuple(allowed.shape)}, "
                f"{allowed.dtype}."
            )
        return ~allowed[:n], ~allowed[n] if len(allowed) > n else None

    def _moves(self) -> Tensor:
        if self.forbidden is None:
            return self.transitions
        return self.transitions.masked_fill(self.forbidden, -torch.inf)

    def _bounded(self, emissions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Emissions with the scores of how a sequence starts and ends, and which positions there are."""
        if emissions.ndim != 3 or emissions.shape[2] != self.num_tags or 0 in emissions.shape:
            raise ValueError(
                f"CRF: expected emissions of shape (batch, length, {self.num_tags}), got {tuple(emissions.shape)}."
            )
        batch, length = emissions.shape[:2]
        ends = checks.lengths(lengths, batch, length, emissions)
        if ends is None:
            ends = torch.full((batch,), length, device=emissions.device)
        position = torch.arange(length, device=emissions.device)
        first, last = (position == 0).unsqueeze(1), (position == ends.unsqueeze(1) - 1).unsqueeze(2)
        start = self.start if self.forbidden_start is None else self.start.masked_fill(self.forbidden_start, -torch.inf)
        unary = emissions + torch.where(first, start, 0.0) + torch.where(last, self.end, 0.0)
        return unary, position < ends.unsqueeze(1)
