"""Newton's method for the stage equations of implicit methods."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..linear import GMRES, LinearSolver
from ..options import options, require
from ..transforms import all_true, any_true, inside_transform
from .linearised import Applied, Factorised, Jacobian, jacobian_matrix
from .method import Rhs, Time, column

# Two iterates farther apart than this, relative to the two before, diverge.
_DIVERGING = 2.0


@options
class StageNewton:
    """The simplified Newton iteration: one Jacobian a step, of every sample's own, factorised once a step length.

    A stage's iteration ends for a sample where the error that is left, extrapolated from the rate of convergence, is
    below `kappa` times the tolerance of the solve. Where it diverges the step is tried again with a shorter length.

    Attributes:
        kappa: what is left of the stage equations, as a share of the tolerance. Smaller values buy gradients that are
            exact to more digits, for few evaluations.
        max_steps: iterations of a stage after which the step is given up.
        dense_size: up to so many numbers a sample the Jacobian is assembled and factorised; beyond, it is only
            applied, by `krylov`.
        krylov: solves the linear systems of larger states.
        rtol, atol: the tolerance; None takes that of the solve.

    Raises:
        ValueError: a knob out of its range.
        TypeError: `krylov` is no linear solver.

    Source: Hairer and Wanner 1996, Solving ordinary differential equations II, section IV.8.
    """

    kappa: float = 0.01
    max_steps: int = 10
    dense_size: int = 64
    krylov: LinearSolver = GMRES(rtol=1e-3)
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.kappa < 1:
            raise ValueError(f"StageNewton: kappa must lie between 0 and 1; got {self.kappa}.")
        if self.max_steps < 2:
            raise ValueError(f"StageNewton: max_steps must be at least 2 to see convergence; got {self.max_steps}.")
        if self.dense_size < 0:
            raise ValueError(f"StageNewton: dense_size must not be negative; got {self.dense_size}.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"StageNewton: {name} must be finite and not negative; got {value}.")
        require(self.krylov, LinearSolver, "krylov")

    def tuned(self, rtol: float, atol: float) -> StageNewton:
        """With the tolerance of the solve where it has none of its own."""
        return dataclasses.replace(
            self, rtol=rtol if self.rtol is None else self.rtol, atol=atol if self.atol is None else self.atol
        )

    def scale(self, y: Tensor) -> Tensor:
        """What an error of the size of the tolerance is in every component (batch, n); never below rounding."""
        finest = 32 * torch.finfo(y.dtype).eps / self.kappa
        rtol, atol = self.rtol or 0.0, self.atol or 0.0
        return y.abs() * max(rtol, finest) + max(atol, torch.finfo(y.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class Linearisation:
    """The field's Jacobian at the start of a step.

    Attributes:
        t, y: where it was taken.
        jacobian: assembled (batch, n, n), or to be applied.
    """

    t: Time
    y: Tensor
    jacobian: Tensor | Jacobian

    @classmethod
    def of(cls, newton: StageNewton, rhs: Rhs, t: Time, y: Tensor) -> Linearisation:
        """At (t, y)."""
        if y.shape[1] <= newton.dense_size or inside_transform():
            return cls(t, y, jacobian_matrix(rhs, t, y))
        return cls(t, y, Jacobian.at(rhs, t, y))

    def holds(self, t: Time, y: Tensor) -> bool:
        """Whether it was taken just there, as after a rejected step."""
        return self.y is y and isinstance(t, float) and isinstance(self.t, float) and self.t == t

    def shifted(self, g: Time, krylov: LinearSolver) -> Factorised | Applied:
        """Solves with I - g J."""
        if isinstance(self.jacobian, Tensor):
            return Factorised(self.jacobian, g)
        return Applied(self.jacobian, g, krylov)


class Stages:
    """Solves the stage equations z = h f(t, base + gamma z) of one step, one after another.

    Attributes:
        failed: mask (batch,) of samples for which Newton's method did not converge.
    """

    def __init__(
        self, newton: StageNewton, rhs: Rhs, system: Factorised | Applied, y: Tensor, h: Time, gamma: float
    ) -> None:
        self._newton, self._rhs, self._system, self._gamma = newton, rhs, system, gamma
        self._weight = gamma / math.sqrt(max(y.shape[1], 1)) / newton.scale(y)
        self._h = column(h, y)
        self._rate = torch.full_like(y[:, 0], math.inf)
        self.failed = torch.zeros_like(self._rate, dtype=torch.bool)

    @property
    def hopeless(self) -> bool:
        """Whether there is nothing left to solve."""
        return all_true(self.failed)

    def solve(self, t: Time, base: Tensor, z: Tensor) -> Tensor:
        """The root z (batch, n), from a first guess of it.

        Samples stop one by one, so that a sample's result does not depend on the others'.
        """
        going, before, kappa = ~self.failed, None, self._newton.kappa
        begun = going
        for _ in range(self._newton.max_steps):
            rate = self._rhs(t, torch.add(base, z, alpha=self._gamma))
            if isinstance(self._h, float):
                excess = torch.add(z, rate, alpha=-self._h)
            else:
                excess = z - self._h * rate
            change = self._system.solve(excess)
            size = torch.linalg.vector_norm(change * self._weight, dim=1)
            if before is not None:
                self._rate = torch.where(going, size / before, self._rate)
            # What is left is the sum of the changes to come, if they go on to fall at this rate.
            done = (size * self._rate <= kappa * (1 - self._rate)) | (size <= 0.1 * kappa)
            lost = ~(size < math.inf) if before is None else ~(size <= _DIVERGING * before)
            lost = going & lost & ~done
            self.failed = self.failed | lost
            z = torch.where((going & ~lost).unsqueeze(1), z - change, z)
            going = going & ~done & ~lost
            before = size
            if not any_true(going):
                break
        self.failed = self.failed | going
        if not any_true(self.failed):
            return z
        # The linear solve spreads what is not finite to all components; the error is to name the one it came from.
        last = torch.where(excess.isfinite().all(1, keepdim=True), change, excess)
        return torch.where((begun & self.failed & ~going).unsqueeze(1), z - last, z)
