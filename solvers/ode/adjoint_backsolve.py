"""The continuous adjoint that integrates the state backwards along with its cotangent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import options
from .adjoint import Task
from .adjoint_continuous import AdjointRhs, ContinuousAdjoint, ContinuousSolve, Refused
from .method import Time
from .problem import Tolerance


@options
class BacksolveAdjoint(ContinuousAdjoint):
    """Derivatives by solving for the state and its cotangent backwards in time, in constant memory.

    Where the field contracts strongly its time reversal is unstable and the state found on the way back is not the
    one of the way there: this is noticed at every output time and at the start, and counts as a failure of the
    backward solve. Choose `CheckpointAdjoint` where that happens.

    Attributes:
        drift: how far the state may come off, in units of the backward tolerance or, where that is coarser, of the
            forward one, within which the state that it is compared with is known.

    Source: Chen et al. 2018, "Neural ordinary differential equations"; the norm after Kidger, Chen and Lyons 2021,
    "Hey, that's not an ODE".
    """

    drift: float | int = 1000.0

    def prepare(self, task: Task) -> ContinuousSolve:
        """One solve in this way."""
        return _Backsolve(task, self)


class _Backsolve(ContinuousSolve):
    knobs: BacksolveAdjoint

    def adjoint_rhs(self) -> AdjointRhs:
        return _Both(self.inner)

    def settle(self, found: Tensor, expected: Tensor, tolerance: Tolerance) -> Tensor:
        """Compare the state with what it was on the way there."""
        size = expected.shape[1]
        scale = torch.maximum(tolerance.scale(expected), self.problem.tolerance.scale(expected))
        drift = tolerance.sample_ratio(found[:, :size] - expected, scale)
        worst = float(drift.max())
        if not worst <= self.knobs.drift:
            raise Refused(
                f"the state of sample {int(drift.argmax())} came off by {worst:.3g} times the tolerance on the way back"
            )
        return found


class _Both(AdjointRhs):
    """Of the matrix (batch, 2 n) that holds the state and its cotangent."""

    __slots__ = ()

    def split(self, t: Time, matrix: Tensor) -> tuple[Tensor, Tensor]:
        y, bar = matrix.tensor_split(2, dim=1)
        return y, bar

    def join(self, y: Tensor, rate: Tensor, bar: Tensor) -> Tensor:
        return torch.cat([rate, bar], dim=1)
