"""The default choice of a linear solver."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..options import options, require
from ..solution import Solution
from .dense import LU
from .gmres import GMRES
from .operator import LinearOperator
from .solver import LinearSolver, Map, check_count


@options
class Auto(LinearSolver):
    """A dense factorisation for small systems, an iterative solver for large ones.

    Args:
        dense_size: the largest n for which `dense` is used.
        dense: the solver of small systems.
        iterative: the solver of large ones; a preconditioner is passed on to it and not to `dense`.

    Raises:
        ValueError: dense_size below one.
        TypeError: `dense` or `iterative` is no linear solver.
    """

    dense_size: int = 32
    dense: LinearSolver = dataclasses.field(default_factory=LU)
    iterative: LinearSolver = dataclasses.field(default_factory=GMRES)

    def __post_init__(self) -> None:
        check_count(self, "dense_size", self.dense_size)
        require(self.dense, LinearSolver, "dense")
        require(self.iterative, LinearSolver, "iterative")

    def _solve(
        self, operator: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: Map | None
    ) -> Solution[Tensor]:
        if operator.size <= self.dense_size:
            return self.dense.solve(operator, b)
        return self.iterative.solve(operator, b, x0, preconditioner)
