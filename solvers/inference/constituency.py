"""Binary trees over a sequence, by the algorithm of Cocke, Kasami and Younger."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import checks
from .distribution import Parts, Structured
from .semi_markov import at_length
from .semiring import Semiring
from .sparing import Carry, walk


class Constituency(Structured):
    """Labelled binary trees whose log-weight is a sum over constituents: a tree-structured CRF.

    The constituents of a tree over n positions are its n leaves, spans of one position, and n - 1 wider spans, of
    which the widest is the whole; each has a label. A structure is a tensor (batch, length, length) of the labels of
    the spans from i to j (both included), -1 where there is no constituent. Time grows with the cube of the length.

    Args:
        potentials: of the spans from i to j with label c, (batch, length, length, labels); nobody looks at i > j.
        lengths: (batch,), from 1 to `length`; None for the full length.
        mask: allowed spans and labels, in the shape of `potentials`; a dimension of 1 is broadcast.

    Raises:
        TypeError: potentials that are no tensor of floating-point numbers.
        ValueError: a shape that does not fit, NaN or plus infinity, a length of zero or beyond the potentials.

    Source: Younger 1967; Stern, Andreas and Klein 2017 (scores of labelled spans).
    """

    _names = ("potentials",)

    def __init__(
        self,
        potentials: Float[Tensor, "..."],
        lengths: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> None:
        spans = checks.potentials(potentials, "potentials", ("batch", "length", "length", "labels"))
        batch, length = spans.shape[:2]
        self.lengths = checks.lengths(lengths, batch, length, spans)
        outside = torch.ones(1, length, length, dtype=torch.bool, device=spans.device).tril(-1)
        if self.lengths is not None:
            outside = outside | ~self._within(length).unsqueeze(1)
        spans = checks.finite(spans, "potentials", outside.unsqueeze(-1))
        self._parts = (checks.masked(spans, mask, "the spans"),)
        self._has_mask = mask is not None

    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        own = semiring.sum(parts[0], -1)
        diagonal = own.diagonal(dim1=-2, dim2=-1)
        # Spans by where they start, and by where they end, the narrowest first.
        starting = ending = diagonal.unsqueeze(-1)

        def step(carry: Carry, width: int) -> tuple[Carry, Tensor]:
            left, right = carry[0][:, :, :-1], carry[1][:, :, 1:]
            inside = semiring.sum(semiring.times(left, right.flip(-1)), -1)
            span = semiring.times(inside, own.diagonal(width, -2, -1)).unsqueeze(-1)
            return (torch.cat([left, span], -1), torch.cat([right, span], -1)), span[:, :, 0, 0]

        _, wider = walk(step, (starting, ending), range(1, own.shape[-1]), self._sparing)
        return at_length(torch.stack([diagonal[:, :, 0], *wider], 2), self.lengths)

    def _decode(self, indicators: Parts) -> Tensor:
        (spans,) = indicators
        return torch.where(spans.sum(-1) > 0, spans.argmax(-1), -1)

    def _encode(self, structure: Any) -> Parts:
        return (one_hot(structure, self._parts[0], "the labels of the spans"),)


def one_hot(structure: Any, potentials: Tensor, what: str) -> Tensor:
    """Indicators in the shape of `potentials` of choices along its last dimension, -1 for none.

    Raises:
        ValueError: `structure` has another shape, or a choice that there is not.
    """
    shape, kinds = potentials.shape[:-1], potentials.shape[-1]
    if not isinstance(structure, Tensor) or structure.is_floating_point():
        raise ValueError(f"structure: expected a tensor of integers, {what}.")
    if structure.shape != shape:
        raise ValueError(f"structure: expected {what} of shape {tuple(shape)}, got {tuple(structure.shape)}.")
    wrong = (structure < -1) | (structure >= kinds)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"structure: the entry {place} is {int(structure[place])}; expected -1 to {kinds - 1}.")
    return torch.nn.functional.one_hot(structure + 1, kinds + 1)[..., 1:].to(potentials.dtype)
