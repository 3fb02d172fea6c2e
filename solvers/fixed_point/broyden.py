"""Good Broyden with a limited memory and a line search per sample."""

from __future__ import annotations

import dataclasses
import numbers

import torch
from torch import Tensor

from ..options import check_integer, options
from ..transforms import any_true, solve_ex
from .method import Evaluated, FixedPointSolver, Proposal
from .problem import Problem
from .ring import Ring, bordered, dot

SHORTEST = 2.0**-6
"""The smallest share of a step that the line search tries."""


@dataclasses.dataclass(frozen=True)
class InverseJacobian:
    """H = -(I + w_k s_k^T) ... (I + w_1 s_1^T), an approximate inverse of the residual's Jacobian.

    The product form stays invertible and consistent when its oldest factor is dropped; a sum of outer products
    does not, since each term was computed with those before it. The product is applied at once as
    I + W (I - L)^{-1} S^T, with L_ij = s_i . w_j for the factors j older than i.

    Attributes:
        corrections: w_i.
        steps: s_i.
        lower: L (rows, h, h) by slot; None while there is no factor.
        skipped: slot of a factor that is left out.
    """

    corrections: Ring
    steps: Ring
    lower: Tensor | None = None
    skipped: int | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def apply(self, v: Tensor) -> Tensor:
        """H v for v (rows, n)."""
        return -v if self.lower is None else -(v + self.corrections.combine(self._solve(self.steps.dots(v), False)))

    def apply_transpose(self, v: Tensor) -> Tensor:
        """H^T v for v (rows, n)."""
        return -v if self.lower is None else -(v + self.steps.combine(self._solve(self.corrections.dots(v), True)))

    def _solve(self, right: Tensor, transposed: bool) -> Tensor:
        assert self.lower is not None
        lower = self.lower
        if self.skipped is not None:
            keep = (torch.arange(len(self), device=lower.device) != self.skipped).to(lower.dtype)
            lower, right = lower * keep.unsqueeze(1) * keep, right * keep
        eye = torch.eye(len(self), dtype=lower.dtype, device=lower.device)
        # Ordered by age the matrix is triangular with ones on its diagonal, so it is never singular.
        matrix = eye - (lower.mT if transposed else lower)
        return solve_ex(matrix, right.unsqueeze(2))[0].squeeze(2)

    def append(self, w: Tensor, s: Tensor) -> InverseJacobian:
        """(I + w s^T) H, in place of the oldest factor where the memory is full."""
        slot = self.steps.slot
        corrections, steps = self.corrections.put(w), self.steps.put(s)
        row = corrections.dots(s)
        # All the others are older than the new one: it depends on them, and none of them on it.
        older = torch.arange(row.shape[1], device=row.device) != slot
        return InverseJacobian(corrections, steps, bordered(self.lower, slot, row * older, torch.zeros_like(row)))

    def making_room(self) -> InverseJacobian:
        """H without the factor that the next one will replace."""
        full = len(self) == self.steps.capacity
        return dataclasses.replace(self, skipped=self.steps.slot) if full else self

    def detach(self) -> InverseJacobian:
        """The same as a constant."""
        lower = None if self.lower is None else self.lower.detach()
        return InverseJacobian(self.corrections.detach(), self.steps.detach(), lower)

    def salvage(self) -> InverseJacobian:
        """A copy with zeros for what is not finite."""
        lower = None if self.lower is None else self.lower.nan_to_num(0.0, 0.0, 0.0)
        return InverseJacobian(self.corrections.salvage(), self.steps.salvage(), lower)

    def to(self, dtype: torch.dtype) -> InverseJacobian:
        """The same in another type."""
        lower = None if self.lower is None else self.lower.to(dtype)
        return InverseJacobian(self.corrections.to(dtype), self.steps.to(dtype), lower)

    def select(self, rows: Tensor) -> InverseJacobian:
        """That of some rows."""
        lower = None if self.lower is None else self.lower.index_select(0, rows)
        return InverseJacobian(self.corrections.select(rows), self.steps.select(rows), lower)


@dataclasses.dataclass(frozen=True)
class BroydenMemory:
    """Where the last accepted iterate was and the direction that was taken from it; None before the first.

    Attributes:
        inverse: H.
        z, residual, direction: (rows, n).
        norm: of the residual (rows,).
        length: share of the direction that is being tried (rows,).
    """

    inverse: InverseJacobian
    z: Tensor | None = None
    residual: Tensor | None = None
    direction: Tensor | None = None
    norm: Tensor | None = None
    length: Tensor | None = None

    def select(self, rows: Tensor) -> BroydenMemory:
        """The memory of some rows."""
        kept = [getattr(self, f.name) for f in dataclasses.fields(self)[1:]]
        taken = [None if t is None else t.index_select(0, rows) for t in kept]
        return BroydenMemory(self.inverse.select(rows), *taken)


