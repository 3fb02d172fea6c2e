"""Semi-Markov chains: sequences cut into labelled segments."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import checks
from .chain import stationary
from .distribution import Parts, Structured
from .semiring import Semiring
from .sparing import Carry, walk


class Segmentation(NamedTuple):
    """A sequence cut into labelled segments.

    Attributes:
        labels: of the segment that every position is in, (batch, length) integers; -1 beyond the length.
        starts: where segments start, (batch, length) booleans.
    """

    labels: Tensor
    starts: Tensor


class SegmentMarginals(NamedTuple):
    """Marginals of a semi-Markov chain.

    Attributes:
        segments: (batch, length, durations, labels), as the potentials.
        transitions: (batch, length - 1, labels, labels), of a segment with label i that ends at t and one with label j
            that starts at t + 1.
    """

    segments: Tensor
    transitions: Tensor


class SemiMarkov(Structured):
    """Segmentations whose log-weight is a sum over segments and over the label changes between them.

    A structure is a `Segmentation`; marginals are `SegmentMarginals`. Time grows as length x durations.

    Args:
        potentials: of segments, (batch, length, durations, labels): [.., t, k, c] is that of a segment with label c
            that starts at t and covers k + 1 positions. Segments that reach beyond the length do not exist.
        transitions: of two segments in a row, (batch, length - 1, labels, labels), [.., t, i, j] for label i until t
            and label j from t + 1; (labels, labels) or (batch, labels, labels) is the same everywhere; None for zero.
        lengths: (batch,), from 1 to `length`; None for the full length.
        mask: allowed segments, in the shape of `potentials`; a dimension of 1 is broadcast.

    Raises:
        TypeError: potentials that are no tensors of floating-point numbers.
        ValueError: shapes that do not fit, NaN or plus infinity, a length of zero or beyond the potentials.

    Source: Sarawagi and Cohen 2004.
    """

    _names = ("potentials", "transitions")

    def __init__(
        self,
        potentials: Float[Tensor, "..."],
        transitions: Float[Tensor, "..."] | None = None,
        lengths: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> None:
        segments = checks.potentials(potentials, "potentials", ("batch", "length", "durations", "labels"))
        batch, length, durations, _ = segments.shape
        edges = stationary(transitions, "transitions", segments, "potentials")
        self.lengths = checks.lengths(lengths, batch, length, segments)
        limit = length if self.lengths is None else self.lengths[:, None, None]
        start, last = (torch.arange(n, device=segments.device) for n in (length, durations))
        outside = (start.unsqueeze(1) + last >= limit).unsqueeze(-1)
        padding = None if self.lengths is None else ~self._within(length)[:, 1:, None, None]
        segments = checks.finite(segments, "potentials", outside)
        edges = checks.finite(edges, "transitions", padding)
        self._parts = (checks.masked(segments, mask, "the segments"), edges)
        self._has_mask = mask is not None

    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        segments, edges = parts
        _, batch, length, durations, labels = segments.shape
        durations = min(durations, length)
        # Row t holds the segments that end just before position t + 1, by their duration.
        rows = []
        for k in range(durations):
            before = semiring.zeros((batch, k, labels), segments)
            rows.append(torch.cat([before, segments[:, :, : length - k, k]], 2))
        by_end = torch.stack(rows, 3).unbind(2)
        change = edges.unbind(2)

        def step(begin: Carry, t: int) -> tuple[Carry, Tensor]:
            # A segment of k + 1 positions that ends at t began at t - k.
            recent = torch.stack(begin[::-1], 2)
            end = semiring.sum(semiring.times(recent, by_end[t][:, :, : recent.shape[2]]), -2)
            if t + 1 < length:
                begin = (*begin, semiring.sum(semiring.times(end.unsqueeze(-1), change[t]), -2))
            return begin[-durations:], end

        _, ends = walk(step, (semiring.ones((batch, labels), segments),), range(length), self._sparing)
        return at_length(semiring.sum(torch.stack(ends, 2), -1), self.lengths)

    def _pack(self, parts: Parts) -> SegmentMarginals:
        return SegmentMarginals(*parts)

    def _decode(self, indicators: Parts) -> Segmentation:
        by_label = indicators[0].sum(-2)
        starts = by_label.sum(-1) > 0
        position = torch.arange(starts.shape[-1], device=starts.device).expand(starts.shape)
        latest = position.where(starts, 0).cummax(-1).values
        labels = by_label.argmax(-1).gather(-1, latest)
        if self.lengths is not None:
            labels = labels.masked_fill(~self._within(labels.shape[-1]), -1)
        return Segmentation(labels, starts)

    def _encode(self, structure: Any) -> Parts:
        segments, edges = self._parts
        batch, length, durations, labels = segments.shape
        if not (isinstance(structure, tuple) and len(structure) == 2):
            raise ValueError("structure: expected a Segmentation, labels and starts.")
        named, starts = structure
        for name, tensor in (("labels", named), ("starts", starts)):
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != (batch, length):
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"structure.{name}: expected shape {(batch, length)}, got {got}.")
        chosen = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in (segments, edges)]
        ends = [length] * batch if self.lengths is None else self.lengths.tolist()
        for b, end in enumerate(ends):
            cuts = [*starts[b, :end].nonzero().flatten().tolist(), end]
            if cuts[0] != 0:
                raise ValueError(f"structure: the first segment of sample {b} starts at {cuts[0]} and not at 0.")
            for here, following in itertools.pairwise(cuts):
                label, last = int(named[b, here]), following - here - 1
                if last >= durations or not 0 <= label < labels or bool((named[b, here:following] != label).any()):
                    raise ValueError(
                        f"structure: the segment of sample {b} from {here} to {following - 1} is longer than "
                        f"{durations} positions, or has no single label from 0 to {labels - 1}."
                    )
                chosen[0][b, here, last, label] = 1
                if following < end:
                    chosen[1][b, following - 1, label, int(named[b, following].clamp(0, labels - 1))] = 1
        return tuple(chosen)


def at_length(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Of values (size, batch, length) after 1, 2, ... positions those at the length of each sample, (size, batch)."""
    if lengths is None:
        return values[:, :, -1]
    index = (lengths - 1).expand(len(values), -1).unsqueeze(2)
    return values.gather(2, index).squeeze(2)
