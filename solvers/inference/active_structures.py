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

    def mean(self, batch: Tensor) -> Tensor:
        """The mixtures' rows (m, n), of the samples `batch` (m,)."""
        return (self.weights[batch].unsqueeze(1) @ self.rows[batch]).squeeze(1)

    def value(self, batch: Tensor, mean: Tensor) -> Tensor:
        """The mean of what every structure is worth at the mixture, (m,)."""
        return (self.weights[batch] * self.scores[batch]).sum(1) - mean.square().sum(1)

    def scale(self, batch: Tensor) -> Tensor:
        """Largest score (m,), by which rounding is judged."""
        return self.scores[batch].where(self.used[batch], 0.0).abs().amax(1)

    def holds(self, batch: Tensor, rows: Tensor) -> Tensor:
        """Whether the structure of these rows (m, n) is in use, (m,)."""
        return ((self.rows[batch] == rows.unsqueeze(1)).all(2) & self.used[batch]).any(1)

    def add(self, batch: Tensor, indicators: Parts, rows: Tensor, scores: Tensor) -> None:
        """Take up one more structure in each of the samples `batch` (m,), and find the best weights."""
        if not len(batch):
            return
        if bool(self.used[batch].all(1).any()):
            self._grow()
        slot = self.used[batch].long().argmin(1)
        for mine, new in zip(self.indicators, indicators, strict=True):
            mine[batch, slot] = new
        self.rows[batch, slot] = rows
        self.scores[batch, slot] = scores
        products = (self.rows[batch] @ rows.unsqueeze(2)).squeeze(2) + 1
        self.gram[batch, slot] = products
        self.gram[batch, :, slot] = products
        self._make_independent(batch, slot)
        self.used[batch, slot] = True
        self._reweigh(batch)

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
        gram = self.gram[batch.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)]
        inverse = torch.cholesky_inverse(_factor(gram, used)) * (used.unsqueeze(1) & used.unsqueeze(2))
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

    def _make_independent(self, batch: Tensor, slot: Tensor) -> None:
        """Where a new structure lies in the affine hull of the others, put it into the place of one of them.

        A line leads from the mixture through others towards the new one on which nothing that is squared changes, and
        the score grows: to the end of it, where a weight is zero.
        """
        used = self.used[batch]
        column = self.gram[batch, :, slot] * used
        line = -torch.cholesky_solve(column.unsqueeze(2), _factor(self.gram[batch], used)).squeeze(2) * used
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

    def _reweigh(self, batch: Tensor) -> None:
        """The best weights; structures whose weight reaches zero on the way there are dropped."""
        gram, scores, weights, used = (x[batch] for x in (self.gram, self.scores, self.weights, self.used))
        sample = torch.arange(len(batch), device=batch.device)
        for _ in range(scores.shape[1]):
            right = torch.stack([scores * used, used.to(scores.dtype)], 2)
            plain, ones = torch.cholesky_solve(right, _factor(gram, used)).unbind(2)
            shift = (1 - plain.sum(1)) / ones.sum(1)
            target = (plain + shift.unsqueeze(1) * ones) * used
            below = target < 0
            blocked = below.any(1)
            ratio = torch.where(below, weights / (weights - target), torch.inf)
            step, out = ratio.min(1)
            moved = (weights + step.clamp(max=1).unsqueeze(1) * (target - weights)).clamp(min=0)
            weights = torch.where(blocked.unsqueeze(1), moved, target)
            if not bool(blocked.any()):
                break
            weights[sample[blocked], out[blocked]] = 0.0
            used[sample[blocked], out[blocked]] = False
        self.weights[batch], self.used[batch] = weights, used


def _factor(gram: Tensor, used: Tensor) -> Tensor:
    """The Cholesky factor of the Gram matrices of the slots in use, and one elsewhere."""
    both = used.unsqueeze(1) & used.unsqueeze(2)
    one = torch.eye(used.shape[1], dtype=gram.dtype, device=used.device)
    return torch.linalg.cholesky_ex(torch.where(both, gram, one))[0]