@options
class Broyden(FixedPointSolver):
    """z <- z - H r(z), with H updated by good Broyden to satisfy the newest secant condition.

    Superlinear for well-behaved residuals; keeps two vectors a step, and its inverse can be reused by the backward
    solve (`ImplicitAdjoint(reuse=...)`). Choose it where Anderson needs many steps and memory allows.

    Attributes:
        memory: how many updates are kept; the oldest is dropped first. More is not always better: old updates
            describe the Jacobian where the iterate no longer is.
        line_search: halve the step of a row whose residual grows past `growth` times the last accepted one, or is not
            finite, up to six times.
        growth: see above; above 1, since the residual of a good quasi-Newton path need not fall monotonically.

    Raises:
        ValueError: an option is out of range.

    Source: Broyden 1965; the product form of the inverse: Kelley 1995, Iterative methods for linear and nonlinear
    equations, section 7.3.
    """

    memory: int = 8
    line_search: bool = True
    growth: float = 2.0

    def __post_init__(self) -> None:
        check_integer("Broyden: ", "memory", self.memory)
        # An infinite one refuses no step.
        if not (isinstance(self.growth, numbers.Real) and self.growth >= 1):
            raise ValueError(f"Broyden: growth must be at least 1; got {self.growth!r}.")

    def init(self, z: Tensor) -> BroydenMemory:
        """H = -I: the first step is a Picard step."""
        return BroydenMemory(InverseJacobian(Ring(self.memory), Ring(self.memory)))

    def lasting(self, memory: BroydenMemory) -> BroydenMemory:
        """The inverse, as a first guess of the new one."""
        return BroydenMemory(memory.inverse.detach())

    def resume(self, memory: BroydenMemory) -> BroydenMemory:
        """A copy, which the new solve may write to, without the factors of rows that broke."""
        return BroydenMemory(memory.inverse.salvage())

    def retries(self, memory: BroydenMemory) -> Tensor | None:
        """Those whose step can be halved once more."""
        return None if memory.length is None or not self.line_search else memory.length > SHORTEST

    def propose(self, problem: Problem, at: Evaluated, memory: BroydenMemory) -> Proposal:
        """A quasi-Newton step, or for a row whose residual grew too much half of the last one."""
        one = torch.ones_like(at.norm)
        if memory.z is None:
            direction = -memory.inverse.apply(at.residual)
            following = BroydenMemory(memory.inverse, at.z, at.residual, direction, at.norm, one)
            return Proposal(at.z + direction, following)
        assert memory.residual is not None and memory.direction is not None
        assert memory.norm is not None and memory.length is not None
        inverse = memory.inverse.making_room()
        # Where H has changed, what it makes of the old residual is no longer the old direction.
        previous = -memory.direction if inverse is memory.inverse else inverse.apply(memory.residual)
        step = at.z - memory.z
        applied = inverse.apply(at.residual)
        change = applied - previous
        along = dot(step, change).unsqueeze(1)
        # Where the secant says nothing about the step's direction, the update would blow up: leave H as it is.
        sound = along.abs() > 1e-6 * dot(step, step).unsqueeze(1)
        refused = None
        if self.line_search and not at.improving:
            refused = ~(at.norm <= memory.norm * self.growth) & (memory.length > SHORTEST)
            refused = refused if any_true(refused) else None
            if refused is not None:
                sound = sound & ~refused.unsqueeze(1)
        w = torch.where(sound, (step - change) / torch.where(sound, along, 1.0).to(step.dtype), 0.0)
        step = torch.where(sound, step, 0.0)
        direction = -torch.addcmul(applied, w, dot(step, applied).unsqueeze(1).to(step.dtype))
        following = BroydenMemory(inverse.append(w, step), at.z, at.residual, direction, at.norm, one)
        if refused is None:
            return Proposal(at.z + direction, following)
        return self._shorten(memory, following, refused)

    def _shorten(self, before: BroydenMemory, after: BroydenMemory, refused: Tensor) -> Proposal:
        """Keep the old state of the refused rows and halve their step; the others go on."""
        rows = refused.unsqueeze(1)
        assert before.length is not None and after.length is not None
        names = ("z", "residual", "direction")
        mixed = {name: torch.where(rows, getattr(before, name), getattr(after, name)) for name in names}
        norm = torch.where(refused, before.norm, after.norm)  # type: ignore[arg-type]
        length = torch.where(refused, before.length / 2, after.length)
        memory = BroydenMemory(after.inverse, norm=norm, length=length, **mixed)
        z = torch.addcmul(mixed["z"], mixed["direction"], length.unsqueeze(1).to(mixed["z"].dtype))
        return Proposal(z, memory)
