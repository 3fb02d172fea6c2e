"""Phantom gradients: a few taped steps from the rest point, the Jacobian-free gradient among them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..fixed_point.driver import Carry
from ..fixed_point.problem import Problem
from ..options import check_integer, check_real, options
from ..solution import Stats
from .base import RestPointAdjoint


@options
class PhantomAdjoint(RestPointAdjoint):
    """Approximate derivatives by `steps` damped steps from the rest point, recorded by autograd.

    The gradient is that of a Neumann series of A^{-1} cut after `steps` terms: a descent direction for contractive
    functions, cheaper than the implicit gradient, and regularising in training. The error falls like
    (1 - damping + damping rho)^steps, rho the spectral radius of df/dz. Memory grows with `steps`.

    Attributes:
        steps: number of recorded evaluations.
        damping: share of the image in each, in (0, 1].

    Raises:
        ValueError: an option is out of range.

    Source: Geng et al. 2021, On training implicit models, equation 9 (unrolling-based phantom gradient).
    """

    steps: int = 5
    damping: float = 0.9

    def __post_init__(self) -> None:
        check_integer("PhantomAdjoint: ", "steps", self.steps)
        check_real("PhantomAdjoint: ", "damping", self.damping, lambda d: 0 < d <= 1, "in (0, 1]")

    def attach(self, problem: Problem, z: Tensor, carry: Carry, report: Callable[[Stats], None]) -> Tensor:
        """The end of the recorded steps: the rest point, and a little closer to it."""
        return _taped(problem, z, self.steps, self.damping)


@options
class JacobianFreeAdjoint(RestPointAdjoint):
    """Approximate derivatives by one recorded evaluation at the rest point: A is taken for the identity.

    The cheapest there is, and often enough for training; its angle to the true gradient widens as the spectral
    radius of df/dz grows. `compare_adjoints` measures it.

    Source: Fung et al. 2022, JFB: Jacobian-free backpropagation for implicit networks.
    """

    def attach(self, problem: Problem, z: Tensor, carry: Carry, report: Callable[[Stats], None]) -> Tensor:
        """One recorded evaluation."""
        return _taped(problem, z, 1, 1.0)


def _taped(problem: Problem, z: Tensor, steps: int, damping: float) -> Tensor:
    for _ in range(steps):
        z = torch.add(z, problem.residual(z), alpha=damping)
    return z
