"""Dependency trees, projective and not."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import checks
from .distribution import Parts, Structured, gradient
from .semi_markov import at_length
from .semiring import Divergence, Semiring, draw
from .spanning import best_trees, tree_sum
from .sparing import Carry, walk


class DependencyTree(Structured):
    """Trees over the words of a sentence; the log-weight is a sum over arcs from heads to words.

    A structure is a tensor of heads (batch, length): 0 is the root, h > 0 the h-th word, -1 stands beyond the length.

    Projective trees, whose arcs do not cross, are summed up by Eisner's algorithm in every semiring; time grows as the
    cube of the length. Trees that may cross are summed up by the matrix-tree theorem, without subtractions; their
    best trees are searched for one sentence after the other, and a sample takes as many sums as there are words.

    Args:
        potentials: of arcs, (batch, length + 1, length + 1), [.., h, m] from head h to word m, with the root at 0; the
            column 0 and the diagonal are ignored.
        lengths: words (batch,), from 1 to `length`; None for the full length.
        mask: allowed arcs, in the shape of `potentials`; a dimension of 1 is broadcast.
        projective: whether arcs must not cross.
        single_root: whether one word exactly depends on the root, or any number from one.

    Raises:
        TypeError: potentials that are no tensor of floating-point numbers.
        ValueError: a shape that does not fit, NaN or plus infinity, a length of zero or beyond the potentials.

    Source: Eisner 1996; Koo et al. 2007 (the matrix-tree theorem for parsing); see also `spanning`.
    """

    _names = ("potentials",)

    def __init__(
        self,
        potentials: Float[Tensor, "..."],
        lengths: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projective: bool = True,
        single_root: bool = True,
    ) -> None:
        arcs = checks.potentials(potentials, "potentials", ("batch", "length + 1", "length + 1"))
        batch, nodes = arcs.shape[:2]
        if nodes < 2:
            raise ValueError(f"potentials: expected a root and at least one word, got shape {tuple(arcs.shape)}.")
        self.lengths = checks.lengths(lengths, batch, nodes - 1, arcs)
        outside = torch.eye(nodes, dtype=torch.bool, device=arcs.device).unsqueeze(0).clone()
        outside[:, :, 0] = True
        if self.lengths is not None:
            beyond = torch.arange(nodes, device=arcs.device) > self.lengths.unsqueeze(1)
            outside = outside | beyond.unsqueeze(1) | beyond.unsqueeze(2)
        arcs = checks.finite(arcs, "potentials", outside)
        self._parts = (checks.masked(arcs, mask, "the arcs").masked_fill(outside, -math.inf),)
        self._has_mask = mask is not None
        self.projective, self.single_root = projective, single_root

    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        (arcs,) = parts
        if not self.projective:
            return tree_sum(semiring, arcs[..., 1:], self._real(), self.single_root, self._sparing)
        if not self.single_root:
            return at_length(_eisner(semiring, arcs, None, self._sparing), self.lengths)
        return at_length(_eisner(semiring, arcs[:, :, 1:, 1:], arcs[:, :, 0, 1:], self._sparing), self.lengths)

    def _real(self) -> Tensor:
        batch, nodes = self._parts[0].shape[:2]
        if self.lengths is None:
            return torch.ones(batch, nodes - 1, dtype=torch.bool, device=self._parts[0].device)
        return self._within(nodes - 1)

    def _argmax(self) -> Parts:
        return super()._argmax() if self.projective else tuple(i[0] for i in self._kbest(1))

    def _kbest(self, k: int) -> Parts:
        if self.projective:
            return super()._kbest(k)
        (arcs,) = self._parts
        found = torch.zeros((k, *arcs.shape), dtype=arcs.dtype)
        scores, words = arcs.detach().cpu().tolist(), self._real().sum(1).tolist()
        for b, n in enumerate(words):
            square = [row[: n + 1] for row in scores[b][: n + 1]]
            for rank, heads in enumerate(best_trees(square, k, self.single_root)):
                found[rank, b, heads, list(range(1, n + 1))] = 1
        return (found.to(arcs.device),)

    def _sample(self, n: int, generator: torch.Generator | None) -> Any:
        if self.projective:
            return super()._sample(n, generator)
        many = cast(DependencyTree, self._repeat(n))
        (arcs,) = many._parts
        nodes = torch.arange(arcs.shape[1], device=arcs.device)
        real = many._real()
        # Where the chosen arcs lead up to from each node: rounding must not close a cycle, nor add a root.
        top = nodes.expand(len(arcs), -1)
        heads: list[Tensor] = []
        for m in nodes[1:].tolist():
            # The head of this word, given those of the words before.
            (marginals,) = gradient(many._weigh, (arcs,))
            share = marginals[:, :, m].clamp(min=0).masked_fill(top == m, 0.0)
            if self.single_root and heads:
                rooted = (torch.stack(heads) == 0).any(0)
                share[:, 0] = share[:, 0].masked_fill(rooted, 0.0)
            chosen = draw(share.log(), generator)
            top = torch.where(top == m, top.gather(1, chosen.unsqueeze(1)), top)
            other = (nodes != chosen.unsqueeze(1)).unsqueeze(2) & (nodes == m)
            arcs = arcs.masked_fill(other, -math.inf)
            heads.append(torch.where(real[:, m - 1], chosen, -1))
        return torch.stack(heads, 1).unflatten(0, (n, -1))

    def _kl(self, other: Any) -> Tensor:
        if self.projective:
            return super()._kl(other)
        (p,), (q,) = self._parts, other._parts
        # An arc that no tree of p has may be excluded by q; how far below rounding its marginal is tells which.
        impossible = self._marginals()[0].detach() <= p.shape[1] * torch.finfo(p.dtype).eps
        lost = torch.isneginf(q) & ~torch.isneginf(p)
        infinite = (lost & ~impossible).flatten(1).any(1)
        p = p.masked_fill(lost & impossible, -math.inf)
        shared = torch.where(infinite[:, None, None], p, q).masked_fill(torch.isneginf(p), -math.inf)
        # Against q within the arcs of p, which the recursion needs, and then what q has beside them.
        semiring = Divergence()
        within = self._recursion(semiring, (semiring.lift(p, shared),))[2]
        return (within + (self._weigh(q) - self._weigh(shared))).masked_fill(infinite, math.inf)

    def _comparable(self, other: Any) -> bool:
        return (self.projective, self.single_root) == (other.projective, other.single_root)

    def _decode(self, indicators: Parts) -> Tensor:
        arcs = indicators[0][..., 1:]
        return torch.where(self._real(), arcs.argmax(-2), -1)

    def _encode(self, structure: Any) -> Parts:
        (arcs,) = self._parts
        batch, nodes = arcs.shape[:2]
        if not isinstance(structure, Tensor) or structure.is_floating_point():
            raise ValueError("structure: expected a tensor of integers, the heads (batch, length).")
        if tuple(structure.shape) != (batch, nodes - 1):
            raise ValueError(f"structure: expected heads of shape {(batch, nodes - 1)}, got {tuple(structure.shape)}.")
        real = self._real()
        wrong = real & ((structure < 0) | (structure > real.sum(1, keepdim=True)))
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"structure: the head at {place} is {int(structure[place])}; expected 0 for the root to "
                f"{int(real[place[0]].sum())}."
            )
        chosen = torch.nn.functional.one_hot(structure.clamp(0, nodes - 1), nodes) * real.unsqueeze(2)
        return (torch.nn.functional.pad(chosen.mT, (1, 0)).to(arcs.dtype),)

    def _complete(self, indicators: Parts) -> Tensor:
        if self.projective:
            return super()._complete(indicators)
        # Following the heads for as many steps as there are words leads to the root, or around a cycle.
        heads = indicators[0].argmax(1)
        reached = heads
        for _ in range(heads.shape[1].bit_length()):
            reached = reached.gather(1, reached)
        roots = indicators[0][:, 0].sum(1)
        return (reached == 0).all(1) & (roots == 1 if self.single_root else roots >= 1)


def _eisner(semiring: Semiring, arcs: Tensor, root: Tensor | None, sparing: bool) -> Tensor:
    """Sums over projective trees (size, batch, length), of the first 1, 2, ... words.

    Args:
        semiring: of the answer.
        arcs: (size, batch, nodes, nodes). With `root` given the nodes are the words, else the root is the first.
        root: arcs from the root to the words (size, batch, words), of which a tree has one.
        sparing: see `walk`.
    """
    size, batch, nodes, _ = arcs.shape
    one = semiring.ones((batch, nodes, 1), arcs)
    # Triangles, whose head is at an end: by where they start and by where they end, the narrowest first.
    right_start = right_end = left_start = left_end = one
    # Trapezoids, between a head and its dependent: right ones by where they start, left ones by where they end.
    right_open = left_open = arcs.new_empty(size, batch, nodes, 0)

    def step(carry: Carry, width: int) -> tuple[Carry, Tensor]:
        right_start, right_end, left_start, left_end, right_open, left_open = carry
        rows = semiring.sum(semiring.times(right_start[:, :, :-1], left_end[:, :, 1:].flip(-1)), -1)
        to_right = semiring.times(rows, arcs.diagonal(width, -2, -1)).unsqueeze(-1)
        to_left = semiring.times(rows, arcs.diagonal(-width, -2, -1)).unsqueeze(-1)
        right_open = torch.cat([right_open[:, :, :-1], to_right], -1)
        left_open = torch.cat([left_open[:, :, 1:], to_left], -1)
        # A trapezoid of at least one step, and a triangle of what is left.
        right = semiring.sum(semiring.times(right_open, right_end[:, :, 1:].flip(-1)), -1).unsqueeze(-1)
        left = semiring.sum(semiring.times(left_start[:, :, :-1].flip(-1), left_open), -1).unsqueeze(-1)
        right_start = torch.cat([right_start[:, :, :-1], right], -1)
        right_end = torch.cat([right_end[:, :, 1:], right], -1)
        left_start = torch.cat([left_start[:, :, :-1], left], -1)
        left_end = torch.cat([left_end[:, :, 1:], left], -1)
        if root is None:
            whole = right[:, :, 0, 0]
        else:
            # The word below the root, with what is to its left and to its right.
            halves = semiring.times(left_start[:, :, 0], right_end[:, :, 0].flip(-1))
            whole = semiring.sum(semiring.times(halves, root[:, :, : width + 1]), -1)
        return (right_start, right_end, left_start, left_end, right_open, left_open), whole

    carry = (right_start, right_end, left_start, left_end, right_open, left_open)
    _, whole = walk(step, carry, range(1, nodes), sparing)
    return torch.stack(whole if root is None else [root[:, :, 0], *whole], 2)
