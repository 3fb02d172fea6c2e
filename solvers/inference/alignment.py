"""Alignments of two sequences: paths through a grid."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import checks
from .constituency import one_hot
from .distribution import Parts, Structured
from .semiring import Semiring
from .sparing import Carry, walk

MATCH, DELETE, INSERT = 0, 1, 2


class Alignment(Structured):
    """Monotone paths from the corner (0, 0) of a grid to the opposite one; the log-weight is a sum over moves.

    Three moves lead into a node (i, j): match (0) from (i - 1, j - 1), delete (1) from (i - 1, j) and insert (2) from
    (i, j - 1). These are the edits that turn a sequence of n items into one of m. A structure is a tensor
    (batch, n + 1, m + 1) of the move by which the path came into each node, -1 where it did not.

    Args:
        potentials: of moves into nodes, (batch, n + 1, m + 1, 3); those from outside of the grid are ignored.
        lengths: (batch, 2), n and m of every sample; None for the full grid.
        mask: allowed moves, in the shape of `potentials`; a dimension of 1 is broadcast.

    Raises:
        TypeError: potentials that are no tensor of floating-point numbers.
        ValueError: a shape that does not fit, NaN or plus infinity, a length of zero or beyond the potentials.

    Source: Needleman and Wunsch 1970; Durbin et al. 1998, chapter 4 (the probabilistic form).
    """

    _names = ("potentials",)

    def __init__(
        self,
        potentials: Float[Tensor, "..."],
        lengths: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> None:
        moves = checks.potentials(potentials, "potentials", ("batch", "n + 1", "m + 1", 3))
        batch, rows, columns, _ = moves.shape
        if rows < 2 or columns < 2:
            raise ValueError(f"potentials: expected n and m of at least 1, got shape {tuple(moves.shape)}.")
        self.lengths = _pairs(lengths, batch, rows - 1, columns - 1, moves)
        row, column = torch.arange(rows, device=moves.device), torch.arange(columns, device=moves.device)
        outside = torch.zeros(1, rows, columns, 3, dtype=torch.bool, device=moves.device)
        outside[:, 0, :, [MATCH, DELETE]] = True
        outside[:, :, 0, [MATCH, INSERT]] = True
        if self.lengths is not None:
            n, m = self.lengths.unbind(1)
            beyond = (row.unsqueeze(1) > n[:, None, None]) | (column > m[:, None, None])
            outside = outside | beyond.unsqueeze(-1)
        moves = checks.finite(moves, "potentials", outside)
        self._parts = (checks.masked(moves, mask, "the moves"),)
        self._has_mask = mask is not None

    @classmethod
    def monotone(cls, scores: Float[Tensor, "..."], lengths: Int[Tensor, "..."] | None = None) -> Alignment:
        """Every frame to one token: the first to the first, the last to the last, onwards by none or one at a step.

        Args:
            scores: (batch, frames, tokens); at least as many frames as tokens.
            lengths: (batch, 2), frames and tokens of every sample; None for all.

        Returns:
            An alignment of which `marginals[:, 1:, 1:].sum(-1)` is the probability that a frame belongs to a token.

        Raises:
            TypeError, ValueError: as the class.

        Source: Kim et al. 2020 (Glow-TTS), section 3.1.
        """
        given = checks.potentials(scores, "scores", ("batch", "frames", "tokens"))
        entered = torch.stack([given, given, torch.full_like(given, -math.inf)], -1)
        return cls(torch.nn.functional.pad(entered, (0, 0, 1, 0, 1, 0), value=-math.inf), lengths)

    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        (moves,) = parts
        size, batch, rows, columns, _ = moves.shape
        # Row i shifted by i: what lies on an antidiagonal of the grid comes to lie in a column.
        padded = torch.cat([moves, semiring.zeros((batch, rows, rows, 3), moves)], 3).flatten(2, 3)
        width = rows + columns - 1
        skewed = padded[:, :, : rows * width].unflatten(2, (rows, width)).unbind(3)
        nothing = semiring.zeros((batch, 1), moves)
        before = semiring.zeros((batch, rows), moves)
        here = torch.cat([semiring.ones((batch, 1), moves), semiring.zeros((batch, rows - 1), moves)], 2)

        def step(carry: Carry, k: int) -> tuple[Carry, Tensor]:
            match, delete = (torch.cat([nothing, x[:, :, :-1]], 2) for x in carry)
            ways = semiring.times(torch.stack([match, delete, carry[1]], -1), skewed[k])
            following = semiring.sum(ways, -1)
            return (carry[1], following), following

        (_, last), later = walk(step, (before, here), range(1, len(skewed)), self._sparing)
        nodes = [here, *later]
        if self.lengths is None:
            return last[:, :, -1]
        n, m = self.lengths.unbind(1)
        index = ((n + m) * rows + n).expand(size, -1).unsqueeze(2)
        return torch.stack(nodes, 2).flatten(2).gather(2, index).squeeze(2)

    def _decode(self, indicators: Parts) -> Tensor:
        (moves,) = indicators
        return torch.where(moves.sum(-1) > 0, moves.argmax(-1), -1)

    def _encode(self, structure: Any) -> Parts:
        return (one_hot(structure, self._parts[0], "the moves into nodes"),)


def _pairs(given: Tensor | None, batch: int, n: int, m: int, like: Tensor) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor) or tuple(given.shape) != (batch, 2):
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"lengths: expected shape (batch, 2) = ({batch}, 2), got {got}.")
    checks.lengths(given[:, 0], batch, n, like)
    checks.lengths(given[:, 1], batch, m, like)
    return given.to(like.device, torch.int64)
