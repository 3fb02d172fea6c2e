"""Good Broyden with a limited memory and a line search per sample."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true
from .method import Evaluated, FixedPointSolver, Proposal
from .problem import Problem


@dataclasses.dataclass(frozen=True)
class InverseJacobian:
    """H = (I + w_k s_k^T) ... (I + w_1 s_1^T) (-I), an approximate inverse of the residual's Jacobian.

    The product form stays invertible and consistent when its oldest factor is dropped; a sum of outer products
    does not, since each term was computed with those before it.

    Attributes:
        corrections: w_i (rows, n), oldest first.
        steps: s_i (rows, n).
    """

    corrections: tuple[Tensor, ...] = ()
    steps: tuple[Tensor, ...] = ()

    def apply(self, v: Tensor) -> Tensor:
        """H v."""
        out = -v
        for w, s in zip(self.corrections, self.steps, strict=True):
            out = torch.addcmul(out, w, _dot(s, out))
        return out

    def apply_transpose(self, v: Tensor) -> Tensor:
        """H^T v."""
        out = v
        for w, s in zip(reversed(self.corrections), reversed(self.steps), strict=True):
            out = torch.addcmul(out, s, _dot(w, out))
        return -out

    def append(self, w: Tensor, s: Tensor) -> InverseJacobian:
        """(I + w s^T) H."""
        return InverseJacobian((*self.corrections, w), (*self.steps, s))

    def newest(self, count: int) -> InverseJacobian:
        """The newest `count` factors."""
        return InverseJacobian(self.corrections[-count:], self.steps[-count:]) if count else InverseJacobian()

    def salvage(self) -> InverseJacobian:
        """Itself as a constant, less the factors of a row that broke."""

        def clean(ts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.detach().nan_to_num(0.0, 0.0, 0.0) for t in ts)

        return InverseJacobian(clean(self.corrections), clean(self.steps))

    def select(self, rows: Tensor) -> InverseJacobian:
        """Those of some rows."""
        return InverseJacobian(
            tuple(t.index_select(0, rows) for t in self.corrections), tuple(t.index_select(0, rows) for t in self.steps)
        )


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
        line_search: halve the step of a row whose residual grows past `growth` times the last accepted one.
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
        if self.memory < 1:
            raise ValueError(f"Broyden: memory must be at least 1; got {self.memory}.")
        if self.growth < 1:
            raise ValueError(f"Broyden: growth must be at least 1; got {self.growth}.")

    def init(self, z: Tensor) -> BroydenMemory:
        """H = -I: the first step is a Picard step."""
        return BroydenMemory(InverseJacobian())

    def lasting(self, memory: BroydenMemory) -> BroydenMemory:
        """The inverse, as a first guess of the new one."""
        return BroydenMemory(memory.inverse.salvage())

    def propose(self, problem: Problem, at: Evaluated, memory: BroydenMemory) -> Proposal:
        """A quasi-Newton step, or for a row whose residual grew too much half of the last one."""
        one = torch.ones_like(at.norm)
        if memory.z is None:
            direction = -memory.inverse.apply(at.residual)
            following = BroydenMemory(memory.inverse, at.z, at.residual, direction, at.norm, one)
            return Proposal(at.z + direction, following)
        assert memory.residual is not None and memory.direction is not None
        assert memory.norm is not None and memory.length is not None
        inverse = memory.inverse
        if len(inverse.steps) >= self.memory:
            inverse = inverse.newest(self.memory - 1)
            # H has changed: what it makes of the old residual is no longer the old direction.
            previous = inverse.apply(memory.residual)
        else:
            previous = -memory.direction
        step = at.z - memory.z
        applied = inverse.apply(at.residual)
        change = applied - previous
        along = _dot(step, change)
        size = _dot(step, step)
        # Where the secant says nothing about the step's direction, the update would blow up: leave H as it is.
        sound = along.abs() > 1e-6 * size
        w = torch.where(sound, (step - change) / torch.where(sound, along, 1.0), 0.0)
        direction = -torch.addcmul(applied, w, _dot(step, applied))
        following = BroydenMemory(inverse.append(w, step), at.z, at.residual, direction, at.norm, one)
        if self.line_search:
            refused = (at.norm > memory.norm * self.growth) & (memory.length > 2.0**-6)
            refused = refused | ((memory.length > 2.0**-6) & ~torch.isfinite(at.norm))
            if any_true(refused):
                return self._shorten(memory, following, refused)
        return Proposal(at.z + direction, following)

    def _shorten(self, before: BroydenMemory, after: BroydenMemory, refused: Tensor) -> Proposal:
        """Keep the old state of the refused rows and halve their step; the others go on."""
        rows = refused.unsqueeze(1)
        assert before.length is not None and after.length is not None
        names = ("z", "residual", "direction")
        mixed = {name: torch.where(rows, getattr(before, name), getattr(after, name)) for name in names}
        newest = torch.where(rows, 0.0, after.inverse.corrections[-1])
        inverse = InverseJacobian((*after.inverse.corrections[:-1], newest), after.inverse.steps)
        norm = torch.where(refused, before.norm, after.norm)  # type: ignore[arg-type]
        length = torch.where(refused, before.length / 2, after.length)
        memory = BroydenMemory(inverse, norm=norm, length=length, **mixed)
        z = torch.addcmul(mixed["z"], mixed["direction"], length.unsqueeze(1).to(mixed["z"].dtype))
        return Proposal(z, memory)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows (rows, 1), in the rows' own type."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)
