"""Anderson acceleration, types I and II."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..options import options
from ..transforms import all_true, any_true, inside_transform
from .method import Evaluated, FixedPointSolver, Proposal
from .problem import Problem

Rows = tuple[Tensor, ...]

MODERATE = 1e4
"""Coefficients of at least this size are a sign of a Gram matrix that rounding has spoilt."""


@dataclasses.dataclass(frozen=True)
class History:
    """The last iterates, oldest first.

    Attributes:
        images: (rows, n) each.
        residuals: (rows, n) each.
        gram: inner products of the residuals (rows, h, h), in float64.
        valid: which entries a row still uses (rows, h); None while all are.
        steps: z_{i+1} - z_i (rows, n) each; kept by type I only.
        z: the iterate of the newest entry; kept by type I only.
    """

    images: Rows = ()
    residuals: Rows = ()
    gram: Tensor | None = None
    valid: Tensor | None = None
    steps: Rows = ()
    z: Tensor | None = None

    def select(self, rows: Tensor) -> History:
        """The history of some rows."""

        def take(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, rows)

        def each(ts: Rows) -> Rows:
            return tuple(t.index_select(0, rows) for t in ts)

        return History(
            each(self.images), each(self.residuals), take(self.gram), take(self.valid), each(self.steps), take(self.z)
        )


@options
class Anderson(FixedPointSolver):
    """z <- sum_i alpha_i f(z_i) over the last iterates, with sum_i alpha_i = 1.

    Type II chooses alpha to minimise |sum_i alpha_i (f(z_i) - z_i)|; on a linear problem it is GMRES with a short
    memory. Type I, a multisecant form of good Broyden, asks that the combined residual be orthogonal to the steps.
    The default choice for equilibrium models: one evaluation a step and a small overhead.

    A row whose residual grows past `restart` times the smallest in its memory, or whose coefficients blow up,
    takes a Picard step from the best remembered iterate and forgets the others.

    Attributes:
        memory: how many iterates are combined; 1 is Picard iteration.
        kind: "II" or "I".
        damping: share of the combined images against the combined iterates, in (0, 1].
        regularization: added to the diagonal of the Gram matrix of the residuals scaled to length one, so it is
            relative to the trace at any size of the residual.
        restart: growth of the residual that triggers a restart.

    Raises:
        ValueError: an option is out of range.

    Source: Walker and Ni 2011, Anderson acceleration for fixed-point iterations; Fang and Saad 2009, section 2.
    """

    memory: int = 5
    kind: Literal["I", "II"] = "II"
    damping: float = 1.0
    regularization: float = 1e-8
    restart: float = 10.0

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"Anderson: memory must be at least 1; got {self.memory}.")
        if self.kind not in ("I", "II"):
            raise ValueError(f"Anderson: kind must be 'I' or 'II'; got {self.kind!r}.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"Anderson: damping must be in (0, 1]; got {self.damping}.")
        if self.regularization < 0:
            raise ValueError(f"Anderson: regularization must not be negative; got {self.regularization}.")
        if self.restart <= 1:
            raise ValueError(f"Anderson: restart must be above 1; got {self.restart}.")

    def init(self, z: Tensor) -> History:
        """An empty history."""
        return History()

    def propose(self, problem: Problem, at: Evaluated, memory: History) -> Proposal:
        """The combination of the remembered images."""
        history = self._remember(memory, at)
        if len(history.images) == 1:
            return Proposal(torch.add(at.z, at.residual, alpha=self.damping), history)
        alpha, history = self._coefficients(history, at.improving)
        weights = alpha.to(at.z.dtype).split(1, dim=1)
        z = _combine(history.images, weights)
        if self.damping != 1:
            z = torch.sub(z, _combine(history.residuals, weights), alpha=1 - self.damping)
        return Proposal(z, history)

    def _remember(self, old: History, at: Evaluated) -> History:
        keep = slice(-(self.memory - 1), None) if self.memory > 1 else slice(0, 0)
        residuals = (*old.residuals[keep], at.residual)
        row = torch.stack([_dot(r, at.residual) for r in residuals], dim=1).double()
        if old.gram is None or len(residuals) == 1:
            gram = row.unsqueeze(2)
        else:
            block = old.gram[:, keep, keep]
            gram = torch.cat([torch.cat([block, row[:, :-1].unsqueeze(2)], dim=2), row.unsqueeze(1)], dim=1)
        valid = old.valid
        if valid is not None:
            valid = torch.cat([valid[:, keep], torch.ones_like(valid[:, :1])], dim=1)
        steps, z = (), None
        if self.kind == "I":
            steps, z = old.steps[keep] if self.memory > 1 else (), at.z
            if old.z is not None:
                steps = (*steps, at.z - old.z)[-(len(residuals) - 1) :] if len(residuals) > 1 else ()
        return History((*old.images[keep], at.image), residuals, gram, valid, steps, z)

    def _coefficients(self, history: History, improving: bool) -> tuple[Tensor, History]:
        """alpha (rows, h) in float64, and the history less what a restart forgets."""
        gram = history.gram
        assert gram is not None
        squares = gram.diagonal(dim1=1, dim2=2)
        # Residuals of length one make the regularisation relative to each of them: the newest, which may be
        # orders of magnitude smaller than the oldest, is not drowned by it.
        scale = squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt()
        if history.valid is not None:
            scale = scale * history.valid
        alpha = self._minimal(gram, scale, history.valid) if self.kind == "II" else self._orthogonal(history, scale)
        with torch.no_grad():
            if improving and all_true(alpha.detach().abs().amax() < MODERATE):
                return alpha, history
            size = squares if history.valid is None else squares.masked_fill(~history.valid, float("inf"))
            grown = squares[:, -1] > size.amin(dim=1) * self.restart**2
            bad = grown | ~(alpha.detach().abs().amax(dim=1) < MODERATE)
            if not any_true(bad):
                return alpha, history
            best = torch.nn.functional.one_hot(size.argmin(dim=1), squares.shape[1]).bool()
            bad = bad.unsqueeze(1)
            valid = torch.where(bad, best, True if history.valid is None else history.valid)
        alpha = torch.where(bad, best.to(alpha.dtype), alpha)
        return alpha, dataclasses.replace(history, valid=valid)

    def _minimal(self, gram: Tensor, scale: Tensor, valid: Tensor | None) -> Tensor:
        column = scale.unsqueeze(2)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        # An entry of scale zero (forgotten) has a row of zeros: a one on its diagonal makes its weight zero.
        diagonal = self.regularization if valid is None else torch.where(valid, self.regularization, 1.0).unsqueeze(2)
        system = torch.addcmul(eye * diagonal, gram, column * scale.unsqueeze(1))
        # The minimiser is the normalised solution of (Gram + reg) y = 1, here in the scaled unknowns.
        y = torch.linalg.solve_ex(system, column)[0].squeeze(2) * scale
        return y / y.sum(dim=1, keepdim=True)

    def _orthogonal(self, history: History, scale: Tensor) -> Tensor:
        steps, residuals = history.steps, history.residuals
        inner = [torch.stack([_dot(s, r) for r in residuals], dim=1) for s in steps]
        lengths = torch.stack([_dot(s, s) for s in steps], dim=1).double()
        matrix = torch.stack(inner, dim=1).double()
        matrix = matrix / lengths.clamp_min(torch.finfo(torch.float64).tiny).sqrt().unsqueeze(2)
        matrix = matrix * scale.unsqueeze(1)
        if history.valid is not None:
            # The condition of a step that touches a forgotten iterate is dropped in favour of alpha_i = 0 for it.
            use = (history.valid[:, 1:] & history.valid[:, :-1]).unsqueeze(2)
            away = torch.eye(len(residuals), dtype=matrix.dtype, device=matrix.device)[:-1]
            matrix = torch.where(use, matrix, away)
        system = torch.cat([matrix, scale.unsqueeze(1)], dim=1)
        right = torch.zeros_like(scale)
        right = torch.cat([right[:, 1:], torch.ones_like(right[:, :1])], dim=1)
        alpha, info = torch.linalg.solve_ex(system, right.unsqueeze(2))
        alpha = alpha.squeeze(2) * scale
        return torch.where(info.unsqueeze(1) == 0, alpha, float("nan"))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.linalg.vecdot(a, b)


def _combine(rows: Rows, weights: Rows) -> Tensor:
    total = rows[0] * weights[0]
    in_place = not (torch.is_grad_enabled() or inside_transform())
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total = total.addcmul_(row, weight) if in_place else torch.addcmul(total, row, weight)
    return total
