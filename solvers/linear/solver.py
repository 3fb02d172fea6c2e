"""What all linear solvers share: one interface, checks, precision and scale."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..options import check_integer, options
from ..solution import Solution, Stats, Status
from ..transforms import autocast_to, no_derivatives
from .operator import LinearOperator

Map = Callable[[Tensor], Tensor]
_HALF = (torch.float16, torch.bfloat16)


class LinearSolver(abc.ABC):
    """The base of every solver of A x = b, a square system a sample."""

    def solve(
        self,
        operator: LinearOperator,
        b: Float[Tensor, "batch n"],
        x0: Float[Tensor, "batch n"] | None = None,
        preconditioner: Map | None = None,
    ) -> Solution[Tensor]:
        """Solve A x = b for every sample; nothing of it is recorded for differentiation.

        Half-precision inputs are solved in float32. Samples stop one by one: the iterate of a sample that is done
        does not change any more, and a sample with a NaN touches no other.

        Args:
            operator: A.
            b: right-hand sides.
            x0: where an iterative solver starts; zero by default. Direct solvers do not need it and ignore it.
            preconditioner: v -> M v with M an approximation of A^-1, (batch, n) to (batch, n); for CG it must be
                symmetric positive definite. Iterative solvers only.

        Returns:
            `value` (batch, n) in the dtype of b, NaN in the samples with status NON_FINITE. `stats.steps`,
            `stats.evaluations` (applications of the operator) and `stats.residual` = |b - A x| / |b|, computed
            from A and x anew where the solver is direct or a Krylov method. Where b is zero x is zero, with residual 0
            after 0 steps.

        Raises:
            ValueError: b or x0 of another shape, dtype or device than the operator; a preconditioner for a direct
                solver.
        """
        _check(operator, b, "b")
        if x0 is not None:
            _check(operator, x0, "x0")
        with no_derivatives(), autocast_to(None, operator.device):
            low = operator.dtype in _HALF or b.dtype in _HALF
            dtype = torch.float32 if low else b.dtype
            # Scaled by the largest entry: a float32 gradient of 1e-25 has squares that underflow, and is solved all the
            # same. Where b is zero, dividing by infinity sets x0 to zero too.
            size = torch.linalg.vector_norm(b.to(dtype), ord=math.inf, dim=1)
            divisor = size.masked_fill(size == 0, math.inf)
            scaled = b / divisor.unsqueeze(1)
            system = System(
                operator=operator,
                apply=_cast(operator.matvec, operator.dtype, dtype),
                precondition=preconditioner and _cast(preconditioner, operator.dtype, dtype),
                b=scaled,
                x0=None if x0 is None else x0 / divisor.unsqueeze(1),
                norm=torch.linalg.vector_norm(scaled, dim=1),
                divisor=divisor,
            )
            result = self._run(system)
            # One product for both: back to the scale of b, and to NaN where there is nothing to trust.
            factor = size.masked_fill(result.status == int(Status.NON_FINITE), math.nan)
            stats = Stats(result.steps, result.evaluations, result.residual, result.status)
            return Solution((result.x * factor.unsqueeze(1)).to(b.dtype), stats)

    @abc.abstractmethod
    def _run(self, system: System) -> Result:
        """Solve the scaled systems, under no_derivatives."""


@dataclasses.dataclass
class System:
    """A batch of systems in float32 or better, the largest entry of every b one (or zero).

    Attributes:
        operator: A, in its own dtype.
        apply: v -> A v, in the dtype of b.
        precondition: v -> M v, in the dtype of b, or None for the identity.
        b: (batch, n).
        x0: start (batch, n), or None for zero.
        norm: |b| (batch,).
        divisor: (batch,) what the user's b was divided by; infinity where it was zero.
    """

    operator: LinearOperator
    apply: Map
    precondition: Map | None
    b: Tensor
    x0: Tensor | None
    norm: Tensor
    divisor: Tensor

    def relative(self, residual: Tensor) -> Tensor:
        """|b - A x| (batch,) in units of |b|; where b is zero, as it is."""
        return residual / self.norm.masked_fill(self.norm == 0, 1.0)


@dataclasses.dataclass
class Result:
    """What a solver found: the scaled x (batch, n), and `Stats` (batch,) with the residual relative to |b|."""

    x: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: Tensor
    status: Tensor


@options
class IterativeSolver(LinearSolver):
    """The base of iterative solvers, which stop a sample at |b - A x| <= max(rtol |b|, atol).

    These options are keywords; what a solver adds of its own may also be given by position.

    Args:
        rtol: tolerance relative to |b|; None takes 1e-10 in float64 and 1e-5 otherwise.
        atol: absolute tolerance.
        max_steps: budget of steps of every sample.

    Raises:
        ValueError: a negative or non-finite tolerance; max_steps below one.
    """

    _: dataclasses.KW_ONLY
    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 200

    def __post_init__(self) -> None:
        if self.rtol is not None:
            check_tolerance(self, "rtol", self.rtol)
        check_tolerance(self, "atol", self.atol)
        check_count(self, "max_steps", self.max_steps)

    def _tolerance(self, system: System) -> Tensor:
        """Bound (batch,) on |b - A x| of the scaled systems."""
        rtol = self.rtol if self.rtol is not None else (1e-10 if system.b.dtype == torch.float64 else 1e-5)
        return torch.maximum(rtol * system.norm, self.atol / system.divisor)


def check_tolerance(solver: object, name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number and not negative."""
    if not (0 <= value < math.inf):
        raise ValueError(f"{type(solver).__name__}: {name} must be finite and not negative; got {value!r}.")


def check_count(solver: object, name: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer of at least one."""
    check_integer(f"{type(solver).__name__}: ", name, value)


def _check(operator: LinearOperator, tensor: Tensor, name: str) -> None:
    expected = (operator.batch, operator.size)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name}: expected shape (batch, n) = {expected} as in the operator; got {tuple(tensor.shape)}."
        )
    narrow = (*_HALF, torch.float32)
    if tensor.dtype != operator.dtype and not (tensor.dtype in narrow and operator.dtype in narrow):
        raise ValueError(f"{name}: expected dtype {operator.dtype} as in the operator; got {tensor.dtype}.")
    if tensor.device != operator.device:
        raise ValueError(f"{name}: expected device {operator.device} as in the operator; got {tensor.device}.")


def _cast(function: Map, inner: torch.dtype, outer: torch.dtype) -> Map:
    if inner == outer:
        return function
    return lambda v: function(v.to(inner)).to(outer)
