"""What every solver returns: a value, and per sample how it was found."""

from __future__ import annotations

import dataclasses
import enum
import sys
import warnings
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .transforms import all_true, plain

T = TypeVar("T")


class Status(enum.IntEnum):
    """How a sample's solve ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    NON_FINITE = 2
    STAGNATED = 3
    STEP_UNDERFLOW = 4
    INFEASIBLE = 5
    UNBOUNDED = 6
    EVENT = 7

    @property
    def meaning(self) -> str:
        """One readable clause."""
        return _MEANING[self]

    @property
    def advice(self) -> str:
        """What the user can change."""
        return _ADVICE[self]


_MEANING = {
    Status.CONVERGED: "reached the tolerance",
    Status.MAX_STEPS: "used up max_steps before it reached the tolerance",
    Status.NON_FINITE: "met a NaN or an infinity",
    Status.STAGNATED: "stopped making progress",
    Status.STEP_UNDERFLOW: "needed a step below the resolution of its floating-point type",
    Status.INFEASIBLE: "has no feasible point",
    Status.UNBOUNDED: "has no finite optimum",
    Status.EVENT: "was ended by an event",
}
_ADVICE = {
    Status.CONVERGED: "",
    Status.MAX_STEPS: "raise max_steps, loosen rtol or atol, or choose a stronger solver",
    Status.NON_FINITE: "look at the inputs of that sample, or at where the function overflows",
    Status.STAGNATED: "loosen rtol or atol, compute in float64, or make the function more contractive",
    Status.STEP_UNDERFLOW: "loosen rtol or atol, compute in float64, or take an implicit solver if it is stiff",
    Status.INFEASIBLE: "loosen the constraints of that sample",
    Status.UNBOUNDED: "bound or regularise the objective of that sample",
    Status.EVENT: "",
}


class SolverError(RuntimeError):
    """A solve that failed where the caller asked for an exception.

    Attributes:
        solution: what was found all the same, or None where nothing was.
    """

    def __init__(self, message: str, solution: Solution[Any] | None = None) -> None:
        super().__init__(message)
        self.solution = solution


class SolverWarning(UserWarning):
    """The base of every numerical warning of the library."""


class MaxStepsWarning(SolverWarning):
    """Some sample used up its budget of steps."""


class NonFiniteWarning(SolverWarning):
    """Some sample met a NaN or an infinity."""


class StagnationWarning(SolverWarning):
    """Some sample stopped making progress."""


class StepUnderflowWarning(SolverWarning):
    """Some sample needed a step below the resolution of its type."""


class InfeasibleWarning(SolverWarning):
    """Some sample has no feasible point."""


class UnboundedWarning(SolverWarning):
    """Some sample has no finite optimum."""


class AdjointWarning(SolverWarning):
    """A backward solve did not reach its tolerance: the gradient is less exact than was asked for."""


CATEGORY: dict[Status, type[SolverWarning]] = {
    Status.MAX_STEPS: MaxStepsWarning,
    Status.NON_FINITE: NonFiniteWarning,
    Status.STAGNATED: StagnationWarning,
    Status.STEP_UNDERFLOW: StepUnderflowWarning,
    Status.INFEASIBLE: InfeasibleWarning,
    Status.UNBOUNDED: UnboundedWarning,
}


@dataclasses.dataclass
class Stats:
    """Per-sample statistics; every tensor has shape (batch,).

    Attributes:
        steps: updates of the iterate (int64); for an ODE accepted and rejected steps together.
        evaluations: evaluations of the user's function that this sample took part in (int64).
        residual: the last measured residual, relative to the scale that the tolerance is relative to.
        status: `Status` values (int64).
        accepted: accepted steps of an adaptive integrator, else None.
        rejected: rejected steps of an adaptive integrator, else None.
    """

    steps: Tensor
    evaluations: Tensor
    residual: Tensor
    status: Tensor
    accepted: Tensor | None = None
    rejected: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """Boolean mask (batch,): reached the tolerance, or ended by an event as was wished."""
        # torch.compile takes a comparison of a tensor with an enumeration's member for False.
        return (self.status == int(Status.CONVERGED)) | (self.status == int(Status.EVENT))


@dataclasses.dataclass
class Solution(Generic[T]):
    """The result of a problem function.

    Attributes:
        value: same structure as the initial value; differentiable as the adjoint allows.
        stats: per-sample statistics of the forward solve.
        adjoint_stats: per-sample statistics of the backward solve; None until backward has run.
        trajectory: intermediate states where they were asked for, stacked in front: (steps + 1, batch, ...).
        warm: what a solver can start from again (`z0=solution`), private to the solver.
    """

    value: T
    stats: Stats
    adjoint_stats: Stats | None = None
    trajectory: T | None = None
    warm: Any = dataclasses.field(default=None, repr=False)

    @property
    def converged(self) -> Tensor:
        """Boolean mask (batch,)."""
        return self.stats.converged

    def report(self) -> str:
        """One sentence on the worst sample, or on all of them having converged.

        Under vmap the samples of all examples count, one after another.
        """
        worst = self._worst()
        batch, failed = worst.batch, worst.failed
        if not failed:
            return f"all {batch} samples converged"
        return (
            f"{failed} of {batch} samples did not converge. The worst, sample {worst.sample}, {worst.status.meaning}: "
            f"residual {worst.residual:.3g} after {worst.steps} steps. "
            f"To change: {worst.status.advice}."
        )

    def _worst(self) -> _Worst:
        values = [plain(t).detach() for t in (self.stats.status, self.stats.residual, self.stats.steps, self.converged)]
        status, residual, steps, converged = (t.flatten() for t in torch.broadcast_tensors(*values))
        failed = (~converged).nonzero().flatten()
        if len(failed) == 0:
            return _Worst(len(status), 0, -1, Status.CONVERGED, 0.0, 0)
        # A NaN residual is worse than any number.
        ranked = residual[failed].double().nan_to_num(nan=float("inf"))
        worst = int(failed[ranked.argmax()])
        kind = Status(int(status[worst]))
        return _Worst(len(status), len(failed), worst, kind, float(residual[worst]), int(steps[worst]))

    def check(self, throw: bool | str, context: str) -> None:
        """Raise or warn where samples failed.

        Args:
            throw: True raises, "warn" warns with the category of the worst sample's status, False does nothing.
            context: the problem function's name, for the message.

        Raises:
            SolverError: `throw` is True and some sample failed.
            ValueError: `throw` is neither a bool nor "warn".
        """
        check_throw(throw)
        if throw is False or all_true(self.converged):
            return
        message = f"{context}: {self.report()}"
        if throw is True:
            raise SolverError(message, self)
        warn_caller(message, CATEGORY[self._worst().status])


@dataclasses.dataclass(frozen=True)
class _Worst:
    """How many samples of a batch failed, and the one that failed worst."""

    batch: int
    failed: int
    sample: int
    status: Status
    residual: float
    steps: int


def check_throw(throw: object) -> None:
    """Raise ValueError unless `throw` is True, False or "warn"."""
    if not (isinstance(throw, bool) or throw == "warn"):
        raise ValueError(f"throw must be True, False or 'warn'; got {throw!r}.")


# Besides those that a call passes through on its way here, the type checkers that may be wrapped around it.
_PASSED = (__name__.partition(".")[0], "torch", "jaxtyping", "beartype", "contextlib", "functools")


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        frame = frame.f_back
    space = frame.f_globals
    warnings.warn_explicit(
        message, category, frame.f_code.co_filename, frame.f_lineno, space.get("__name__", "<unknown>"),
        space.setdefault("__warningregistry__", {}),
    )  # fmt: skip
