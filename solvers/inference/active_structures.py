"""The active set of SparseMAP: the structures of a mixture, and their best weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .distribution import Parts


class ActiveStructures:
    """Some structures of every sample, and the weights p that maximise <scores, p> - |rows' p|^2 / 2 on the simplex.

    The structures of a sample are affinely independent in their rows, so that the weights are unique. All samples
    work in step; each has slots, of which some are in use.

    Args:
        indicators: of a first structure of each sample, tensors (batch, ...).
        rows: what is squared of it, (batch, n), float64.
        scores: of it, (batch,), float64.
    """

    def __init__(self, indicators: Parts, rows: Tensor, scores: Tensor) -> None:
        self.indicators = tuple(i.unsqueeze(1) for i in indicators)
        self.rows = rows.unsqueeze(1)
        self.scores = scores.unsqueeze(1)
        self.weights = torch.ones_like(self.scores)
        self.used = torch.ones_like(self.scores, dtype=torch.bool)
        # Inner products and one: positive definite where the rows are affinely independent. With weights that sum to
        # one, the one changes nothing.
        self.gram = self.rows @ self.rows.mT + 1

    def mean(self) -> Tensor:
        """The mixture's rows (batch, n)."""
        return (self.weights.unsqueeze(1) @ self.rows).squeeze(1)

    def value(self, mean: Tensor) -> Tensor:
        """The mean of what every structure is worth at the mixture, (batch,)."""
        return (self.weights * self.scores).sum(1) - mean.square().sum(1)

    def scale(self) -> Tensor:
        """Largest score (batch,), by which rounding is judged."""
        return self.scores.where(self.used, 0.0).abs().amax(1)

    def holds(self, rows: Tensor) -> Tensor:
        """Whether the structure of these rows (batch, n) is in use, (batch,)."""
        return ((self.rows == rows.unsqueeze(1)).all(2) & self.used).any(1)

    def add(self, which: Tensor, indicators: Parts, rows: Tensor, scores: Tensor) -> None:
        """Take up a structure in the samples `which` (batch,), and find the best weights."""
        if not bool(which.any()):
            return
        if bool((self.used.all(1) & which).any()):
            self._grow()
        batch = torch.arange(len(rows), device=rows.device)[which]
        slot = self.used.long().argmin(1)[which]
        for mine, new in zip(self.indicators, indicators, strict=True):
            mine[batch, slot] = new[which]
        self.rows[batch, slot] = rows[which]
        self.scores[batch, slot] = scores[which]
        products = (self.rows @ rows.unsqueeze(2)).squeeze(2) + 1
        self.gram[batch, slot] = products[which]
        self.gram[batch, :, slot] = products[which]
        self._make_independent(batch, slot)
        self.used[batch, slot] = True
        self._reweigh(which)

    def summary(self) -> tuple[Tensor, Tensor, Parts]:
        """The structures in use in front, and as many slots as the largest support has.

        Returns:
            Weights (batch, support); their derivative by the scores (batch, support, support); indicators (batch,
            support, ...), zero where there is no structure.
        """
        order = (~self.used).long().argsort(dim=1, stable=True)[:, : int(self.used.sum(1).amax())]
        batch = torch.arange(len(order), device=order.device).unsqueeze(1)
        used = self.used[batch, order]
        weights = self.weights[batch, order]
        indicators = tuple(i[batch, order] * used.reshape(used.shape + (1,) * (i.ndim - 2)) for i in self.indicators)
        inverse = torch.cholesky_inverse(self._factor(self.used)) * (self.used.unsqueeze(1) & self.used.unsqueeze(2))
        inverse = inverse[batch.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)]
        ones = inverse.sum(2)
        slope = inverse - ones.unsqueeze(2) * ones.unsqueeze(1) / ones.sum(1)[:, None, None]
        return weights, slope, indicators

    def _grow(self) -> None:
        """Twice as many slots."""
        more = self.scores.shape[1]

        def padded(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], 1)

        self.indicators = tuple(padded(i) for i in self.indicators)
        self.rows, self.scores, self.weights = padded(self.rows), padded(self.scores), padded(self.weights)
        self.used = padded(self.used)
        self.gram = padded(padded(self.gram).mT).mT.contiguous()

    def _factor(self, used: Tensor) -> Tensor:
        """The Cholesky factor of the Gram matrix of the slots in use, and one elsewhere."""
        both = used.unsqueeze(1) & used.unsqueeze(2)
        one = torch.eye(used.shape[1], dtype=self.gram.dtype, device=used.device)
        return torch.linalg.cholesky_ex(torch.where(both, self.gram, one))[0]

    def _make_independent(self, batch: Tensor, slot: Tensor) -> None:
        """Where a new structure lies in the affine hull of the others, put it into the place of one of them.

        A line leads from the mixture through others towards the new one on which nothing that is squared changes, and
        the score grows: to the end of it, where a weight is zero.
        """
        used = self.used[batch]
        column = self.gram[batch, :, slot] * used
        line = -torch.cholesky_solve(column.unsqueeze(2), self._factor(self.used)[batch]).squeeze(2) * used
        own = self.gram[batch, slot, slot]
        # Gram matrices are of integers: what is not zero is far above rounding.
        dependent = own + (column * line).sum(1) <= 1e-9 * own
        if not bool(dependent.any()):
            return
        batch, slot, line = batch[dependent], slot[dependent], line[dependent]
        weights = self.weights[batch]
        ratio = torch.where(line < 0, weights / -line, torch.inf)
        step, out = ratio.min(1)
        weights = weights + step.unsqueeze(1) * line
        rows = torch.arange(len(batch), device=batch.device)
        weights[rows, slot] = step
        weights[rows, out] = 0.0
        self.weights[batch] = weights.clamp(min=0)
        self.used[batch, out] = False

    def _reweigh(self, which: Tensor) -> None:
        """The best weights; structures whose weight reaches zero on the way there are dropped."""
        for _ in range(2 * self.scores.shape[1]):
            right = torch.stack([self.scores * self.used, self.used.to(self.scores.dtype)], 2)
            plain, ones = torch.cholesky_solve(right, self._factor(self.used)).unbind(2)
            shift = (1 - plain.sum(1)) / ones.sum(1)
            target = plain + shift.unsqueeze(1) * ones
            below = (target < 0) & self.used & which.unsqueeze(1)
            blocked = below.any(1)
            self.weights = torch.where((which & ~blocked).unsqueeze(1), target * self.used, self.weights)
            if not bool(blocked.any()):
                return
            ratio = torch.where(below, self.weights / (self.weights - target), torch.inf)
            step, out = ratio.min(1)
            moved = (self.weights + step.unsqueeze(1) * (target - self.weights)).clamp(min=0)
            self.weights = torch.where(blocked.unsqueeze(1), moved, self.weights)
            rows = torch.arange(len(blocked), device=blocked.device)[blocked]
            self.weights[rows, out[blocked]] = 0.0
            self.used[rows, out[blocked]] = False
