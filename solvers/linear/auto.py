"""The default choice of a linear solver."""

from __future__ import annotations

import dataclasses

from ..options import options, require
from .dense import LU
from .gmres import GMRES
from .solver import LinearSolver, Result, System, check_count


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

    def _run(self, system: System) -> Result:
        if system.operator.size <= self.dense_size:
            return self.dense._run(dataclasses.replace(system, precondition=None))
        return self.iterative._run(system)
