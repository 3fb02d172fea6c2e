"""Plain and damped fixed-point iteration."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..options import check_real, options
from .method import Evaluated, FixedPointSolver, Proposal
from .problem import Problem


@dataclasses.dataclass(frozen=True)
class NoMemory:
    """The memory of a method that has none."""

    def select(self, rows: Tensor) -> NoMemory:
        """Itself."""
        return self


@options
class Picard(FixedPointSolver):
    """z <- (1 - damping) z + damping f(z).

    Converges linearly, at the spectral radius of the (damped) Jacobian. The cheapest step there is: choose it
    for strongly contractive functions, and as the yardstick of the others.

    Attributes:
        damping: share of the new image, in (0, 1]; below 1 it tames eigenvalues near -1. Over-relaxation up to 2
            is allowed.

    Raises:
        ValueError: damping is not in (0, 2].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_real("Picard: ", "damping", self.damping, lambda d: 0 < d <= 2, "in (0, 2]")

    def init(self, z: Tensor) -> NoMemory:
        """Nothing to remember."""
        return NoMemory()

    def propose(self, problem: Problem, at: Evaluated, memory: NoMemory) -> Proposal:
        """The damped image."""
        if self.damping == 1:
            return Proposal(at.image, memory)
        return Proposal(torch.add(at.z, at.residual, alpha=self.damping), memory)
