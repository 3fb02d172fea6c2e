"""What a fixed-point method is: an `init` and a `propose`, driven by one loop."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from torch import Tensor

from .problem import Problem


class Evaluated(NamedTuple):
    """One evaluation of the problem, all (batch, n) but for `norm` (batch,).

    Attributes:
        z: the iterate.
        image: the Picard image z + residual.
        residual: f(z) - z, or -F(z).
        norm: the residual's Euclidean norm, without derivatives.
        improving: every running row has its smallest residual so far.
    """

    z: Tensor
    image: Tensor
    residual: Tensor
    norm: Tensor
    improving: bool


class Proposal(NamedTuple):
    """A method's answer.

    Attributes:
        z: where to evaluate next.
        memory: what the method wants to have again.
        evaluations: evaluations that the method made itself, beside the loop's.
    """

    z: Tensor
    memory: Any
    evaluations: int = 0


class FixedPointSolver(abc.ABC):
    """A method for z = f(z) and, through the residual -F, for F(x) = 0.

    Methods are written without in-place operations, so that the same code can be taped by autograd, replayed by
    a checkpoint and mapped by torch.func.vmap. A method's memory has a method `select(rows)` which takes rows out.
    """

    @abc.abstractmethod
    def init(self, z: Tensor) -> Any:
        """The memory before the first evaluation at `z` (batch, n)."""

    def lasting(self, memory: Any) -> Any:
        """What of a finished solve's memory helps the solve of a neighbouring problem; None where nothing does.

        Residuals and images do not: they belong to the function as it was, and would pass its rest point for the
        new one's.
        """
        return None

    def resume(self, memory: Any) -> Any:
        """The memory to start from, of one that `lasting` has kept; solves may start from the same one repeatedly."""
        return memory

    def retries(self, memory: Any) -> Tensor | None:
        """Rows (rows,) for which `propose` would shorten the last step if it led to a NaN; None for no row."""
        return None

    def room(self, memory: Any, z: Tensor) -> Tensor | None:
        """Where the residual at `z` may be written, which saves a copy of it; None for nowhere."""
        return None

    def forget(self, memory: Any, rows: Tensor) -> Any:
        """The memory without the residuals of `rows` (rows,), whose function is not what it was when they were met."""
        return memory

    @abc.abstractmethod
    def propose(self, problem: Problem, at: Evaluated, memory: Any) -> Proposal:
        """The next iterate after an evaluation."""
