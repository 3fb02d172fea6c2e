"""Anderson acceleration, types I and II."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Literal

import torch
from torch import Tensor

from ..options import check_integer, check_real, options
from ..transforms import all_true, any_true, solve_ex
from .method import Evaluated, FixedPointSolver, Proposal
from .problem import Problem
from .ring import Ring, bordered

MODERATE = 1e4
"""Coefficients of at least this size are a sign of a Gram matrix that rounding has spoilt."""

SMALLEST = 1e-200
"""A squared length in float64 below which a residual counts as zero; its inverse and its square are finite."""


@dataclasses.dataclass(frozen=True)
class History:
    """The last iterates, by slot.

    Attributes:
        images: f(z_i).
        residuals: f(z_i) - z_i.
        gram: inner products of the residuals (rows, h, h), in float64.
        valid: which slots a row still uses (rows, h); None while all are.
        steps: z_i - z_{i-1}, the first one zero; kept by type I only.
        cross: inner products of steps and residuals (rows, h, h), in float64; kept by type I only.
        z: the newest iterate; kept by type I only.
    """

    images: Ring
    residuals: Ring
    gram: Tensor | None = None
    valid: Tensor | None = None
    steps: Ring | None = None
    cross: Tensor | None = None
    z: Tensor | None = None

    def select(self, rows: Tensor) -> History:
        """The history of some rows."""

        def take(value: Any) -> Any:
            if isinstance(value, Ring):
                return value.select(rows)
            return None if value is None else value.index_select(0, rows)

        return History(*[take(getattr(self, field.name)) for field in dataclasses.fields(self)])


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
            relative to the trace at any size of the residual. Strong for a ridge of this kind on purpose: over a
            short memory it discards directions that the last residuals hardly tell apart, and on ill-conditioned
            problems that saves up to a third of the steps.
        restart: growth of the residual that triggers a restart.

    Raises:
        ValueError: an option is out of range.

    Source: Walker and Ni 2011, Anderson acceleration for fixed-point iterations; Fang and Saad 2009, section 2.
    """

    memory: int = 6
    kind: Literal["I", "II"] = "II"
    damping: float = 1.0
    regularization: float = 3e-4
    restart: float = 10.0

    def __post_init__(self) -> None:
        check_integer("Anderson: ", "memory", self.memory)
        if self.kind not in ("I", "II"):
            raise ValueError(f"Anderson: kind must be 'I' or 'II'; got {self.kind!r}.")
        check_real("Anderson: ", "damping", self.damping, lambda d: 0 < d <= 1, "in (0, 1]")
        check_real("Anderson: ", "regularization", self.regularization, lambda r: r >= 0, "finite and not negative")
        # An infinite one never restarts.
        if not (isinstance(self.restart, numbers.Real) and self.restart > 1):
            raise ValueError(f"Anderson: restart must be above 1; got {self.restart!r}.")

    def init(self, z: Tensor) -> History:
        """An empty history."""
        return History(Ring(self.memory), Ring(self.memory), steps=Ring(self.memory) if self.kind == "I" else None)

    def room(self, memory: History, z: Tensor) -> Tensor | None:
        """The slot of the oldest residual."""
        return memory.residuals.room(z)

    def forget(self, memory: History, rows: Tensor) -> History:
        """Without the iterates of `rows`: one whose residual was zero would be chosen for good."""
        if memory.gram is None:
            return memory
        valid = torch.ones_like(memory.gram[:, 0], dtype=torch.bool) if memory.valid is None else memory.valid
        return dataclasses.replace(memory, valid=valid & ~rows.unsqueeze(1))

    def propose(self, problem: Problem, at: Evaluated, memory: History) -> Proposal:
        """The combination of the remembered images."""
        slot = memory.images.slot
        history = self._remember(memory, at, slot)
        if len(history.images) == 1:
            return Proposal(torch.add(at.z, at.residual, alpha=self.damping), history)
        alpha, history = self._coefficients(history, slot, at.improving)
        z = history.images.combine(alpha)
        if self.damping != 1:
            z = torch.sub(z, history.residuals.combine(alpha), alpha=1 - self.damping)
        return Proposal(z, history)

    def _remember(self, old: History, at: Evaluated, slot: int) -> History:
        residuals = old.residuals.put(at.residual)
        row = residuals.dots(at.residual).double()
        gram = bordered(old.gram, slot, row, row)
        valid = old.valid
        if valid is not None:
            here = torch.arange(len(residuals), device=valid.device) == slot
            valid = torch.nn.functional.pad(valid, (0, len(residuals) - valid.shape[1]), value=True) | here
        history = History(old.images.put(at.image), residuals, gram, valid)
        if old.steps is None:
            return history
        step = torch.zeros_like(at.z) if old.z is None else at.z - old.z
        steps = old.steps.put(step)
        cross = bordered(old.cross, slot, residuals.dots(step).double(), steps.dots(at.residual).double())
        return dataclasses.replace(history, steps=steps, cross=cross, z=at.z)

    def _coefficients(self, history: History, slot: int, improving: bool) -> tuple[Tensor, History]:
        """alpha (rows, h) in float64, and the history less what a restart forgets."""
        gram = history.gram
        assert gram is not None
        squares = gram.diagonal(dim1=1, dim2=2)
        # Residuals of length one make the regularisation relative to each of them: the newest, which may be
        # orders of magnitude smaller than the oldest, is not drowned by it.
        scale = squares.clamp_min(SMALLEST).rsqrt()
        if history.valid is not None:
            scale = scale * history.valid
        if self.kind == "II":
            matrix, right = self._minimal(gram, scale, history.valid), scale
        else:
            matrix, right = self._orthogonal(history, scale, slot)
        alpha = _solve(matrix, right, scale)
        with torch.no_grad():
            if improving and all_true(alpha.detach().abs().amax() < MODERATE):
                return alpha, history
            size = squares if history.valid is None else squares.masked_fill(~history.valid, float("inf"))
            grown = squares[:, slot] > size.amin(dim=1) * self.restart**2
            bad = grown | ~(alpha.detach().abs().amax(dim=1) < MODERATE)
            if not any_true(bad):
                return alpha, history
            # torch's one_hot reads its maximum, which vmap of grad does not allow.
            best = torch.arange(squares.shape[1], device=size.device) == size.argmin(dim=1, keepdim=True)
            bad = bad.unsqueeze(1)
            # Type I needs consecutive iterates, so it cannot keep an older one on its own.
            kept = best if self.kind == "II" else torch.zeros_like(best)
            valid = torch.where(bad, kept, True if history.valid is None else history.valid)
        # A NaN that is not chosen still spoils a taped gradient: the bad systems are replaced and solved again.
        eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(bad.unsqueeze(2), eye, matrix)
        alpha = _solve(matrix, torch.where(bad, 1.0, right), torch.where(bad, 1.0, scale))
        alpha = torch.where(bad, best.to(alpha.dtype), alpha)
        return alpha, dataclasses.replace(history, valid=valid)

    def _minimal(self, gram: Tensor, scale: Tensor, valid: Tensor | None) -> Tensor:
        """The scaled and regularised Gram matrix: the minimiser solves it for a right-hand side of ones."""
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        # A slot of scale zero (forgotten) has a row of zeros: a one on its diagonal makes its weight zero.
        diagonal = self.regularization if valid is None else torch.where(valid, self.regularization, 1.0).unsqueeze(2)
        return torch.addcmul(eye * diagonal, gram, scale.unsqueeze(2) * scale.unsqueeze(1))

    def _orthogonal(self, history: History, scale: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """The conditions, a row each, and their right-hand side."""
        cross, steps = history.cross, history.steps
        assert cross is not None and steps is not None
        size = cross.shape[1]
        matrix = cross * scale.unsqueeze(1)
        matrix = matrix * matrix.square().sum(dim=2, keepdim=True).clamp_min(SMALLEST).rsqrt()
        # The oldest iterate's step began where nothing is remembered; its row states that alpha sums to one.
        oldest = (slot + 1) % size
        first = torch.arange(size, device=cross.device) == oldest
        matrix = torch.where(first.unsqueeze(1), (scale / scale.amax(dim=1, keepdim=True)).unsqueeze(1), matrix)
        if history.valid is not None:
            # What is valid is a run of the newest. The slots before it have weight zero, each by its own row; the
            # oldest slot's row is taken, so that its condition stands in the row of the run's first step.
            eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
            starts = history.valid & ~history.valid.roll(1, dims=1) & ~first
            matrix = torch.where((~history.valid & ~first).unsqueeze(2), eye, matrix)
            matrix = torch.where(starts.unsqueeze(2), eye[oldest], matrix)
        return matrix, first.to(matrix.dtype).expand(len(matrix), size)


def _solve(matrix: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Coefficients that sum to one, from those of the residuals scaled to length one."""
    # A singular system yields infinities or NaN, which the caller looks for.
    y = solve_ex(matrix, right.unsqueeze(2))[0].squeeze(2) * scale
    return y / y.sum(dim=1, keepdim=True)
